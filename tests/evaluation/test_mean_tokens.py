"""A count head from the command line: fitted, found on calibration, measured, used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tprl_env.cli import main
from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.policy import PolicyConfig, PruningPolicy
from tprl_env.policy.autoencoder_training import train_autoencoder, write_codes

LVLM = "builtin:crowded"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found, lvlm = tmp_path_factory.mktemp("means"), load_lvlm(LVLM)
    autoencoder = None
    for split in ("train", "calibration", "test"):
        samples = load_dataset("scenes-crowded", split, limit=30)
        store = encode_dataset(lvlm, samples, found / split, progress=False)
        if autoencoder is None:
            autoencoder, _ = train_autoencoder(store, code_width=8, steps=5)
            autoencoder.save_pretrained(found / "autoencoder")
        write_codes(store, autoencoder)
    config = PolicyConfig.question_aware(8, store.query_width, width=16)
    torch.manual_seed(0)
    PruningPolicy(config).save_pretrained(found / "policy")
    return found


def evaluate(place: Path, out: Path, *more: str) -> int:
    words = ["evaluate", place / "test", "--lvlm", LVLM, "--policy", place / "policy",
             "--pruners", "random", "--trajectories", "0", "--out", out, *more]  # fmt: skip
    return main([str(word) for word in words])


def test_from_the_fit_to_the_answer(place: Path, tmp_path: Path, capsys: Any) -> None:
    means = ["--calibration", str(place / "calibration"), "--mean-tokens", "20,8"]
    assert evaluate(place, tmp_path / "none", *means) == 2
    assert "has no count head; fit one with `tprl fit-counts" in capsys.readouterr().err
    words = ["fit-counts", place / "train", "--lvlm", LVLM, "--policy", place / "policy",
             "--questions", "30", "--counts", "2,8,32,64"]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    assert "120 scores" in capsys.readouterr().out
    record = json.loads((place / "policy" / "counts" / "fitting.json").read_text())
    assert record["questions"] == 30 and record["command"].startswith("tprl fit-counts")
    assert main(["verify", str(place / "policy")]) == 0
    assert evaluate(place, tmp_path / "table", *means) == 0
    results = json.loads((tmp_path / "table" / "results.json").read_text())
    rows = {row["budget"]: row for row in results["methods"]
            if row["name"] == "policy, chosen counts"}  # fmt: skip
    assert set(rows) == {20, 8}
    for mean, row in rows.items():
        assert abs(row["mean_tokens"] - mean) < 12 and row["std_tokens"] >= 0
        if row["std_tokens"]:
            assert set(row["tokens_by_type"]) == set(row["by_type"])
    assert main(["check-results", str(tmp_path / "table")]) == 0
    assert evaluate(place, tmp_path / "far", *means[:2], "--mean-tokens", "100") == 2
    assert "out of this head's reach here" in capsys.readouterr().err
    assert evaluate(place, tmp_path / "both", *means, "--budgets", "4") == 2
    assert evaluate(place, tmp_path / "bare", *means[2:]) == 2
    assert "pass --calibration STORE" in capsys.readouterr().err
    model = PrunedLVLM.load(LVLM, policy=place / "policy", autoencoder=place / "autoencoder",
                            price=0.2)  # fmt: skip
    store = FeatureStore.open(place / "test")
    kept = [
        int(model.answer(store.picture(row), store.question(row), 1).keep.sum()) for row in range(4)
    ]
    assert set(kept) <= {2, 8, 32, 64}
