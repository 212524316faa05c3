"""Hyper-parameter search of one algorithm with Ray Tune's ASHA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.learning_curve import LearningCurve, curve_hook
from tprl_env.files import write_json
from tprl_env.lvlm import load_lvlm
from tprl_env.ray_session import ray_session
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.experiments.compare import trial_resources
from tprl_env.rllib.experiments.definition import Search
from tprl_env.rllib.experiments.places import TaskData, builtin_data
from tprl_env.rllib.experiments.trial import CURVE_QUESTIONS, reporting_hook
from tprl_env.rllib.run.placement import actor_cpus
from tprl_env.rllib.run.train import train
from tprl_env.scoring import local_scorer

__all__ = ["search"]


def search(
    search_: Search,
    out: str | Path,
    *,
    shared: str | Path | None = None,
    stores: TaskData | None = None,
    concurrent: int | None = None,
    callbacks: Sequence[Any] = (),
) -> Path:
    """Draw settings, stop the worse ones early, and write all of them best first.

    Args:
        search_: What to search.
        out: Folder of the search; an unfinished one in it is resumed.
        shared: Folder of the built-in tasks' stores, by default ``out``.
        stores: Your own stores and LVLM instead.
        concurrent: Runs at the same time; by default as many as the cluster holds.
        callbacks: Ray Tune callbacks, such as loggers.

    Returns:
        ``search.json``: drawn settings, scores used and accuracies.

    Raises:
        ValueError: The folder holds a finished search.
        RuntimeError: A run failed.
    """
    folder = Path(out).resolve()
    table = folder / "search.json"
    if table.is_file():
        raise ValueError(f"{folder} holds a finished search; choose another out")
    root = (Path(shared).resolve() if shared else folder) / "data"
    place = stores or builtin_data(search_, search_.task, 64, root, 12)
    first = search_.config({}).replace(source=place.train, lvlm=place.lvlm)
    with ray_session(actor_cpus(first)):
        results = _tuner(search_, first, place.calibration, folder, concurrent, callbacks).fit()
    if results.errors:
        raise RuntimeError(
            f"{len(results.errors)} of {len(results)} runs failed, the first with: "
            f"{str(results.errors[0]).strip().splitlines()[-1]}; the same command resumes it"
        )
    metric = f"accuracy_{search_.budget}"
    tried = [
        {"settings": result.config, **{k: result.metrics[k] for k in ("scores", metric)}}
        for result in results
        if result.metrics and result.config is not None
    ]
    tried.sort(key=lambda row: (-row["scores"], -row[metric]))
    write_json(table, {"name": search_.name, "question": search_.question, "tried": tried})
    return table


def _tuner(
    search_: Search,
    base: TrainConfig,
    calibration: str,
    folder: Path,
    concurrent: int | None,
    callbacks: Sequence[Any],
) -> tune.Tuner:
    """A new tuner, or the one whose unfinished state the folder holds."""
    trainable = tune.with_resources(
        tune.with_parameters(_tune_search, base=base.as_dict(), calibration=calibration),
        trial_resources(base),
    )
    storage = folder / "tune"
    if tune.Tuner.can_restore(str(storage / search_.name)):
        return tune.Tuner.restore(
            str(storage / search_.name),
            trainable=trainable,
            restart_errored=True,
            param_space=dict(search_.space),
        )
    scheduler = ASHAScheduler(
        time_attr="scores",
        metric=f"accuracy_{search_.budget}",
        mode="max",
        max_t=search_.max_scores,
        grace_period=search_.grace_scores,
        reduction_factor=search_.reduction,
    )
    return tune.Tuner(
        trainable,
        param_space=dict(search_.space),
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            num_samples=search_.trials,
            max_concurrent_trials=concurrent,
            trial_dirname_creator=lambda trial: f"draw_{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=search_.name,
            storage_path=str(storage),
            failure_config=tune.FailureConfig(max_failures=2),
            callbacks=list(callbacks) or None,
            verbose=1,
        ),
    )


def _tune_search(drawn: Mapping[str, Any], base: Mapping[str, Any], calibration: str) -> None:
    """One draw: imitate, train, report the calibration accuracy eight times."""
    config = TrainConfig.from_dict(base).replace(**drawn)
    folder = Path(tune.get_context().get_trial_dir())
    held_out = FeatureStore.open(calibration)
    lvlm = load_lvlm(config.lvlm, device=config.scoring.device, dtype=config.scoring.dtype)
    scorer = local_scorer(lvlm, held_out)
    path, steps = folder / "learning_curve.jsonl", config.rules.max_steps
    curve = LearningCurve(path, held_out, scorer, CURVE_QUESTIONS, steps)
    begun = (folder / "train" / "config.json").is_file()
    hook = reporting_hook(curve, curve_hook(curve, None, config.limits.max_scores or 1))
    train(config, folder / "train", resume=begun, progress=False, on_iteration=hook)
