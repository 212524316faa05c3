"""LoRA under a frozen pruner: learns, merges, saves, and refuses what does not fit."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from tprl_env.cli import main
from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.measure import keep_masks
from tprl_env.inference import PrunedLVLM
from tprl_env.inference.finetuning import TuningSettings, tune
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.stored import stored_prompt
from tprl_env.lvlm.tiny.families import save_random
from tprl_env.policy import PolicyConfig, PolicyPruner, PruningPolicy
from tprl_env.policy.autoencoder import AutoencoderConfig, TokenAutoencoder
from tprl_env.reducers import make_pruner

LVLM = "builtin:crowded"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    samples = load_dataset("scenes-crowded", "train", limit=96)
    place = tmp_path_factory.mktemp("tuning") / "store"
    return encode_dataset(load_lvlm(LVLM), samples, place, progress=False)


def likelihood(lvlm: Any, store: FeatureStore, rows: np.ndarray, budget: int) -> float:
    """Mean log-likelihood per question under uniform masks."""
    keep = list(keep_masks(make_pruner("uniform"), store, rows, budget))
    prompts = [stored_prompt(store, int(row)) for row in rows]
    answers = [[store.answer_ids(int(row))[0].tolist()] for row in rows]
    tokens = [torch.from_numpy(np.array(store.visual(int(row)).tokens)) for row in rows]
    return float(np.log(lvlm.score(prompts, answers, tokens, keep).likelihood).mean())


def test_the_loss_is_the_likelihood(store: FeatureStore) -> None:
    lvlm: Any = load_lvlm(LVLM)
    rows = np.arange(6)
    keep = list(keep_masks(make_pruner("uniform"), store, rows, 20))
    prompts = [stored_prompt(store, int(row)) for row in rows]
    answers = [store.answer_ids(int(row))[0].tolist() for row in rows]
    tokens = [torch.from_numpy(np.array(store.visual(int(row)).tokens)) for row in rows]
    loss = lvlm.answer_loss(prompts, answers, tokens, keep)
    scores = lvlm.score(prompts, [[one] for one in answers], tokens, keep)
    count = sum(map(len, answers))
    assert float(loss) == pytest.approx(-np.log(scores.likelihood).sum() / count, rel=1e-4)


def test_tuning_learns_merges_and_is_saved(store: FeatureStore, tmp_path: Path) -> None:
    lvlm: Any = load_lvlm(LVLM)
    rows, before = np.arange(48), lvlm.fingerprint
    names = {name for name, _ in lvlm.model.named_parameters()}
    tower = lvlm.model.model.vision_tower.state_dict()
    kept = {name: value.clone() for name, value in tower.items()}
    started = likelihood(lvlm, store, rows, 48)
    losses = tune(lvlm, store, make_pruner("uniform"), TuningSettings((48,), 30, 16, 2e-3))
    assert len(losses) == 30 and np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert likelihood(lvlm, store, rows, 48) > started + 0.2
    assert {name for name, _ in lvlm.model.named_parameters()} == names  # LoRA is merged
    assert not any(p.requires_grad for p in lvlm.model.parameters())
    assert all(torch.equal(kept[name], value) for name, value in tower.items())
    assert lvlm.fingerprint != before and lvlm.fingerprint.startswith("changed:")
    again: Any = load_lvlm(lvlm.save_pretrained(tmp_path / "tuned"))
    assert again.fingerprint not in (before, lvlm.fingerprint)
    found = likelihood(again, store, rows, 48)
    assert found == pytest.approx(likelihood(lvlm, store, rows, 48), abs=1e-5)
    with pytest.raises(ValueError, match="encoded by another LVLM"):
        tune(again, store, None, TuningSettings(steps=1))
    policy = PolicyPruner(PruningPolicy(PolicyConfig.question_aware(4, 64, width=16)))
    for one in (lvlm, again):  # in memory, and loaded
        codes = TokenAutoencoder(AutoencoderConfig(64, 4, 16, lvlm_fingerprint=before))
        with pytest.warns(UserWarning, match="were trained on another LVLM"):
            PrunedLVLM(one, policy, codes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PrunedLVLM(load_lvlm(LVLM), policy, codes)
    with pytest.raises(ValueError, match="holds a checkpoint already"):
        lvlm.save_pretrained(tmp_path / "tuned")


def test_the_same_seed_gives_the_same(store: FeatureStore) -> None:
    settings = TuningSettings((20, 0.5), 3, 4, seed=3)
    found = [tune(load_lvlm(LVLM), store, make_pruner("random"), settings) for _ in range(2)]
    assert found[0] == found[1]
    assert tune(load_lvlm(LVLM), store, None, TuningSettings(steps=2, batch_size=4))  # the control


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_next"])
def test_other_families_are_tuned(family: str, tmp_path: Path) -> None:
    lvlm: Any = load_lvlm(save_random(family, tmp_path / "lvlm"))
    from tprl_env.data.sample import Sample

    rng = np.random.default_rng(0)
    samples = [
        Sample(str(n), rng.integers(0, 255, (40, 70, 3), dtype=np.uint8), "yes or no",
               ("yes",) if n % 2 else ("no",), str(n))
        for n in range(6)
    ]  # fmt: skip
    store = encode_dataset(lvlm, samples, tmp_path / "store", progress=False)
    losses = tune(lvlm, store, make_pruner("divprune"), TuningSettings((0.5,), 12, 6, 5e-3))
    assert losses[-1] < 0.5 * losses[0]
    again: Any = load_lvlm(lvlm.save_pretrained(tmp_path / "tuned"))
    assert again.model_type == family


def test_the_command_saves_a_checkpoint(store: FeatureStore, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "tuned"
    line = ["finetune", str(store.path), "--lvlm", LVLM, "--pruner", "uniform", "--budgets", "48",
            "--steps", "2", "--batch-size", "4", "--out", str(out)]  # fmt: skip
    assert main(line) == 0
    record = json.loads((out / "finetuning.json").read_text())
    assert len(record["losses"]) == 2 and record["settings"]["budgets"] == [48]
    assert "encoded again" in capsys.readouterr().out
    load_lvlm(out)
    assert main(line) == 2 and "take another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--pruner", "uniform"], "needs a pruner and budgets; the control neither"),
        (["--budgets", "48"], "needs a pruner and budgets"),
        (["--pruner", "uniform", "--budgets", "500"], "budgets must be one or more counts"),
        (["--pruner", "unifrm", "--budgets", "4"], "did you mean 'uniform'"),
        (["--lr", "7"], r"lr must lie in \(0, 1\), got 7"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--policy", "p", "--pruner", "uniform"], "not both"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    store: FeatureStore, tmp_path: Path, capsys: Any, more: list[str], said: str
) -> None:
    import re

    line = ["finetune", str(store.path), "--lvlm", LVLM, "--out", str(tmp_path / "out"), *more]
    assert main(line) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_loss_that_is_not_finite_leaves_the_lvlm_as_it_was(store: FeatureStore) -> None:
    from unittest import mock

    lvlm: Any = load_lvlm(LVLM)
    before, rows = lvlm.fingerprint, np.arange(8)
    started = likelihood(lvlm, store, rows, 48)
    broken = torch.tensor(float("nan"), requires_grad=True)
    with mock.patch("tprl_env.inference.finetuning._loss", return_value=broken):
        with pytest.raises(FloatingPointError, match="step 0 is not finite; lower lr"):
            tune(lvlm, store, None, TuningSettings(steps=3))
    assert lvlm.fingerprint == before
    assert likelihood(lvlm, store, rows, 48) == started
