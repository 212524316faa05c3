"""Client-side cache of a scoring request: plan what to compute, then join the results.

The semantics are those of `tprl_env.scoring.CachedScorer` (a score is a pure function of sample and
mask), cut in two because the pool computes the middle asynchronously: `ScoreCache.plan` leaves only
masks without a known score, `ScoreCache.finish` joins their scores with the known ones.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tprl_env.data.features.source import TokenSource
from tprl_env.env.scorer import ScorerStats, check_request

__all__ = ["Plan", "ScoreCache"]


@dataclass
class Plan:
    """A request of B rows reduced to M masks that must be computed.

    Attributes:
        samples: int64 (M,), sample numbers to compute.
        keep: bool (M, N), their masks, padding cleared.
        keys: M cache keys.
        known: float32 (U,), scores of the U distinct rows, NaN where not known yet.
        missing: int64 (M,), places of the computed rows among the distinct ones.
        inverse: int64 (B,), distinct row of each row.
    """

    samples: NDArray[np.int64]
    keep: NDArray[np.bool_]
    keys: list[bytes]
    known: NDArray[np.float32]
    missing: NDArray[np.int64]
    inverse: NDArray[np.int64]


class ScoreCache:
    """Deduplication, full-token shortcut and LRU memory in front of the pool.

    Args:
        source: the samples; gives the scores with all tokens.
        score_kind: ``"exact"`` or ``"likelihood"``.
        size: masks remembered (about 150 bytes each at 576 tokens); 0 switches the memory off.
    """

    def __init__(self, source: TokenSource, score_kind: str, size: int = 200_000) -> None:
        if size < 0:
            raise ValueError(f"cache_size must be at least 0, got {size}")
        self._source, self._size = source, size
        self._full = np.asarray(source.full_scores(score_kind), np.float32)
        self._memory: OrderedDict[bytes, float] = OrderedDict()
        self.stats = ScorerStats()

    def plan(self, samples: NDArray[np.int64], keep: NDArray[np.bool_]) -> Plan:
        """Reduce a request.

        Args:
            samples: int (B,), sample numbers.
            keep: bool (B, N); entries beyond a sample's tokens are ignored.

        Raises:
            ValueError: if the shapes do not fit or a sample number is out of range.
        """
        samples, keep, exists = check_request(samples, keep, self._source)
        rows = np.concatenate(
            [
                np.ascontiguousarray(samples).view(np.uint8).reshape(-1, 8),
                np.packbits(keep, axis=1),
            ],
            axis=1,
        )
        places: dict[bytes, int] = {}
        keys = [row.tobytes() for row in rows]
        inverse = np.array([places.setdefault(key, len(places)) for key in keys], np.int64)
        first = np.unique(inverse, return_index=True)[1]
        return self._reduce(samples, keep, exists, list(places), first, inverse)

    def _reduce(
        self,
        samples: NDArray[np.int64],
        keep: NDArray[np.bool_],
        exists: NDArray[np.bool_],
        keys: list[bytes],
        first: NDArray[np.int64],
        inverse: NDArray[np.int64],
    ) -> Plan:
        """Look the distinct rows up: full masks in the source, the others in the memory."""
        known = np.full(len(first), np.nan, np.float32)
        full = (keep[first] == exists[first]).all(axis=1)
        known[full] = self._full[samples[first[full]]]
        hits, missing = 0, []
        for place in np.flatnonzero(~full).tolist():
            score = self._memory.get(keys[place])
            if score is None:
                missing.append(place)
            else:
                self._memory.move_to_end(keys[place])
                known[place] = score
                hits += 1
        stats = self.stats
        stats.requests += 1
        stats.scores += len(samples)
        stats.duplicates += len(samples) - len(first)
        stats.full_hits += int(full.sum())
        stats.cache_hits += hits
        stats.computed += len(missing)
        places = np.asarray(missing, np.int64)
        wanted = [keys[place] for place in missing]
        return Plan(samples[first[places]], keep[first[places]], wanted, known, places, inverse)

    def finish(self, plan: Plan, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores float32 (B,) of the whole request from the M computed ones; remembers them."""
        plan.known[plan.missing] = scores
        for key, score in zip(plan.keys, scores.tolist(), strict=True):
            self._memory[key] = score
            self._memory.move_to_end(key)
        while len(self._memory) > self._size:
            self._memory.popitem(last=False)
        return plan.known[plan.inverse]
