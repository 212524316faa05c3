"""Scorers of a runner: the pool's client, or a scorer in its own process; and their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tprl_env.data.features import shared_source
from tprl_env.rllib.config import TrainConfig, scorer_spec
from tprl_env.scoring.cache import CachedScorer
from tprl_env.scoring.pool import ScorerPool

__all__ = [
    "LocalScores",
    "ScorerReport",
    "open_scorer",
]


class LocalScores:
    """A scorer in this process behind the pool's interface: `submit` computes at once."""

    concurrent = False

    def __init__(self, config: TrainConfig) -> None:
        spec = scorer_spec(config)
        source = shared_source(config.source)
        size = config.scoring.cache_size
        self._scorer = CachedScorer(spec.build(), source, config.rules.score_kind, size)

    class Ready(NamedTuple):
        """Scores that are there already."""

        scores: npt.NDArray[np.float32]

        def result(self) -> npt.NDArray[np.float32]:
            """The scores, float32 (B,)."""
            return self.scores

    def __call__(
        self, samples: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Score, as `tprl_env.scoring.cache.Scorer`."""
        return self._scorer(samples, keep)

    def submit(
        self, samples: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]
    ) -> LocalScores.Ready:
        """Score now."""
        return self.Ready(self._scorer(samples, keep))

    def poll(self, timeout: float = 0.0) -> None:
        """Nothing is ever under way."""

    def counters(self) -> dict[str, float]:
        """Counters of the scorer."""
        return self._scorer.stats.as_dict()


def open_scorer(config: TrainConfig, pool: Mapping[str, Any] | None) -> ScorerPool | LocalScores:
    """The run's scorer actors, or a scorer of this process where there are none."""
    return ScorerPool.connect(pool) if pool else LocalScores(config)


_SUMMED = (
    "requests",
    "scores",
    "computed",
    "duplicates",
    "cache_hits",
    "full_hits",
    "batches",
    "batch_rows",
    "padded_tokens",
    "busy_seconds",
    "retries",
    "restarts",
)


class ScorerReport:
    """Logs what has been counted since the last call, so that sums over runners are right."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}

    def log(
        self, metrics: Any, counters: Mapping[str, float], seconds: float, window: int = 1
    ) -> None:
        """Log under ``scorer/...``.

        Args:
            metrics: The runner's MetricsLogger.
            counters: Numbers since the start, as `ScorerPool.counters` gives them.
            seconds: Time since the last call.
            window: Values to average over, the number of runners.
        """
        fresh = {n: counters.get(n, 0.0) - self._seen.get(n, 0.0) for n in _SUMMED}
        self._seen = {name: counters.get(name, 0.0) for name in _SUMMED}
        for name, value in fresh.items():
            metrics.log_value(("scorer", name), value, reduce="sum")
        for name in ("batch_fill", "queue_peak"):
            metrics.log_value(("scorer", name), counters.get(name, 0.0), window=window)
        rate = fresh["scores"] / max(seconds, 1e-9)
        metrics.log_value(("scorer", "scores_per_second"), rate, window=window)
        metrics.log_value(("scorer", "scores_lifetime"), fresh["scores"], reduce="lifetime_sum")
