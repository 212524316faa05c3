"""TrainConfig: names, types, combinations; the presets; the run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("ray")

from tprl_env.data.features.store import open_source
from tprl_env.policy.network import PolicyConfig, PruningPolicy
from tprl_env.rllib.config import TrainConfig, load_config, policy_config, rules, scorer_spec
from tprl_env.rllib.rollout.module import load_policy
from tprl_env.rllib.run.folder import Progress, RunFolder

PRESETS = ("recommended", "ppo", "paper", "bernoulli_count", "mean_query", "smoke", "grpo", "mapo")


def test_an_unknown_field_names_its_neighbours():
    with pytest.raises(ValueError, match=r"no field 'gae_lamda'; did you mean 'gae_lambda'"):
        TrainConfig().replace(gae_lamda=0.9)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "3e-4", 3e-4),
        ("epochs", "4", 4),
        ("budget", "4,20", (4, 20)),
        ("budget", "(4, 20)", (4, 20)),
        ("budget", "14", 14),
        ("max_scores", "1e5", 100_000),
        ("max_scores", "none", None),
        ("width", "none", None),
        ("shared_budget", "true", True),
        ("scorer_resources", '{"scorer": 1}', {"scorer": 1}),
    ],
)
def test_strings_become_the_fields_types(name, text, value):
    assert getattr(TrainConfig().replace(**{name: text}), name) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": "fast"}, "lr must be float, got 'fast'"),
        ({"epochs": "2.5"}, "epochs must be int"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"seed": None}, "seed must not be None"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"gamma": 1.5}, r"gamma must lie in \(0, 1\]"),
        ({"distribution": "exakt"}, "did you mean 'exact'"),
        ({"ratio": "token"}, "ratio='token' has no meaning for distribution='exact'"),
        ({"budget": None}, "needs budget="),
        ({"heads": 5}, "must divide the width"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1"),
        ({"rounds": 3}, "rounds=3 must divide samples=32"),
        ({"draws": 1, "group_baseline": True}, "draws of at least 2"),
        ({"num_env_runners": 3}, "num_env_runners=3 must divide"),
        ({"count_loss": 0.3}, "count_loss needs distribution='bernoulli'"),
        (
            {"num_learners": 2, "max_steps": 3, "distribution": "bernoulli"},
            "num_learners > 1 needs minibatch_size",
        ),
        ({"algorithm": "grpo0"}, "did you mean 'grpo'"),
        ({"algorithm": "grpo", "draws": 1}, "draws must be at least 2"),
        ({"algorithm": "grpo", "runner": "default"}, "needs runner='fast'"),
        ({"algorithm": "grpo", "reward_batch_size": 32}, "needs reward_batch_size=1"),
        ({"algorithm": "grpo", "group_baseline": True}, "group_baseline has no meaning"),
        (
            {"algorithm": "mapo", "count_regression_baseline": True},
            "count_regression_baseline is not defined",
        ),
        ({"algorithm": "mapo", "num_learners": 2}, "needs minibatch_size"),
        ({"kl_coefficient": 0.1}, "kl_coefficient applies to algorithm='grpo' only"),
        ({"algorithm": "grpo", "memory_size": 9}, "memory_size applies to algorithm='mapo' only"),
        ({"algorithm": "mapo", "memory_limit": 3}, "memory_limit=3 must be at least memory_size=4"),
        ({"memory_weight": 1.0}, r"memory_weight must lie in \[0, 1\)"),
        ({"shared_budget": True, "fixed_budgets": True}, "exclude each other"),
        ({"min_tokens": 6}, "min_tokens must be below the smallest budget"),
    ],
)
def test_wrong_values_are_refused_in_a_sentence(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().replace(**changes)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_survive_json(name):
    config = load_config(name, {"seed": "3"})
    assert config.seed == 3
    assert TrainConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_the_presets_of_the_algorithms_differ_from_ppo_only_where_they_must():
    ppo = load_config("ppo").as_dict()
    for name in ("grpo", "mapo"):
        other = load_config(name).as_dict()
        different = {field for field in other if other[field] != ppo[field]}
        assert different == {"algorithm"} | ({"fixed_budgets"} if name == "mapo" else set())


def test_the_paper_preset_is_the_papers():
    config = load_config("paper")
    assert (config.max_steps, config.discount, config.ratio) == (3, 0.5, "joint")
    assert (config.alpha, config.beta, config.gamma, config.gae_lambda) == (1.0, 0.1, 0.99, 0.95)
    assert (config.value_coefficient, config.entropy, config.clip) == (0.5, 0.01, 0.2)
    assert (config.lr, config.epochs, config.demonstrator) == (1e-5, 4, "vispruner")
    policy = policy_config(config, open_source("toy"))
    assert policy == PolicyConfig(token_width=8, query_width=8, trained_steps=3)
    assert rules(config).score_kind == "exact"


def test_unknown_presets_and_files_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match="known: bernoulli_count, budget_conditioned, grpo, mapo, "
    ):
        load_config("recomended")
    with pytest.raises(ValueError, match="no config file"):
        load_config(tmp_path / "missing.py")
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match="must define CONFIG"):
        load_config(tmp_path / "empty.py")


def test_a_config_file_of_ones_own(tmp_path: Path):
    text = "from tprl_env.rllib.config import TrainConfig\nCONFIG = TrainConfig(lr=0.25)\n"
    (tmp_path / "mine.py").write_text(text)
    assert load_config(str(tmp_path / "mine.py")).lr == 0.25


def test_missing_source_or_lvlm_say_what_to_pass():
    with pytest.raises(ValueError, match="--source"):
        scorer_spec(load_config("recommended"))
    with pytest.raises(ValueError, match="--lvlm"):
        scorer_spec(load_config("recommended", {"source": "store"}))


def test_a_folder_is_not_overwritten_and_not_resumed_with_another_policy(tmp_path: Path):
    config = load_config("smoke")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no run in .* to resume"):
        folder.begin(config, resume=True)
    folder.begin(config, resume=False)
    with pytest.raises(ValueError, match="holds a run already"):
        folder.begin(config, resume=False)
    with pytest.raises(ValueError, match=r"another shape \(width 32, now 64\)"):
        folder.begin(config.replace(width=64), resume=True)
    folder.begin(config.replace(lr=1e-4, iterations=50), resume=True)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [entry["resume"] for entry in starts] == [False, True]
    assert "ray" in starts[0]["versions"] and starts[0]["seed"] == 0


def test_checkpoints_are_whole_or_absent_and_the_oldest_go(tmp_path: Path):
    folder = RunFolder(tmp_path)
    policy = PruningPolicy(PolicyConfig(token_width=8, query_width=8))

    def save(path: str) -> None:
        Path(path).mkdir()

    def fail(path: str) -> None:
        raise OSError("disk full")

    for iteration in (2, 4, 6, 8):
        folder.save_checkpoint(Progress(iteration, scores=iteration * 10), policy, save, {})
    assert [path.name[-1] for path in folder.checkpoints()] == ["4", "6", "8"]
    with pytest.raises(OSError, match="disk full"):
        folder.save_checkpoint(Progress(10), policy, fail, {})
    path, progress = folder.newest()
    assert path.name == "iteration_000008" and progress == Progress(8, scores=80)
    assert PruningPolicy.from_pretrained(folder.policy).config == policy.config


def test_metrics_of_undone_work_are_dropped(tmp_path: Path):
    folder = RunFolder(tmp_path)
    with folder.metrics_writer(after=0) as write:
        for iteration in range(1, 6):
            write({"iteration": iteration, "score": 0.5, "missing": None})
    with folder.metrics.open("a") as file:
        file.write('{"iteration": 6, "sco')  # killed while writing
    with folder.metrics_writer(after=3) as write:
        write({"iteration": 4, "score": 0.25})
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [(row["iteration"], row["score"]) for row in rows[-2:]] == [(3, 0.5), (4, 0.25)]


def test_a_policy_of_another_shape_is_refused(tmp_path: Path):
    config = PolicyConfig(token_width=8, query_width=8)
    PruningPolicy(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"another shape .* layers 1 instead of 2"):
        load_policy(str(tmp_path), dataclasses.replace(config, layers=2))
    # an imitation, trained in one step, starts runs of any number of steps
    assert load_policy(str(tmp_path), dataclasses.replace(config, trained_steps=3))


def test_a_run_of_one_step_says_so(tmp_path: Path):
    source = open_source("toy")
    for steps in (1, 3):
        config = load_config("smoke", {"max_steps": steps})
        PruningPolicy(policy_config(config, source)).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["trained_steps"] == steps and "max_steps" not in saved
    shown = policy_config(load_config("smoke", {"max_steps": 2, "step_input": True}), source)
    assert (shown.max_steps, shown.trained_steps) == (2, 2)
