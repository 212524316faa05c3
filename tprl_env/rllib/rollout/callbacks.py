"""RLlib callbacks: failures on remote runners, and metrics of RLlib's default runner."""

from __future__ import annotations

import time
from typing import Any

from ray.rllib.callbacks.callbacks import RLlibCallback

from tprl_env.env.scorer import ScoringError
from tprl_env.rllib.rollout.scorers import ScorerReport
from tprl_env.scoring.pool import ScorerPool

__all__ = ["EnvironmentMetrics", "StopOnScoringFailure"]


class StopOnScoringFailure(RLlibCallback):
    """Raises in the driver what a remote runner could not score.

    RLlib restarts a remote runner that raises, and continues; with a faulty scorer it would do so
    without end. The scorer actors remember the first failure, and this asks them after each
    iteration.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pool: ScorerPool | None = None

    def on_train_result(self, *, algorithm: Any, **kwargs: Any) -> None:
        """Check once per iteration; without remote runners errors arrive by themselves.

        Raises:
            ScoringError: With the message of the first failure.
        """
        address = algorithm.config.env_config.get("pool")
        if not address or algorithm.config.num_env_runners == 0:
            return
        if self._pool is None:
            self._pool = ScorerPool.connect(address)
        failure = self._pool.failure()
        if failure:
            raise ScoringError(failure)


class EnvironmentMetrics(StopOnScoringFailure):
    """Adds what `TokenPruningRunner` logs by itself to RLlib's default runner."""

    def __init__(self) -> None:
        super().__init__()
        self._report = ScorerReport()
        self._since = time.monotonic()

    def on_episode_end(self, *, episode: Any, metrics_logger: Any, **kwargs: Any) -> None:
        """Log score and count of the final mask."""
        info = episode.get_infos(-1)
        for name in ("score", "full_score", "kept", "keep_ratio"):
            if name in info:
                metrics_logger.log_value(name, float(info[name]), window=256)

    def on_sample_end(self, *, env_runner: Any, metrics_logger: Any, **kwargs: Any) -> None:
        """Log what the scorer has done since the last call."""
        now = time.monotonic()
        counters = env_runner.env.unwrapped.scorer.counters()
        self._report.log(metrics_logger, counters, now - self._since)
        self._since = now
