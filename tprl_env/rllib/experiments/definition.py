"""Experiments: arms of one training config, seeds, and an equal number of LVLM scores.

Files of ``rllib_configs/experiments/`` define ``EXPERIMENT = Experiment(...)`` (run to the end, no
early stopping, compared over seeds) or ``SEARCH = Search(...)`` (Ray Tune's ASHA).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tprl_env.checks import did_you_mean
from tprl_env.rllib.config import TrainConfig, load_config, load_definitions, policy_fields

__all__ = [
    "Arm",
    "Experiment",
    "Search",
    "Trial",
    "content_key",
    "imitation_key",
    "load_experiment",
    "run_key",
]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
# What imitation depends on besides the policy's shape and the samples.
_IMITATION_FIELDS = (
    "seed", "rules.budget", "algorithm.count_target", "policy.distribution",
    "imitation.demonstrator", "imitation.steps", "imitation.batch_size", "imitation.lr",
    "imitation.class_weights",
)  # fmt: skip
_LIMITS = ("limits.max_scores", "limits.iterations", "limits.max_seconds")


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
        changes: Settings that differ from the preset's, by name (``{"policy.width": 32}``).
        preset: Config file instead of the experiment's.
        code_width: Width of the token codes that the policy reads.
    """

    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    preset: str | None = None
    code_width: int = 64

    def as_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {**asdict(replace(self, changes={})), "changes": dict(self.changes)}


