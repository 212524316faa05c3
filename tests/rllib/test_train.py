"""Training through Ray actors: it learns, survives deaths, stops on failures, and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray")

import ray
from ray.rllib.core import DEFAULT_MODULE_ID

from tprl_env.data.features.store import open_source
from tprl_env.env.scorer import ScoringError
from tprl_env.evaluation.compare_on_store import training_of
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.config import load_config, policy_config, scorer_spec
from tprl_env.rllib.run.folder import RunFolder
from tprl_env.rllib.run.train import train
from tprl_env.scoring.pool import ScorerPool

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    context = ray.init(
        address="local",
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": str(HELPERS)}},  # for rllib_fakes
    )
    yield context.address_info["gcs_address"]
    ray.shutdown()


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_exact_budgets_learn_and_everything_is_written(tmp_path: Path):
    seen = []
    result = train(
        load_config("smoke", {"limits.checkpoint_every": 15}),
        tmp_path,
        progress=False,
        on_iteration=lambda row, policy: seen.append((row["iteration"], policy.config.width)),
    )
    assert result.stopped_by == "iterations" and result.progress.scores == 20 * 256
    assert seen == [(number, 32) for number in range(1, 21)]
    history = rows(tmp_path)
    assert history[0]["score"] < 0.4 and result.metrics["score"] > 0.85
    assert result.metrics["mean_return"] > history[0]["mean_return"] + 0.4
    assert history[-1]["computed"] < history[-1]["scores"] and 0 <= history[-1]["busy_share"] <= 1
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == [
        "iteration_000015",
        "iteration_000020",
    ]
    policy = PruningPolicy.from_pretrained(result.policy_path)
    source = open_source("toy:samples=64,tokens=16,width=8,seed=0")
    assert policy.config == policy_config(load_config("smoke"), source)


def test_without_scorer_actors_the_runner_scores_and_the_scores_are_the_same(tmp_path: Path):
    limits = {"limits.iterations": 2, "limits.report_every": 1}
    with_actors = load_config("smoke", limits)
    without = with_actors.replace(**{"resources.num_scorers": 0})
    for name, config in (("actors", with_actors), ("none", without)):
        train(config, tmp_path / name, progress=False)
    first, second = rows(tmp_path / "actors"), rows(tmp_path / "none")
    for name in ("score", "kept", "scores", "mean_return"):
        assert [row[name] for row in first] == pytest.approx([row[name] for row in second])
    assert second[-1]["busy_share"] <= 1.05


def test_the_record_of_a_training_counts_all_starts_and_the_imitation(tmp_path: Path):
    fields = {"imitation.demonstrator": "divprune", "imitation.steps": 20}
    fields |= {"resources.num_scorers": 0, "limits.iterations": 2, "seed": 5}
    config = load_config("smoke", fields)
    first = train(config, tmp_path / "run", preset="smoke", progress=False)
    assert first.imitation is not None and first.imitation.seconds > 0
    imitation = round(first.imitation.seconds, 2)
    file = first.policy_path / "training.json"
    assert json.loads(file.read_text()) == first.record == training_of(first.policy_path)
    assert first.record["seconds"] == pytest.approx(first.progress.seconds + imitation, abs=0.011)
    known = {"algorithm": "PPO", "preset": "smoke", "lvlm_scores": 512, "env_steps": 512, "seed": 5}
    assert first.record.items() >= known.items()
    again = train(config, tmp_path / "run", resume=True, iterations=3, progress=False)
    assert again.imitation is None and again.record["lvlm_scores"] == 768
    assert again.record["seconds"] == pytest.approx(again.progress.seconds + imitation, abs=0.011)
    assert json.loads(file.read_text()) == again.record
    # the same, where the imitation was made before and handed over
    start = tmp_path / "run" / "imitated_policy"
    other = train(config, tmp_path / "other", init_policy=start, iterations=1, progress=False)
    assert other.record["seconds"] == pytest.approx(other.progress.seconds + imitation, abs=0.011)
    assert other.record["preset"] == "custom"


def test_bernoulli_actions_learn_with_a_count_loss(tmp_path: Path):
    config = load_config(
        "smoke",
        {
            "policy.distribution": "bernoulli",
            "rules.budget": None,
            "policy.budget_input": False,
            "algorithm.ratio": "token",
            "algorithm.count_loss": 0.3,
            "algorithm.count_target": 4.0,
            "rollout.group_baseline": True,
            "rollout.count_regression_baseline": True,
            "limits.iterations": 25,
        },
    )
    last = train(config, tmp_path, progress=False).metrics
    assert last["score"] > 0.7 and 2.0 < last["kept"] < 7.0


def test_a_scorer_that_raises_stops_training(tmp_path: Path):
    config = load_config(
        "smoke",
        {
            "scoring.scorer": "import",
            "scoring.factory": "rllib_fakes:failing",
            "scoring.options": {"sample": 11},
        },
    )
    with pytest.raises(ScoringError, match=r"'toy-11' \(number 11\): ArithmeticError"):
        train(config, tmp_path / "local", progress=False)
    remote = config.replace(**{"resources.num_env_runners": 1})
    with pytest.raises(ScoringError, match=r"'toy-11' \(number 11\): ArithmeticError") as caught:
        train(remote, tmp_path / "remote", progress=False)
    assert type(caught.value) is ScoringError  # not Ray's, whose text is a traceback
    assert "Traceback" not in str(caught.value)


def test_demonstrated_weights_reach_all_and_a_killed_runner_comes_back(tmp_path: Path):
    config = load_config("smoke", {"resources.num_env_runners": 2})
    policy = PruningPolicy(policy_config(config, open_source(config.source)))
    policy.save_pretrained(tmp_path)
    wanted = policy.state_dict()["actor.score.weight"]

    def weights(runner) -> torch.Tensor:
        return runner.module.pruning_policy.state_dict()["actor.score.weight"]

    pool = ScorerPool.start(scorer_spec(config), 1, num_cpus=1)
    algorithm = algorithm_config(config, pool=pool.address, init_policy=str(tmp_path)).build_algo()
    try:
        runners = algorithm.env_runner_group.foreach_env_runner
        learner = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID]
        assert torch.equal(learner.pruning_policy.state_dict()["actor.score.weight"], wanted)
        assert all(torch.equal(w, wanted) for w in runners(weights, local_env_runner=False))
        steps = algorithm.train()["env_runners"]["num_env_steps_sampled_lifetime"]
        assert steps == 256
        pids = runners(lambda runner: os.getpid(), local_env_runner=False)
        os.kill(pids[0], signal.SIGKILL)
        deadline, iterations = time.monotonic() + 200, 0  # loaded machines
        while time.monotonic() < deadline:
            result = algorithm.train()
            iterations += 1
            alive = runners(lambda runner: os.getpid(), local_env_runner=False)
            if iterations >= 3 and len(alive) == 2 and pids[0] not in alive:
                break
        assert len(alive) == 2 and pids[0] not in alive
        assert result["env_runners"]["num_env_steps_sampled_lifetime"] >= 256 * (iterations + 1)
    finally:
        algorithm.stop()
        pool.close()


def test_a_killed_driver_resumes_where_its_last_checkpoint_was(tmp_path: Path, cluster: str):
    script = (
        "from tprl_env.rllib.config import load_config\n"
        "from tprl_env.rllib.run.train import train\n"
        "over = {'limits.iterations': 10000, 'limits.checkpoint_every': 2}\n"
        f"train(load_config('smoke', over), {str(tmp_path)!r}, progress=False)\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": cluster, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])
    driver = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 200  # minutes on a loaded machine
    while time.monotonic() < deadline and len(RunFolder(tmp_path).checkpoints()) < 2:
        assert driver.poll() is None, "the driver ended by itself"
        time.sleep(0.02)
    driver.send_signal(signal.SIGKILL)
    driver.wait(10)
    _, saved = RunFolder(tmp_path).newest()
    assert saved.iteration >= 4 and saved.scores == saved.iteration * 256
    assert rows(tmp_path)[-1]["iteration"] >= saved.iteration  # some work may be undone
    goal = saved.iteration + 3
    config = load_config("smoke", {"limits.iterations": goal})
    result = train(config, tmp_path, resume=True, progress=False)
    history = rows(tmp_path)
    assert [row["iteration"] for row in history] == list(range(1, goal + 1))
    assert [row["scores"] for row in history] == [256 * n for n in range(1, goal + 1)]
    assert [row["env_steps"] for row in history] == [256 * n for n in range(1, goal + 1)]
    assert result.progress.seconds > saved.seconds
    starts = json.loads((tmp_path / "run.json").read_text())
    assert [start["resume"] for start in starts] == [False, True]


def test_limits_are_needed_and_counted(tmp_path: Path):
    config = load_config("smoke", {"limits.iterations": None})
    with pytest.raises(ValueError, match="never end"):
        train(config, tmp_path / "endless", progress=False)
    result = train(config, tmp_path / "scores", max_scores=600, progress=False)
    assert result.stopped_by == "max_scores" and result.progress.scores == 768


@pytest.mark.slow
def test_two_learners_and_the_default_runner(tmp_path: Path):
    config = load_config("smoke", {"limits.iterations": 4, "resources.num_learners": 2})
    assert train(config, tmp_path / "two", progress=False).progress.scores == 1024
    config = load_config("smoke", {"limits.iterations": 4, "rollout.runner": "default"})
    result = train(config, tmp_path / "default", progress=False)
    assert result.progress.scores == 1024 and result.metrics["score"] > 0
