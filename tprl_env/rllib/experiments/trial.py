"""One run of an experiment: imitate, train, measure on the test split, record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from tprl_env.data.features.store import FeatureStore
from tprl_env.env.scorer import Scorer
from tprl_env.evaluation.contenders import penalties, tune_penalty
from tprl_env.evaluation.learning_curve import LearningCurve, curve_hook
from tprl_env.evaluation.measure import evaluate_method
from tprl_env.files import versions, write_json
from tprl_env.lvlm import load_lvlm
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.experiments.definition import Trial
from tprl_env.rllib.experiments.places import ExperimentPaths
from tprl_env.rllib.run.imitate import MARK, imitate
from tprl_env.rllib.run.train import train
from tprl_env.scoring import local_scorer

__all__ = ["CURVE_QUESTIONS", "reporting_hook", "run_imitation", "run_trial"]

CURVE_QUESTIONS = 200
TUNING_QUESTIONS = 300


def run_imitation(place: ExperimentPaths, trial: Trial, folder: Path) -> None:
    """One imitation, marked by ``imitated.json``, and its accuracy, ``measured.json``."""
    config, done = place.config(trial), folder / MARK
    if not done.is_file():
        imitate(config, FeatureStore.open(config.source), folder)
    measured = _measure(PruningPolicy.from_pretrained(folder), place, trial)
    write_json(folder / "measured.json", {**measured, **json.loads(done.read_text("utf-8"))})


def run_trial(place: ExperimentPaths, trial: Trial) -> None:
    """Train and measure one run; ``record.json`` is written last."""
    folder, start = place.run(trial), place.imitation(trial)
    if (folder / "record.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = place.config(trial)
    held_out, scorer = _open(place, trial, "calibration")
    curve = LearningCurve(
        folder / "learning_curve.jsonl", held_out, scorer, CURVE_QUESTIONS, config.rules.max_steps
    )
    before = None if start is None else PruningPolicy.from_pretrained(start)
    hook = reporting_hook(curve, curve_hook(curve, before, config.limits.max_scores or 1))
    result = train(
        config,
        folder / "train",
        resume=(folder / "train" / "config.json").is_file(),
        init_policy=start,
        progress=False,
        on_iteration=hook,
    )
    measured = _measure(PruningPolicy.from_pretrained(result.policy_path), place, trial)
    record = {
        "key": place.key(trial),
        "algorithm": config.algorithm.name,
        "seed": trial.seed,
        "lvlm_scores": result.progress.scores,
        "scores_per_iteration": config.rollout.episodes * config.rules.max_steps,
        "env_steps": result.progress.env_steps,
        "seconds": round(result.progress.seconds, 1),
        "resumed": result.progress.resumed,
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
        measure(row, policy)
        points = curve.points()
        if points and points[-1]["lvlm_scores"] == int(row["scores"]):
            names = ("scores", "mean_return", "score", "kept", "scores_per_second", "busy_share")
            accuracy = {f"accuracy_{k}": v for k, v in points[-1]["accuracy"].items()}
            tune.report({**{name: row[name] for name in names}, **accuracy})

    return hook


def _open(place: ExperimentPaths, trial: Trial, split: str) -> tuple[FeatureStore, Scorer]:
    """A store of the trial's task and an exact-match scorer for it."""
    data, config = place.task(trial), trial.config
    store = FeatureStore.open(getattr(data, split))
    lvlm = load_lvlm(data.lvlm, device=config.scoring.device, dtype=config.scoring.dtype)
    return store, local_scorer(lvlm, store)


def _measure(policy: PruningPolicy, place: ExperimentPaths, trial: Trial) -> dict[str, Any]:
    """Accuracy on the test split at every budget, penalty chosen on the calibration split."""
    held_out, held_out_scorer = _open(place, trial, "calibration")
    test, scorer = _open(place, trial, "test")
    tuned = tune_penalty(policy, held_out, held_out_scorer, place.budgets, TUNING_QUESTIONS)
    samples = np.arange(len(test), dtype=np.int64)
    rows = [
        evaluate_method("policy", pruner, test, scorer, budget, samples)
        for budget, pruner in tuned.items()
    ]
    return {
        "redundancy_penalty": penalties(tuned),
        "full_accuracy": float(np.asarray(test.full_scores("exact")).mean()),
        "questions": len(test),
        "budgets": [row.as_dict() for row in rows],
    }
