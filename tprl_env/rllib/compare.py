"""``tprl compare``: every run of an experiment through Ray Tune, each measured on the test split.

    experiment.json          what was asked and where its runs are; another experiment is refused
    data/                    stores of the built-in tasks
    imitation/<key>/         policies after imitation, shared by the arms that start from it
    runs/<key>/{train/, learning_curve.jsonl, record.json}
    tune/                    Ray Tune's own folder: logs, TensorBoard
    results.parquet, curves.parquet, tables.md, *.png

Keys are hashes of everything a run depends on, so experiments may share the middle three folders
and no run is ever done twice. A run is finished when its ``record.json`` is there; an interrupted
experiment goes on with the others, each from its newest whole checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import tune

from tprl_env.comparison import tune_penalty
from tprl_env.evaluate import evaluate_method
from tprl_env.experiment_tables import check_experiment, write_tables
from tprl_env.features import FeatureStore
from tprl_env.learning_curve import LearningCurve, curve_hook, local_scorer
from tprl_env.lvlm import load_lvlm
from tprl_env.policy import PruningPolicy
from tprl_env.pruners import PolicyPruner
from tprl_env.quickstart import QuickstartSettings, Stopwatch, all_threads, encode_all
from tprl_env.results import versions, write_json
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.experiment import Experiment, Search, Trial, imitation_key, run_key
from tprl_env.rllib.train import ray_session, train
from tprl_env.rllib.warmup import imitate
from tprl_env.scoring import Scorer

__all__ = ["Place", "TaskData", "compare", "trial_resources"]

CURVE_QUESTIONS = 200
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


@dataclass(frozen=True)
class Place:
    """Where trials find their data, and where they write.

    Attributes:
        shared: Folder of imitations and runs, absolute.
        data: ``"task/width"`` to stores.
        prints: The same to the stores' and the LVLM's fingerprints.
        budgets: Token counts to evaluate at.
    """

    shared: str
    data: Mapping[str, TaskData]
    prints: Mapping[str, Mapping[str, str]]
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
        return run_key(trial, self.prints[f"{trial.task}/{trial.code_width}"], self.budgets)

    def run(self, trial: Trial) -> Path:
        """Folder of the trial's run."""
        return Path(self.shared) / "runs" / self.key(trial)

    def imitation(self, trial: Trial) -> Path | None:
        """Folder of the imitation that the trial starts from, None without one."""
        prints = self.prints[f"{trial.task}/{trial.code_width}"]
        key = imitation_key(trial.config, prints)
        return None if key is None else Path(self.shared) / "imitation" / key


def builtin_data(
    spec: Experiment | Search, task: str, code_width: int, root: Path, test_questions: int
) -> TaskData:
    """Stores of a built-in task, encoded where they are missing."""
    name = (
        f"{task}-width{code_width}-{spec.train_questions}-{spec.calibration_questions}-"
        f"{test_questions}-seed{spec.data_seed}"
    )
    settings = QuickstartSettings(
        task=task,
        out=root / name,
        seed=spec.data_seed,
        train_questions=spec.train_questions,
        calibration_questions=spec.calibration_questions,
        test_questions=test_questions,
        code_width=code_width,
    )
    lvlm = f"builtin:{task}"
    with all_threads():
        stores = encode_all(settings, load_lvlm(lvlm), Stopwatch())
    return TaskData(lvlm, *(str(stores[split].path.resolve()) for split in SPLITS))


