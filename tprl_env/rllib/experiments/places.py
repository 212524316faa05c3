"""Where the runs of an experiment find their stores, and where they write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.builtin_stores import (
    QuickstartSettings,
    Stopwatch,
    all_threads,
    encode_all,
)
from tprl_env.evaluation.measure import check_budgets
from tprl_env.lvlm import load_lvlm
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.experiments.definition import (
    Experiment,
    Search,
    Trial,
    content_key,
    imitation_key,
    run_key,
)

__all__ = ["ExperimentPaths", "TaskData", "builtin_data", "experiment_data"]

SPLITS = ("train", "calibration", "test")


@dataclass(frozen=True)
class TaskData:
    """Stores and LVLM of one task, by path.

    Attributes:
        lvlm: What `tprl_env.lvlm.load_lvlm` opens.
        train: Store to learn on.
        calibration: Store for curves and redundancy penalties.
        test: Store that is reported on.
    """

    lvlm: str
    train: str
    calibration: str
    test: str

    def fingerprints(self) -> dict[str, str]:
        """What tells two sets of stores apart; their manifests name the LVLM's fingerprint."""
        return {split: FeatureStore.open(getattr(self, split)).fingerprint for split in SPLITS}


@dataclass(frozen=True)
class ExperimentPaths:
    """Where trials find their data, and where they write.

    Attributes:
        shared: Folder of imitations and runs, absolute.
        data: ``"task/width"`` to stores.
        fingerprints: The same to the stores' and the LVLM's fingerprints.
        budgets: Token counts to evaluate at.
    """

    shared: str
    data: Mapping[str, TaskData]
    fingerprints: Mapping[str, Mapping[str, str]]
    budgets: tuple[int, ...]

    def task(self, trial: Trial) -> TaskData:
        """Data of a trial."""
        return self.data[f"{trial.task}/{trial.code_width}"]

    def config(self, trial: Trial) -> TrainConfig:
        """The trial's config with its source and LVLM."""
        data = self.task(trial)
        return trial.config.replace(source=data.train, lvlm=data.lvlm)

    def key(self, trial: Trial) -> str:
        """Name of the trial's run."""
        return run_key(trial, self.fingerprints[f"{trial.task}/{trial.code_width}"], self.budgets)

    def run(self, trial: Trial) -> Path:
        """Folder of the trial's run."""
        return Path(self.shared) / "runs" / self.key(trial)

    def imitation(self, trial: Trial) -> Path | None:
        """Folder of the imitation that the trial starts from, None without one."""
        fingerprints = self.fingerprints[f"{trial.task}/{trial.code_width}"]
        key = imitation_key(trial.config, fingerprints)
        return None if key is None else Path(self.shared) / "imitation" / key

    def references(self, task: str) -> Path:
        """File with the untrained pruners of a task; they read no codes, so any width serves."""
        store = FeatureStore.open(self.any_task_data(task).test)
        content = {"test": store.manifest.fingerprint, "budgets": list(self.budgets)}
        return Path(self.shared) / "references" / f"{content_key(content)}.json"

    def any_task_data(self, task: str) -> TaskData:
        """Stores of a task with codes of some width."""
        return next(value for name, value in self.data.items() if name.split("/")[0] == task)


def builtin_data(
    experiment: Experiment | Search, task: str, code_width: int, root: Path, test_questions: int
) -> TaskData:
    """Stores of a built-in task, encoded where they are missing."""
    name = (
        f"{task}-width{code_width}-{experiment.train_questions}-{experiment.calibration_questions}-"
        f"{test_questions}-seed{experiment.data_seed}"
    )
    settings = QuickstartSettings(
        task=task,
        out=root / name,
        seed=experiment.data_seed,
        train_questions=experiment.train_questions,
        calibration_questions=experiment.calibration_questions,
        test_questions=test_questions,
        code_width=code_width,
    )
    lvlm = f"builtin:{task}"
    with all_threads():
        stores = encode_all(settings, load_lvlm(lvlm), Stopwatch())
    return TaskData(lvlm, *(str(stores[split].path.resolve()) for split in SPLITS))


def experiment_data(
    experiment: Experiment, root: Path, stores: TaskData | None
) -> dict[str, TaskData]:
    """Stores of every task and code width that an experiment uses, as ``"task/width"``.

    Args:
        experiment: The experiment.
        root: Folder where the built-in tasks are encoded.
        stores: Stores to use instead of the built-in tasks'.

    Raises:
        ValueError: Your own stores do not fit the experiment, or a budget exceeds their tokens.
    """
    needed = sorted({(trial.task, trial.code_width) for trial in experiment.trials()})
    if stores is None:
        return {
            f"{task}/{width}": builtin_data(
                experiment, task, width, root, experiment.test_questions
            )
            for task, width in needed
        }
    if len(needed) != 1:
        raise ValueError(
            f"experiment {experiment.name!r} uses {len(needed)} tasks or code widths; with your "
            "own stores it must use one of each"
        )
    width = FeatureStore.open(stores.train).code_width
    if width != needed[0][1]:
        raise ValueError(
            f"experiment {experiment.name!r} reads codes of width {needed[0][1]}, {stores.train} "
            f"has {width}; set code_width of its arms"
        )
    check_budgets(experiment.budgets, FeatureStore.open(stores.test).max_tokens)
    return {f"{needed[0][0]}/{width}": stores}
