"""TrainConfig: names, types, combinations; the presets; the run folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import get_args

import pytest

pytest.importorskip("ray")

from tprl_env.data.features.store import open_source
from tprl_env.policy.network import PolicyConfig, PruningPolicy
from tprl_env.rllib.config import (
    OLD_NAMES,
    GrpoSettings,
    Limits,
    PolicySettings,
    TrainConfig,
    load_config,
    policy_config,
    scorer_spec,
)
from tprl_env.rllib.config.algorithm import SETTINGS
from tprl_env.rllib.config.values import type_hints
from tprl_env.rllib.rollout.module import load_policy
from tprl_env.rllib.run.folder import Progress, RunFolder

PRESETS = ("recommended", "ppo", "paper", "bernoulli_count", "mean_query", "smoke", "grpo", "mapo")


# The presets before the config was nested, as their runs' config.json held them.
OLD_RUNS = json.loads((Path(__file__).parent / "old_configs.json").read_text())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("algorithm.gae_lamda", r"no field 'algorithm\.gae_lamda'; did you mean 'algorithm\.gae_l"),
        ("policy.widht", r"no field 'policy\.widht'; did you mean 'policy\.width'"),
        ("width", r"no field 'width'; it is now 'policy\.width'"),
        ("lfd_steps", r"no field 'lfd_steps'; it is now 'imitation\.steps'"),
        ("metric", r"no field 'metric'; it is now 'rules\.score_kind'"),
        ("seed.x", r"no field 'seed\.x'"),
        ("replace.x", r"no field 'replace\.x'"),
    ],
)
def test_an_unknown_field_names_its_neighbours_or_its_new_name(name, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig().replace(**{name: 1})


def test_every_old_name_has_a_new_one():
    for name in OLD_RUNS["ppo"]:
        if name not in ("source", "lvlm", "seed", "algorithm"):
            with pytest.raises(ValueError, match=f"no field '{name}'; it is now '"):
                TrainConfig().replace(**{name: 1})
    known = set().union(*(TrainConfig().replace(algorithm=name).flat() for name in SETTINGS))
    assert set(OLD_NAMES.values()) == known - {"source", "lvlm", "seed"}


@pytest.mark.parametrize("name", OLD_RUNS)
def test_an_old_runs_flat_config_is_the_preset_of_today(name):
    old, config = OLD_RUNS[name], load_config(name)
    assert TrainConfig.from_dict(old) == config
    today = json.loads(json.dumps(config.flat()))
    found = {OLD_NAMES.get(key, key): value for key, value in old.items()}
    assert len(old) == 89
    assert {key: found[key] for key in today} == today
    unread = {OLD_NAMES[key] for key in old if OLD_NAMES.get(key, key) not in today}
    assert all(key.startswith("algorithm.") for key in unread)


def test_an_old_run_can_be_resumed(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(OLD_RUNS["smoke"]))
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match="another shape"):
        folder.begin(load_config("smoke", {"policy.layers": 2}), resume=True)
    folder.begin(load_config("smoke"), resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["policy"]["width"] == 32


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("algorithm.lr", "3e-4", 3e-4),
        ("algorithm.epochs", "4", 4),
        ("rules.budget", "4,20", (4, 20)),
        ("rules.budget", "(4, 20)", (4, 20)),
        ("rules.budget", "14", 14),
        ("rules.budget", "0.25", 0.25),
        ("rules.budget", "0.1,0.5", (0.1, 0.5)),
        ("limits.max_scores", "1e5", 100_000),
        ("limits.max_scores", "none", None),
        ("policy.width", "none", None),
        ("policy.query_norm", "none", "none"),
        ("imitation.demonstrator", "none", "none"),
        ("rollout.shared_budget", "true", True),
        ("resources.scorer_resources", '{"scorer": 1}', {"scorer": 1}),
    ],
)
def test_strings_become_the_fields_types(name, text, value):
    assert TrainConfig().replace(**{name: text}).flat()[name] == value


def test_another_algorithm_keeps_what_both_have():
    config = TrainConfig().replace(**{"algorithm.lr": 0.5, "algorithm.gae_lambda": 0.5})
    for name, kind in SETTINGS.items():
        for change in ({"algorithm": name}, {"algorithm.name": name}, {"algorithm": kind(lr=0.5)}):
            other = config.replace(**change, **{"algorithm.clip": 0.3}).algorithm
            assert type(other) is kind and (other.name, other.lr, other.clip) == (name, 0.5, 0.3)
    assert config.replace(algorithm="ppo").algorithm.gae_lambda == 0.5
    both = config.replace(**{"algorithm": "grpo", "algorithm.kl_coefficient": "0.1"})
    assert both.algorithm == GrpoSettings(lr=0.5, kl_coefficient=0.1)


def test_parts_check_themselves_and_can_be_replaced_whole():
    limits = Limits(iterations=3)
    config = TrainConfig().replace(**{"limits": limits, "limits.report_every": 2})
    assert config.limits == Limits(iterations=3, report_every=2)
    with pytest.raises(ValueError, match=r"^width must be at least 1, got 0"):
        PolicySettings(width=0)
    with pytest.raises(ValueError, match=r"^policy\.width must be at least 1, got 0"):
        TrainConfig().replace(**{"policy.width": 0})
    with pytest.raises(ValueError, match="limits must be Limits, got 3"):
        TrainConfig(limits=3)


def test_the_policys_choices_are_the_networks():
    theirs = {name: set(get_args(hint)) for name, hint in type_hints(PolicyConfig).items()}
    ours = {name: set(get_args(hint)) for name, hint in type_hints(PolicySettings).items()}
    for name in ("architecture", "fusion", "query_norm"):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm.lr": "fast"}, r"algorithm\.lr must be float, got 'fast'"),
        ({"algorithm.epochs": "2.5"}, r"algorithm\.epochs must be int"),
        ({"algorithm.epochs": 0}, r"algorithm\.epochs must be at least 1"),
        ({"seed": None}, "seed must not be None"),
        ({"algorithm.lr": 0.0}, r"algorithm\.lr must be positive"),
        ({"algorithm.gamma": 1.5}, r"algorithm\.gamma must lie in \(0, 1\]"),
        ({"policy.distribution": "exakt"}, "did you mean 'exact'"),
        (
            {"algorithm.ratio": "token"},
            r"ratio='token' has no meaning for policy\.distribution='exact'",
        ),
        ({"rules.budget": None}, r"needs rules\.budget="),
        ({"policy.heads": 5}, r"policy\.heads=5 must divide the width 64"),
        ({"rules.max_steps": 0}, r"rules\.max_steps must be an integer of at least 1"),
        ({"rollout.rounds": 3}, r"rollout\.rounds=3 must divide samples=32"),
        ({"rollout.draws": 1, "rollout.group_baseline": True}, "draws of at least 2"),
        ({"resources.num_env_runners": 3}, r"resources\.num_env_runners=3 must divide"),
        ({"algorithm.count_loss": 0.3}, r"count_loss needs policy\.distribution='bernoulli'"),
        (
            {"resources.num_learners": 2, "rules.max_steps": 3, "policy.distribution": "bernoulli"},
            r"num_learners > 1 needs algorithm\.minibatch_size",
        ),
        ({"algorithm": "grpo0"}, "did you mean 'grpo'"),
        ({"algorithm": "grpo", "rollout.draws": 1}, "draws must be at least 2"),
        ({"algorithm": "grpo", "rollout.runner": "default"}, r"needs rollout\.runner='fast'"),
        ({"algorithm": "grpo", "rules.reward_batch_size": 32}, r"needs rules\.reward_batch_size=1"),
        ({"algorithm": "grpo", "rollout.group_baseline": True}, "group_baseline has no meaning"),
        (
            {"algorithm": "mapo", "rollout.count_regression_baseline": True},
            "count_regression_baseline is not defined",
        ),
        ({"algorithm": "mapo", "resources.num_learners": 2}, r"needs algorithm\.minibatch_size"),
        ({"algorithm.kl_coefficient": 0.1}, "kl_coefficient applies to algorithm='grpo' only"),
        (
            {"algorithm": "grpo", "algorithm.memory_size": 9},
            "memory_size applies to algorithm='mapo' only",
        ),
        (
            {"algorithm": "mapo", "algorithm.memory_limit": 3},
            "memory_limit=3 must be at least memory_size=4",
        ),
        (
            {"algorithm": "mapo", "algorithm.memory_weight": 1.0},
            r"memory_weight must lie in \[0, 1\)",
        ),
        ({"rollout.shared_budget": True, "rollout.fixed_budgets": True}, "exclude each other"),
        ({"rules.budget": "0.5,8"}, "budget must be"),
        ({"rules.budget": 0.2, "rules.min_tokens": 1}, "below the smallest budget 1"),
        ({"rules.min_tokens": 6}, r"rules\.min_tokens must be below the smallest budget"),
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
    ppo = load_config("ppo").flat()
    for name in ("grpo", "mapo"):
        other = load_config(name).flat()
        different = {field for field in other if field in ppo and other[field] != ppo[field]}
        fixed = {"rollout.fixed_budgets"} if name == "mapo" else set()
        assert different == {"algorithm.name"} | fixed


def test_the_paper_preset_is_the_papers():
    config = load_config("paper")
    rules, algorithm = config.rules, config.algorithm
    assert (rules.max_steps, config.policy.discount, algorithm.ratio) == (3, 0.5, "joint")
    assert (rules.alpha, rules.beta, rules.score_kind) == (1.0, 0.1, "exact")
    assert (algorithm.gamma, algorithm.gae_lambda) == (0.99, 0.95)
    assert (algorithm.value_coefficient, algorithm.entropy, algorithm.clip) == (0.5, 0.01, 0.2)
    assert (algorithm.lr, algorithm.epochs) == (1e-5, 4)
    assert config.imitation.demonstrator == "vispruner"
    policy = policy_config(config, open_source("toy"))
    assert policy == PolicyConfig(token_width=8, query_width=8, trained_steps=3)


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
    text = "from tprl_env.rllib.config import TrainConfig\nCONFIG = TrainConfig(seed=25)\n"
    (tmp_path / "mine.py").write_text(text)
    assert load_config(str(tmp_path / "mine.py")).seed == 25


def test_missing_source_or_lvlm_say_what_to_pass():
    with pytest.raises(ValueError, match="pass source=STORE"):
        scorer_spec(load_config("recommended"))
    with pytest.raises(ValueError, match="pass lvlm=LVLM"):
        scorer_spec(load_config("recommended", {"source": "store"}))


def test_a_folder_is_not_overwritten_and_not_resumed_with_another_policy(tmp_path: Path):
    config = load_config("smoke")
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=r"no run in .* to resume"):
        folder.begin(config, resume=True)
    folder.begin(config, resume=False)
    with pytest.raises(ValueError, match="holds a run already"):
        folder.begin(config, resume=False)
    with pytest.raises(ValueError, match=r"another shape \(policy\.width 32, now 64\)"):
        folder.begin(config.replace(**{"policy.width": 64}), resume=True)
    folder.begin(config.replace(**{"algorithm.lr": 1e-4, "limits.iterations": 50}), resume=True)
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [entry["resume"] for entry in starts] == [False, True]
    assert "ray" in starts[0]["versions"] and starts[0]["seed"] == 0


def test_checkpoints_are_whole_or_absent_and_the_oldest_go(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.begin(load_config("smoke"), resume=False)
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
        config = load_config("smoke", {"rules.max_steps": steps})
        PruningPolicy(policy_config(config, source)).save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        assert saved["trained_steps"] == steps and "max_steps" not in saved
    fields = {"rules.max_steps": 2, "policy.step_input": True}
    shown = policy_config(load_config("smoke", fields), source)
    assert (shown.max_steps, shown.trained_steps) == (2, 2)
