"""Scorers of a runner: the pool's client, or a scorer in its own process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tprl_env.data.features import shared_source
from tprl_env.rllib.config import TrainConfig, scorer_spec
from tprl_env.scoring.cache import CachedScorer
from tprl_env.scoring.pool import ScorerPool

__all__ = ["LocalScores", "open_scorer"]


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
