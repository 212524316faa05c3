"""Learning curves: held-out accuracy against LVLM scores used."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tprl_env.env.scorer import Scorer
from tprl_env.evaluation.measure import evaluate_method
from tprl_env.files import JsonLog
from tprl_env.policy.pruner import PolicyPruner

if TYPE_CHECKING:
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.policy.network import PruningPolicy

CURVE_BUDGETS = (48, 14, 7)


class LearningCurve:
    """Accuracy on calibration questions while the policy learns, one JSON line per point.

    Args:
        path: File of the points.
        store: Calibration store.
        scorer: Exact-match scorer of it.
        questions: Use the first so many.
        steps: T of the run, in which every point acts, also that of the policy it starts from,
            which may have been trained in one; None takes each policy's own.
    """

    def __init__(
        self,
        path: Path,
        store: FeatureStore,
        scorer: Scorer,
        questions: int,
        steps: int | None = None,
    ) -> None:
        self.log = JsonLog(path)
        self.steps = steps
        self.samples = np.arange(min(questions, len(store)), dtype=np.int64)
        self.store = store
        self.scorer = scorer
        self.seconds = 0.0

    def add(self, policy: PruningPolicy, lvlm_scores: int) -> dict[str, float]:
        """Measure one point and append it to the file."""
        begin = time.perf_counter()
        pruner = PolicyPruner.as_trained(policy, self.steps)
        budgets = [b for b in CURVE_BUDGETS if b <= self.store.max_tokens]
        rows = {
            str(budget): evaluate_method(
                "policy", pruner, self.store, self.scorer, budget, self.samples
            )
            for budget in budgets
        }
        accuracy = {budget: round(row.accuracy, 5) for budget, row in rows.items()}
        ci95 = {budget: [round(bound, 5) for bound in row.ci95] for budget, row in rows.items()}
        self.log.append({"lvlm_scores": lvlm_scores, "accuracy": accuracy, "ci95": ci95})
        self.seconds += time.perf_counter() - begin
        return accuracy

    def points(self) -> list[dict[str, Any]]:
        """All points so far, oldest first."""
        return self.log.read()

    def drop_from(self, lvlm_scores: int) -> None:
        """Drop the points measured at so many scores or more."""
        if any(point["lvlm_scores"] >= lvlm_scores for point in self.points()):
            self.log.keep(lambda point: bool(point["lvlm_scores"] < lvlm_scores))

    def full(self) -> float:
        """Accuracy with all tokens on the same questions."""
        return float(np.asarray(self.store.full_scores("exact"))[self.samples].mean())


def curve_hook(curve: LearningCurve, start: PruningPolicy | None, total: int) -> Any:
    """Measure the policy that training starts from, and then about eight times.

    Points of work that a crash has undone are dropped as it is done again.
    """
    if not curve.points() and start is not None:
        curve.add(start, 0)

    def hook(metrics: Mapping[str, Any], policy: PruningPolicy) -> None:
        used = int(metrics["scores"])
        curve.drop_from(used)
        points = curve.points()
        if not points or used - points[-1]["lvlm_scores"] >= total / 8:
            curve.add(policy, used)

    return hook
