"""Whole experiments through Ray Tune on a small LLaVA: run, interrupt, resume, refuse, search."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")

import ray
from safetensors.numpy import load_file
from small_run import SmallRun, make_small_run

from tprl_env.cli.commands import main
from tprl_env.rllib.config import load_config
from tprl_env.rllib.experiments.compare import compare, trial_resources
from tprl_env.rllib.experiments.definition import load_experiment
from tprl_env.rllib.experiments.places import TaskData
from tprl_env.rllib.experiments.search import search
from tprl_env.rllib.run.train import train

EXPERIMENT = """
from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="small",
    question="Does a critic's learning rate matter?",
    arms={
        "slow": Arm(code_width=8),
        "fast": Arm({"algorithm.lr": 5e-3}, code_width=8),
        "nothing": Arm({"imitation.demonstrator": "none"}, code_width=8),
    },
    changes={
        "resources.num_scorers": 0, "rules.budget": (2, 6), "rollout.samples": 4,
        "rollout.draws": 4, "imitation.steps": 5, "imitation.batch_size": 4, "policy.width": 16,
        "limits.checkpoint_every": 1, "limits.checkpoint_seconds": 0.0,
    },
    seeds=%s,
    max_scores=%d,
    budgets=(6, 2),
)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def stores(small: SmallRun) -> TaskData:
    return TaskData(str(small.lvlm), *[str(small.store)] * 3)


def write_experiment(folder: Path, scores: int, seeds: tuple[int, ...] = (0, 1)) -> Path:
    path = folder / "small.py"
    path.write_text(EXPERIMENT % (seeds, scores))
    return path


def records(out: Path) -> dict[str, dict]:
    runs = json.loads((out / "experiment.json").read_text())["runs"]
    return {
        name: json.loads((out / path / "record.json").read_text()) for name, path in runs.items()
    }


def test_an_experiment_runs_reports_and_is_done_once(small, tmp_path, capsys):
    spec = load_experiment(write_experiment(tmp_path, 64))
    shared = tmp_path / "shared"
    out = compare(spec, tmp_path / "out", shared=shared, stores=stores(small))
    found = records(out)
    assert len(found) == 6 and {r["lvlm_scores"] for r in found.values()} == {64}
    table = pq.read_table(out / "results.parquet").to_pylist()
    # two arms with imitation, one without; two budgets, two seeds; pruners have no seeds
    untrained = [row for row in table if row["method"] == "untrained"]
    assert len(table) - len(untrained) == (2 * 2 + 1) * 2 * 2
    assert {"random", "divprune"} < {row["arm"] for row in untrained}
    assert len(untrained) == 2 * len({row["arm"] for row in untrained})
    assert "| *random* |" in (out / "tables.md").read_text()
    assert {row["full_accuracy"] for row in table} == {
        found["crowded/slow/seed-0"]["policy"]["full_accuracy"]
    }
    assert len(list((shared / "imitation").iterdir())) == 2  # one per seed, shared by two arms
    assert "| fast - slow |" in (out / "tables.md").read_text()
    assert list((out / "tune").rglob("events.out.tfevents*"))
    times = {path: path.stat().st_mtime_ns for path in shared.glob("runs/*/record.json")}
    capsys.readouterr()
    for again in (out, tmp_path / "another experiment that shares the runs"):
        compare(spec, again, shared=shared, stores=stores(small))
        assert "0 of 6 runs of small are left" in capsys.readouterr().out
        assert records(again) == found
    assert times == {path: path.stat().st_mtime_ns for path in shared.glob("runs/*/record.json")}
    other = load_experiment(write_experiment(tmp_path, 80))
    with pytest.raises(ValueError, match="with other configs, max_scores; choose another out"):
        compare(other, out, shared=shared, stores=stores(small))


