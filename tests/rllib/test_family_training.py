"""One iteration of PPO on stores whose pictures have no grid in common, and what it trained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ray")
pytest.importorskip("transformers")

import ray
from PIL import Image

from tprl_env.cli.commands import main
from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation import evaluate_store
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm.tiny.families import save_random
from tprl_env.policy import PruningPolicy
from tprl_env.policy.observations import observe, with_progress
from tprl_env.rllib.config import load_config
from tprl_env.rllib.run.train import train

SIZES = ((40, 70), (28, 28), (90, 33))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(
    scope="module", params=[pytest.param("qwen2_5_vl", marks=pytest.mark.slow), "llava_next"]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    save_random(request.param, place / "lvlm")
    rng = np.random.default_rng(0)
    lines = []
    for number, size in enumerate(SIZES):
        picture = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{number}.png")
        named = {"id": str(number), "image": f"{number}.png"}
        lines.append(json.dumps({**named, "question": "yes or no", "answers": ["yes"]}))
    (place / "data.jsonl").write_text("\n".join(lines))
    data, lvlm, store = place / "data.jsonl", place / "lvlm", place / "store"
    words = ["encode", "--data", data, "--lvlm", lvlm, "--out", store, "--no-tower"]
    assert main([str(word) for word in words]) == 0
    words = ["autoencoder", store, "--code-width", "8", "--steps", "20"]
    assert main([str(word) for word in words]) == 0
    return place


def test_an_iteration_trains_a_policy_that_knows_where_tokens_are(
    folder: Path, tmp_path: Path
) -> None:
    changes = {
        **{"source": str(folder / "store"), "lvlm": str(folder / "lvlm")},
        **{"scoring.scorer": "lvlm", "resources.num_scorers": 1, "limits.iterations": 1},
        **{"rollout.samples": 3, "rollout.draws": 4, "rules.budget": "0.2,0.5"},
    }
    result = train(load_config("smoke", changes), tmp_path / "run", progress=False)
    assert result.progress.scores == 12 and np.isfinite(result.metrics["score"])
    policy = PruningPolicy.from_pretrained(result.policy_path)
    assert policy.config.coordinates and policy.config.position_slots == 0
    store = FeatureStore.open(folder / "store")
    seen = with_progress(
        observe(store, [0, 1, 2], policy.config),
        alive=torch.from_numpy(store.exists([0, 1, 2])), step=0, budget=3,
    )  # fmt: skip
    moved = {**seen, "areas": seen["areas"].flip(1)}
    with torch.no_grad():
        assert (policy.logits(seen) - policy.logits(moved)).abs().max() > 1e-4
    results = evaluate_store(
        folder / "store", str(folder / "lvlm"), tmp_path / "table", policy=result.policy_path,
        pruners=["uniform"], budgets=(4, 0.25), trajectories=1,
    )  # fmt: skip
    counts = store.exists(np.arange(len(store))).sum(1)
    share = np.floor(0.25 * counts + 0.5)
    assert len(set(share)) > 1
    for row in results["methods"]:
        assert row["mean_tokens"] == pytest.approx(share.mean() if "share" in row else 4, abs=1e-3)
        assert row["budget"] == (round(share.mean()) if "share" in row else 4)
    assert (tmp_path / "table" / "trajectories" / "trajectory-00.png").is_file()
    model = PrunedLVLM.load(
        str(folder / "lvlm"), policy=result.policy_path, autoencoder=folder / "store/autoencoder"
    )
    for number in range(3):
        answer = model.answer(folder / f"{number}.png", "yes or no", 3, max_new_tokens=2)
        assert answer.keep.sum() == 3 and len(answer.keep) == len(store.tokens(number))
