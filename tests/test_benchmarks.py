"""The benchmarks run end to end on a tiny random checkpoint and end with their JSON line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from lvlm_fixtures import save_llava
from small_run import write_dataset

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("benchmarks")
    data = write_dataset(folder / "data")
    return ["--lvlm", str(save_llava(folder / "lvlm")), "--dataset", str(data)]


def last_line(name: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_rollout(inputs: list[str]) -> None:
    pytest.importorskip("ray")
    result = last_line(
        "rollout", *inputs, "--episodes", "64", "--one-by-one", "2", "--repeats", "1",
        "--warmup", "0", "--autoencoder-steps", "5", "--actors", "1",
    )  # fmt: skip
    for name in ("collect_vs_one_by_one", "collect_vs_one_by_one_with_actors",
                 "collect_vs_our_decoder", "collect_vs_our_decoder_with_actors",
                 "cpu_per_step_vs_handwritten", "cpu_per_step_vs_rllib_default"):  # fmt: skip
        assert result[name] > 0
        low, high = result["ranges"][name]
        assert low <= result[name] <= high
    rows = {name: row["rows_trained_per_step"] for name, row in result["contenders"].items()}
    assert rows["handwritten"] == result["setting"]["epochs"] == 4
    assert rows["ours"] < rows["default"]  # no padding rows
    for name in ("ours", "scorer actors"):
        assert 64 <= result["contenders"][name]["steps_per_round"] <= 3 * 64
    for agreement in result["generated_equals_scored"].values():
        assert agreement["equal"] == agreement["masks"] >= 2


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "mapo"])
def test_rollout_of_groups(inputs: list[str], algorithm: str) -> None:
    pytest.importorskip("ray")
    result = last_line(
        "rollout", *inputs, "--algorithm", algorithm, "--episodes", "64", "--one-by-one", "2",
        "--repeats", "1", "--warmup", "1", "--autoencoder-steps", "5",
    )  # fmt: skip
    assert set(result["contenders"]) == {
        "ours",
        "handwritten",
        "one by one",
        "one by one, our decoder",
    }
    assert result["cpu_per_step_vs_handwritten"] > 0 and result["setting"]["draws"] == 8
    rows = result["contenders"]["handwritten"]["rows_trained_per_step"]
    # MAPO leaves remembered draws away and adds what it remembers
    assert rows == 4 if algorithm == "grpo" else 3 < rows < 8


def test_scoring(inputs: list[str]) -> None:
    result = last_line("scoring", *inputs, "--rows", "40", "--samples", "12", "--repeats", "1")
    for figures in result["dtypes"].values():
        assert all(rate > 0 for rate in figures["by_kept"].values())
        assert set(figures["batching"]) == {"bucketed", "one_by_one", "padded_to_longest"}
        assert "2048" in figures["by_places"] and min(figures["by_places"].values()) > 0
        assert figures["cache"]["computed"] + figures["cache"]["duplicates"] <= 40


def test_house() -> None:
    pytest.importorskip("ray")
    [found] = last_line("house", "--json").values()
    package = ROOT / "tprl_env"
    assert found["rooms and cli"] == len(list(package.glob("*/__init__.py")))
    assert found["modules in the root"] == len(list(package.glob("*.py")))
    assert found["modules"] == len(list(package.rglob("*.py")))
    assert found["public names"] > found["rooms and cli"]
    episode, sample = found["one episode"], found["one training sample"]
    assert {"env/single.py", "env/episodes.py", "data/features/toy.py"} <= set(episode["files"])
    assert {"rllib/rollout/runner.py", "policy/network.py"} <= set(sample["files"])
    for count in (episode, sample):
        assert len(count["files"]) <= count["functions"] and 0 < count["classes"]


def test_reducers(tmp_path: Path) -> None:
    out = tmp_path / "reducers.json"
    result = last_line("reducers", "--sides", "6", "--repeats", "1", "--out", str(out))
    assert json.loads(out.read_text("utf-8")) == result
    rows = result["tokens"]["36"]
    assert {"prefill", "random", "scope", "prumerge_plus", "tome", "flowcut"} <= rows.keys()
    assert rows["prefill"]["to_prefill"] == 1 and all(row["seconds"] > 0 for row in rows.values())


def test_gpu_runs_on_the_cpu_at_tiny_shapes(tmp_path: Path) -> None:
    result = last_line("gpu", "--tiny", "--rows", "2", "--repeats", "1", "--out", str(tmp_path))
    assert result == json.loads((tmp_path / "gpu.json").read_text())
    assert result["ran_on_gpu"] is False and result["tests"] is None
    assert (
        result["efficiency"] == {"tiny": "tiny"} and (tmp_path / "tiny" / "efficiency.md").is_file()
    )
    for shape in result["shapes"].values():
        assert shape["scores_batched_per_second"] > 0
