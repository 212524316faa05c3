"""``tprl compare``: every run of an experiment through Ray Tune, each measured on the test split.

    experiment.json          what was asked and where its runs are; another experiment is refused
    data/                    stores of the built-in tasks
    imitation/<key>/         policies after imitation, shared by the arms that start from it
    runs/<key>/{train/, learning_curve.jsonl, record.json}
    references/<key>.json    untrained pruners on the test split
    tune/                    Ray Tune's own folder: logs, TensorBoard
    results.parquet, curves.parquet, tables.md, *.png

Keys are hashes of everything a run depends on, so experiments may share the middle four folders
and no run is done twice. A run is finished when its ``record.json`` is there; an interrupted
experiment resumes the others, each from its newest complete checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune

from tprl_env.evaluation.contenders import measure_references
from tprl_env.evaluation.experiment_tables import check_experiment, write_tables
from tprl_env.files import write_json
from tprl_env.ray_session import ray_session
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.experiments.definition import Experiment, Trial
from tprl_env.rllib.experiments.places import ExperimentPaths, TaskData, experiment_data
from tprl_env.rllib.experiments.trial import run_imitation, run_trial
from tprl_env.rllib.run.placement import actor_cpus

__all__ = ["compare", "trial_resources"]


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
        RuntimeError: A run failed; the same command resumes it.
    """
    folder = Path(out).resolve()
    common = Path(shared).resolve() if shared else folder
    definition = experiment.as_dict()
    begin_folder(definition, folder)
    data = experiment_data(experiment, common / "data", stores)
    fingerprints = {name: stores_.fingerprints() for name, stores_ in data.items()}
    place = ExperimentPaths(str(common), data, fingerprints, experiment.budgets)
    trials = experiment.trials()
    places = {
        "runs": {trial.name: os.path.relpath(place.run(trial), folder) for trial in trials},
        "references": {
            task: os.path.relpath(place.references(task), folder) for task in experiment.tasks
        },
    }
    begin_folder(definition | places, folder)
    missing = [trial for trial in trials if not (place.run(trial) / "record.json").is_file()]
    print(f"{len(missing)} of {len(trials)} runs of {experiment.name} are left", flush=True)
    if missing:
        with ray_session(actor_cpus(place.config(missing[0]))):
            imitate_all(place, missing)
            run_trials(place, experiment.name, missing, folder / "tune", concurrent, callbacks)
    for task in experiment.tasks:
        own = place.any_task_data(task)
        measure_references(own.lvlm, own.test, experiment.budgets, place.references(task))
    return write_tables(folder)


def begin_folder(definition: Mapping[str, Any], folder: Path) -> None:
    """Claim a folder for an experiment, or check that it is this one's.

    Raises:
        ValueError: It holds another experiment, or an older definition of this one.
    """
    path = folder / "experiment.json"
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        both = definition.keys() & found.keys() | definition.keys() - {"runs", "references"}
        check_experiment(
            {name: value for name, value in found.items() if name in definition},
            {name: definition[name] for name in both},
            folder,
        )
        definition = {**found, **definition}
    write_json(path, definition)


def imitate_all(place: ExperimentPaths, trials: Sequence[Trial]) -> None:
    """Every imitation that trials start from, once, as Ray tasks side by side."""
    wanted = {}
    for trial in trials:
        folder = place.imitation(trial)
        if folder is not None and not (folder / "measured.json").is_file():
            wanted[folder] = trial
    if wanted:
        print(f"imitating demonstrators: {len(wanted)} policies", flush=True)
    task = ray.remote(num_cpus=1, max_retries=2)(run_imitation)
    ray.get([task.remote(place, trial, folder) for folder, trial in wanted.items()])


def trial_resources(config: TrainConfig) -> tune.PlacementGroupFactory:
    """What one run needs: a CPU for the driver, and a bundle for each of its actors."""
    wanted = config.resources
    scorer = {"CPU": wanted.scorer_cpus, "GPU": wanted.scorer_gpus, **wanted.scorer_resources}
    learner = {"CPU": 1.0, "GPU": wanted.gpus_per_learner}
    bundles = [{"CPU": 1.0}]
    bundles += [{k: v for k, v in scorer.items() if v}] * wanted.num_scorers
    bundles += [{"CPU": 1.0}] * wanted.num_env_runners
    bundles += [{k: v for k, v in learner.items() if v}] * wanted.num_learners
    return tune.PlacementGroupFactory([bundle for bundle in bundles if bundle])


def run_trials(
    place: ExperimentPaths,
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
                f"{str(results.errors[0]).strip().splitlines()[-1]}; the same command resumes "
                "the missing runs"
            )


def _tune_trial(
    tuned: Mapping[str, Any], place: ExperimentPaths, trials: Mapping[str, Trial]
) -> None:
    """What Ray Tune runs: one trial, reporting each point of its learning curve."""
    run_trial(place, trials[tuned["trial"]])
