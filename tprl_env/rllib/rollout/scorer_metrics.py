"""A scorer's counters as RLlib metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["ScorerReport"]

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