@pytest.mark.chaos
def test_a_killed_experiment_goes_on_where_it_was(small, tmp_path):
    path, out = write_experiment(tmp_path, 160, (0,)), tmp_path / "out"
    data = ["--lvlm", str(small.lvlm)]
    data += [
        word
        for split in ("train", "calibration", "test")
        for word in (f"--{split}", str(small.store))
    ]
    command = [sys.executable, "-m", "tprl_env.cli", "compare", str(path), "--out", str(out), *data]
    environment = {**os.environ, "RAY_ADDRESS": "", "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 150
    while not list(out.glob("runs/*/record.json")):
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    time.sleep(1.0)  # Ray's own processes notice
    finished = {p: p.read_bytes() for p in out.glob("runs/*/record.json")}
    assert 1 <= len(finished) < 3
    with pytest.raises(ValueError, match="are not finished"):
        from tprl_env.evaluation.experiment_tables import write_tables

        write_tables(out)
    compare(load_experiment(path), out, stores=stores(small))
    assert {p: p.read_bytes() for p in finished} == finished
    found = records(out)
    assert {record["lvlm_scores"] for record in found.values()} == {160}


def test_the_command_line_reports_and_refuses(small, tmp_path, capsys):
    assert main(["compare", "--report", "--out", str(tmp_path)]) == 2
    assert "there is no experiment" in capsys.readouterr().err
    assert main(["compare"]) == 2
    assert "needs the name of an experiment" in capsys.readouterr().err
    assert main(["compare", "ablation_query", "--lvlm", "x"]) == 2
    assert "--train, --calibration, --test too" in capsys.readouterr().err
    assert main(["compare", "ablation_query", "--log", "aim"]) == 2
    assert "unknown logger 'aim'" in capsys.readouterr().err
    words = ["compare", "ablation_codes", "--lvlm", str(small.lvlm), "--out", str(tmp_path / "o")]
    for split in ("train", "calibration", "test"):
        words += [f"--{split}", str(small.store)]
    assert main(words) == 2
    assert "code widths" in capsys.readouterr().err


def test_a_search_stops_the_worse_and_orders_all(small, tmp_path):
    path = tmp_path / "s.py"
    path.write_text(
        "from ray import tune\nfrom tprl_env.rllib.experiments.definition import Search\n"
        "SEARCH = Search(name='s', question='?', \n"
        "    space={'algorithm.lr': tune.choice([1e-4, 1e-3])},\n"
        "    changes={'resources.num_scorers': 0, 'rules.budget': (2, 6), 'rollout.samples': 4,\n"
        "    'rollout.draws': 4, 'imitation.steps': 3, 'imitation.batch_size': 4,\n"
        "    'policy.width': 16},\n"
        "    trials=3, max_scores=160, grace_scores=32, budget=7)\n"
    )
    spec = load_experiment(path)
    file = search(spec, tmp_path / "out", stores=stores(small))
    tried = json.loads(file.read_text())["tried"]
    assert len(tried) == 3 and all(set(row["settings"]) == {"algorithm.lr"} for row in tried)
    assert max(row["scores"] for row in tried) >= 144
    assert [row["scores"] for row in tried] == sorted((r["scores"] for r in tried), reverse=True)
    with pytest.raises(ValueError, match="finished search"):
        search(spec, tmp_path / "out", stores=stores(small))


def test_without_scorer_actors_a_run_is_the_same_to_the_bit(small, tmp_path):
    # with actors the batches depend on timing, and a likelihood's last bits on the batch
    changes = {
        "source": str(small.store),
        "lvlm": str(small.lvlm),
        "resources.num_scorers": 0,
        "limits.iterations": 3,
        "rules.budget": (2, 6),
        "rollout.samples": 4,
        "rollout.draws": 4,
        "imitation.steps": 5,
        "imitation.batch_size": 4,
        "policy.width": 16,
        "limits.max_scores": None,
    }
    config = load_config("recommended", changes)
    first, second = (
        load_file(train(config, tmp_path / name, progress=False).policy_path / "model.safetensors")
        for name in ("first", "second")
    )
    assert first.keys() == second.keys()  # the file's header has no fixed order
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_resources_of_a_run_name_every_actor():
    config = load_config(
        "recommended",
        {
            "resources.num_scorers": 2,
            "resources.scorer_gpus": 0.5,
            "resources.num_env_runners": 1,
            "rollout.samples": 32,
            "resources.scorer_resources": {"scorer": 1.0},
        },
    )
    bundles = trial_resources(config).bundles
    scorer = {"CPU": 1.0, "GPU": 0.5, "scorer": 1.0}
    assert bundles == [{"CPU": 1.0}, scorer, scorer, {"CPU": 1.0}]