def compare(
    experiment: Experiment,
    out: str | Path,
    *,
    shared: str | Path | None = None,
    stores: TaskData | None = None,
    concurrent: int | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Run what is missing of an experiment, then write its tables and plots.

    Args:
        experiment: What to run.
        out: Folder of the experiment.
        shared: Folder of stores, imitations and runs, by default ``out``; give several
            experiments the same one and they do nothing twice (one at a time).
        stores: Your own stores and LVLM instead of the built-in tasks; needs one task.
        concurrent: Runs at the same time; by default as many as the cluster holds.
        callbacks: Ray Tune callbacks, such as loggers.

    Returns:
        The folder, with ``results.parquet``, ``curves.parquet``, ``tables.md`` and plots.

    Raises:
        ValueError: The folder holds another experiment, or its runs cannot be compared.
        RuntimeError: A run failed; the same command goes on with it.
    """
    folder = Path(out).resolve()
    common = Path(shared).resolve() if shared else folder
    definition = experiment.as_dict()
    begin_folder(definition, folder)
    data = _data(experiment, common / "data", stores)
    place = Place(
        str(common), data, {k: _fingerprints(v) for k, v in data.items()}, experiment.budgets
    )
    trials = experiment.trials()
    runs = {trial.name: os.path.relpath(place.run(trial), folder) for trial in trials}
    begin_folder(definition | {"runs": runs}, folder)
    missing = [trial for trial in trials if not (place.run(trial) / "record.json").is_file()]
    print(f"{len(missing)} of {len(trials)} runs of {experiment.name} are left", flush=True)
    if missing:
        with ray_session(place.config(missing[0])):
            imitate_all(place, missing)
            run_trials(place, experiment.name, missing, folder / "tune", concurrent, callbacks)
    return write_tables(folder)


def begin_folder(definition: Mapping[str, Any], folder: Path) -> None:
    """Claim a folder for an experiment, or check that it is this one's.

    Raises:
        ValueError: It holds another experiment, or an older definition of this one.
    """
    path = folder / "experiment.json"
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        names = definition if "runs" in found else definition.keys() - {"runs"}
        check_experiment(
            {name: value for name, value in found.items() if name in definition},
            {name: definition[name] for name in names},
            folder,
        )
        definition = {**found, **definition}
    write_json(path, definition)


def _fingerprints(data: TaskData) -> dict[str, str]:
    """What tells two sets of stores apart; the LVLM's fingerprint is in its stores' manifests."""
    return {split: FeatureStore.open(getattr(data, split)).fingerprint for split in SPLITS}


def _data(experiment: Experiment, root: Path, stores: TaskData | None) -> dict[str, TaskData]:
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
    return {f"{needed[0][0]}/{width}": stores}


def imitate_all(place: Place, trials: Sequence[Trial]) -> None:
    """Every imitation that trials start from, once, as Ray tasks side by side."""
    wanted = {}
    for trial in trials:
        folder = place.imitation(trial)
        if folder is not None and not (folder / "measured.json").is_file():
            wanted[folder] = trial
    if wanted:
        print(f"imitating demonstrators: {len(wanted)} policies", flush=True)
    task = ray.remote(num_cpus=1, max_retries=2)(_imitate)
    ray.get([task.remote(place, trial, folder) for folder, trial in wanted.items()])


def _imitate(place: Place, trial: Trial, folder: Path) -> None:
    """One imitation and its accuracy; ``measured.json`` is written last."""
    config = place.config(trial)
    report = imitate(config, FeatureStore.open(config.source), folder)
    measured = _measure(PolicyPruner.from_pretrained(folder).policy, place, trial)
    seconds, agreement = round(report.seconds, 1), round(report.agreement, 4)
    write_json(folder / "measured.json", {**measured, "seconds": seconds, "agreement": agreement})


def trial_resources(config: TrainConfig) -> tune.PlacementGroupFactory:
    """What one run needs: a CPU for the driver, and a bundle for each of its actors."""
    scorer = {"CPU": config.scorer_cpus, "GPU": config.scorer_gpus, **config.scorer_resources}
    learner = {"CPU": 1.0, "GPU": config.gpus_per_learner}
    bundles = [{"CPU": 1.0}]
    bundles += [{k: v for k, v in scorer.items() if v}] * config.num_scorers
    bundles += [{"CPU": 1.0}] * config.num_env_runners
    bundles += [{k: v for k, v in learner.items() if v}] * config.num_learners
    return tune.PlacementGroupFactory([bundle for bundle in bundles if bundle])


def run_trials(
    place: Place,
    name: str,
    trials: Sequence[Trial],
    storage: Path,
    concurrent: int | None,
    callbacks: Sequence[Any],
) -> None:
    """Run trials with Ray Tune, all of equal resources side by side.

    Raises:
        RuntimeError: A run failed three times.
    """
    once = {place.key(trial): trial for trial in trials}  # two arms may be the same run
    groups: dict[str, list[str]] = {}
    for trial in once.values():
        bundles = json.dumps(trial_resources(trial.config).bundles)
        groups.setdefault(bundles, []).append(trial.name)
    by_name = {trial.name: trial for trial in once.values()}
    for names in groups.values():
        tuner = tune.Tuner(
            tune.with_resources(
                tune.with_parameters(_tune_trial, place=place, trials=by_name),
                trial_resources(by_name[names[0]].config),
            ),
            param_space={"trial": tune.grid_search(names)},
            tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
            run_config=tune.RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=tune.FailureConfig(max_failures=2),
                callbacks=list(callbacks) or None,
                verbose=1,
            ),
        )
        results = tuner.fit()
        if results.errors:
            raise RuntimeError(
                f"{len(results.errors)} of {len(names)} runs failed, the first with: "
                f"{str(results.errors[0]).strip().splitlines()[-1]}; the same command goes on with "
                "what is missing"
            )


def _tune_trial(tuned: Mapping[str, Any], place: Place, trials: Mapping[str, Trial]) -> None:
    """What Ray Tune runs: one trial, reporting each point of its learning curve."""
    run_trial(place, trials[tuned["trial"]])


def run_trial(place: Place, trial: Trial) -> None:
    """Train and measure one run; ``record.json`` is written last."""
    folder, start = place.run(trial), place.imitation(trial)
    if (folder / "record.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = place.config(trial)
    held_out, scorer = _open(place, trial, "calibration")
    curve = LearningCurve(folder / "learning_curve.jsonl", held_out, scorer, CURVE_QUESTIONS)
    before = None if start is None else PolicyPruner.from_pretrained(start).policy
    hook = reporting_hook(curve, curve_hook(curve, before, config.max_scores or 1))
    result = train(
        config,
        folder / "train",
        resume=(folder / "train" / "config.json").is_file(),
        init_policy=start,
        progress=False,
        on_iteration=hook,
    )
    measured = _measure(PolicyPruner.from_pretrained(result.policy_path).policy, place, trial)
    record = {
        "key": place.key(trial),
        "algorithm": config.algorithm,
        "seed": trial.seed,
        "lvlm_scores": result.progress.scores,
        "scores_per_iteration": config.samples * config.draws * config.max_steps,
        "env_steps": result.progress.env_steps,
        "seconds": round(result.progress.seconds, 1),
        "policy": measured,
        "imitation": None if start is None else json.loads((start / "measured.json").read_text()),
        "curve": curve.points(),
        "config": config.as_dict(),
        "versions": versions(),
    }
    write_json(folder / "record.json", record)


def reporting_hook(curve: LearningCurve, measure: Any) -> Any:
    """An ``on_iteration`` that reports each new point of a learning curve to Ray Tune."""

    def hook(row: Mapping[str, Any], policy: PruningPolicy) -> None:
        before = len(curve.points())
        measure(row, policy)
        points = curve.points()
        if len(points) > before:
            names = ("scores", "mean_return", "score", "kept", "scores_per_second", "busy_share")
            accuracy = {f"accuracy_{k}": v for k, v in points[-1]["accuracy"].items()}
            tune.report({**{name: row[name] for name in names}, **accuracy})

    return hook


def _open(place: Place, trial: Trial, split: str) -> tuple[FeatureStore, Scorer]:
    """A store of the trial's task and an exact-match scorer for it."""
    data, config = place.task(trial), trial.config
    store = FeatureStore.open(getattr(data, split))
    lvlm = load_lvlm(data.lvlm, device=config.scorer_device, dtype=config.scorer_dtype)
    return store, local_scorer(lvlm, store)


def _measure(policy: PruningPolicy, place: Place, trial: Trial) -> dict[str, Any]:
    """Accuracy on the test split at every budget, penalty chosen on the calibration split."""
    held_out, held_out_scorer = _open(place, trial, "calibration")
    test, scorer = _open(place, trial, "test")
    budgets = [budget for budget in place.budgets if budget <= test.max_tokens]
    pruner = tune_penalty(policy, held_out, held_out_scorer, budgets, CURVE_QUESTIONS)
    samples = np.arange(len(test), dtype=np.int64)
    rows = [evaluate_method("policy", pruner, test, scorer, b, samples) for b in budgets]
    return {
        "redundancy_penalty": pruner.redundancy_penalty,
        "full_accuracy": float(np.asarray(test.full_scores("exact")).mean()),
        "questions": len(test),
        "budgets": [row.as_dict() for row in rows],
    }