@dataclass(frozen=True)
class Trial:
    """One training run of an experiment.

    Attributes:
        task: Data it runs on.
        arm: Name of its arm.
        seed: Its seed.
        config: The whole config, without source and LVLM.
        code_width: Of the codes it reads.
    """

    task: str
    arm: str
    seed: int
    config: TrainConfig
    code_width: int

    @property
    def name(self) -> str:
        """Unique in its experiment."""
        return f"{self.task}/{self.arm}/seed-{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """Arms x seeds x tasks at an equal number of LVLM scores.

    Attributes:
        name: Short, for files and tables.
        question: What it asks, and of which table or figure, in one or two sentences.
        arms: Name to arm; the first is what the others are compared with.
        tasks: ``"crowded"``, ``"sparse"``: the built-in LVLMs.
        preset: Config that arms change.
        changes: Settings that all arms change, by name.
        seeds: Each is one training run per arm and task.
        max_scores: LVLM scores of every run.
        budgets: Token counts to evaluate at.
        train_questions: Size of the training split.
        calibration_questions: Size of the split for curves and redundancy penalties.
        test_questions: Size of the test split.
        data_seed: Seed of the three splits.
    """

    name: str
    question: str
    arms: Mapping[str, Arm]
    tasks: tuple[str, ...] = ("crowded",)
    preset: str = "ppo"
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_scores: int = 25_000
    budgets: tuple[int, ...] = (48, 29, 14, 7, 4)
    train_questions: int = 6000
    calibration_questions: int = 600
    test_questions: int = 1800
    data_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be compared.

        Raises:
            ValueError: Naming the field.
        """
        for name in (self.name, *self.arms, *self.tasks):
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"names of experiments, arms and tasks become folders: expected lower-case "
                    f"letters, digits, '.', '_' or '-', got {name!r}"
                )
        if not self.arms or not self.tasks or not self.seeds or not self.budgets:
            raise ValueError(f"experiment {self.name!r} needs arms, tasks, seeds and budgets")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"experiment {self.name!r} counts a seed twice: {self.seeds}")
        for arm in ("", *self.arms):
            given = {**self.changes, **(self.arms[arm].changes if arm else {})}
            fixed = {"seed", "source", "lvlm", "limits", *_LIMITS} & {*given}
            if fixed:
                raise ValueError(
                    f"experiment {self.name!r} sets {', '.join(sorted(fixed))} itself; an arm may "
                    "not, because all arms must use the same data, seeds and number of scores"
                )
        self.trials()

    def trials(self) -> list[Trial]:
        """Every run, seeds outermost so that an interrupted experiment has whole seeds."""
        return [
            Trial(task, name, seed, self._config(arm, seed), arm.code_width)
            for seed in self.seeds
            for task in self.tasks
            for name, arm in self.arms.items()
        ]

    def _config(self, arm: Arm, seed: int) -> TrainConfig:
        changes = {**self.changes, **arm.changes, "seed": seed}
        return load_config(arm.preset or self.preset, changes | _only_scores(self.max_scores))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able definition; two experiments are the same where this is equal."""
        table = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "arms"}
        table["changes"] = dict(self.changes)
        table["arms"] = {name: arm.as_dict() for name, arm in self.arms.items()}
        table["configs"] = {
            name: self._config(arm, self.seeds[0]).as_dict() for name, arm in self.arms.items()
        }
        return dict(json.loads(json.dumps(table)))


@dataclass(frozen=True)
class Search:
    """Hyper-parameter search of one algorithm by asynchronous successive halving (ASHA).

    Runs are stopped early, so a search compares settings of one algorithm, never algorithms.

    Attributes:
        name: Short, for files.
        question: What it looks for.
        space: Settings by name (``"algorithm.lr"``) to Tune's domains (``tune.loguniform`` ...).
        task: ``"crowded"`` or ``"sparse"``.
        preset: Config that is changed.
        changes: Settings that every trial changes, by name.
        trials: Settings to draw.
        max_scores: LVLM scores of a run that is never stopped.
        grace_scores: Scores before a run can be stopped.
        reduction: ASHA's factor: the best 1/reduction of the runs continue at each rung.
        budget: Tokens at which the calibration accuracy ranks the runs.
        seed: Of the draws and of every run.
        train_questions: Size of the training split.
        calibration_questions: Size of the split that ranks.
        data_seed: Seed of the splits.
    """

    name: str
    question: str
    space: Mapping[str, Any]
    task: str = "crowded"
    preset: str = "ppo"
    changes: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    trials: int = 8
    max_scores: int = 20_000
    grace_scores: int = 5_000
    reduction: int = 2
    budget: int = 14
    seed: int = 0
    train_questions: int = 6000
    calibration_questions: int = 600
    data_seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        if not self.space or self.trials < 1:
            raise ValueError(f"search {self.name!r} needs a space and at least one trial")
        if not 0 < self.grace_scores <= self.max_scores:
            raise ValueError(
                f"search {self.name!r} needs 0 < grace_scores <= max_scores, got "
                f"{self.grace_scores} and {self.max_scores}"
            )
        known = self.config({}).flat()
        for name in self.space:
            if name not in known:
                raise ValueError(
                    f"search {self.name!r}: its config has no field {name!r}"
                    f"{did_you_mean(name, known)}"
                )

    def config(self, drawn: Mapping[str, Any]) -> TrainConfig:
        """The config of one draw, without source and LVLM."""
        changes = {**self.changes, **drawn, "seed": self.seed}
        return load_config(self.preset, changes | _only_scores(self.max_scores))


def _only_scores(max_scores: int) -> dict[str, Any]:
    """Changes that let a run end by its number of LVLM scores alone."""
    return {**dict.fromkeys(_LIMITS), "limits.max_scores": max_scores}


def content_key(content: Mapping[str, Any]) -> str:
    """Name for what is defined by JSON-able content: equal content, equal name."""
    text = json.dumps(content, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def imitation_key(config: TrainConfig, stores: Mapping[str, str]) -> str | None:
    """Name of the imitation that a run starts from; equal where the imitation would be equal.

    Args:
        config: The run.
        stores: Fingerprints of its stores and its LVLM.

    Returns:
        None for a run without demonstrations. Arms that share it start from the same weights.
    """
    if config.imitation.demonstrator == "none":
        return None
    flat = config.flat()
    table = {name: flat[name] for name in _IMITATION_FIELDS}
    if config.imitation.demonstrator == "vispruner" and config.rules.budget is None:
        table["algorithm.count_target"] = None  # nested masks at fixed rates
    return content_key(policy_fields(config) | table | {"stores": dict(stores)})


def run_key(trial: Trial, stores: Mapping[str, str], budgets: Sequence[int]) -> str:
    """Name of a run; equal only where another experiment would repeat the very same run."""
    config = trial.config.replace(source="", lvlm="").as_dict()
    return content_key({"config": config, "stores": dict(stores), "budgets": list(budgets)})


def load_experiment(name: str | Path) -> Experiment | Search:
    """The experiment or search of a file.

    Args:
        name: One of ``rllib_configs/experiments/``, or a path to a Python file that defines
            ``EXPERIMENT`` or ``SEARCH``. The file is executed: use files you trust.

    Raises:
        ValueError: For an unknown name, naming the nearest, or a file that defines neither.
    """
    module = load_definitions(name, "experiment", "experiment", "experiments")
    found = getattr(module, "EXPERIMENT", None) or getattr(module, "SEARCH", None)
    if not isinstance(found, Experiment | Search):
        raise ValueError(
            f"{module.__file__!r} must define EXPERIMENT = Experiment(...) or SEARCH = Search(...)"
        )
    return found
