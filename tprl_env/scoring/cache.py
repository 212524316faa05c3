"""The cache in front of a scorer.

The LVLM is frozen, so a score is a pure function of (sample, keep); :class:`CachedScorer` uses that
three times: equal rows of a request, masks scored earlier, and the mask with all tokens.

Shapes: B rows of a request, N = ``source.max_tokens`` visual tokens, S samples of the source.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Any

import numpy as np

from tprl_env.env.scorer import (
    BoolArray,
    FloatArray,
    IntArray,
    NamedFailures,
    ScoredSource,
    Scorer,
    ScorerStats,
    check_request,
    check_scores,
)


class CachedScorer:
    """Answers what is known already and passes the rest to ``inner`` in one call.

    In this order: a row that keeps every existing token is answered from
    ``source.full_scores(score_kind)``; equal rows of one request are computed once; masks scored by
    earlier requests come from an LRU cache keyed by (sample, packed mask bits). Entries of
    ``keep`` beyond a sample's own tokens are ignored.

    Safe to call from several threads; the inner scorer runs outside the lock, so two threads that
    ask for the same new mask at the same moment both compute it (and get the same number).
    """

    def __init__(
        self, inner: Scorer, source: ScoredSource, score_kind: str, cache_size: int = 200_000
    ) -> None:
        """Wrap ``inner``.

        Args:
            inner: Computes scores; may be any callable with the ``Scorer`` signature.
            source: Where sample numbers point.
            score_kind: ``"exact"`` or ``"likelihood"``, the score_kind that ``inner`` computes.
            cache_size: Masks remembered (about 150 bytes each at 144 tokens); 0 switches it off.

        Raises:
            ValueError: ``cache_size`` is negative.
        """
        if cache_size < 0:
            raise ValueError(f"cache_size must be 0 (off) or positive, got {cache_size}")
        self.inner = inner
        self.source = source
        self.score_kind = score_kind
        self._name = getattr(inner, "__name__", type(inner).__name__)
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[int, bytes], float] = OrderedDict()
        self._lock = threading.Lock()
        self._stats = ScorerStats()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start with an empty cache: a lock cannot be copied."""
        return CachedScorer, (self.inner, self.source, self.score_kind, self._cache_size)

    @property
    def stats(self) -> ScorerStats:
        """Snapshot of the counters, with the batch counters of ``inner`` when it has any."""
        with self._lock:
            total = ScorerStats().add(self._stats)
        below = getattr(self.inner, "stats", None)
        if isinstance(below, ScorerStats):
            total.batches, total.batch_rows = below.batches, below.batch_rows
            total.padded_tokens = below.padded_tokens
        return total

    def __call__(self, samples: IntArray, keep: BoolArray) -> FloatArray:
        """Score a request; see :class:`Scorer`.

        Raises:
            ValueError: The request is malformed.
            ScoringError: ``inner`` raised, or returned something that is not a score.
        """
        numbers, masks, exists = check_request(samples, keep, self.source)
        counted = ScorerStats(requests=1, scores=len(numbers))
        scores = np.zeros(len(numbers), np.float32)
        full = (masks == exists).all(1)
        if full.any():
            stored = self.source.full_scores(self.score_kind)[numbers[full]]
            scores[full] = check_scores(
                stored, numbers[full], self.source, scorer=f"full_scores({self.score_kind!r})"
            )
        counted.full_hits = int(full.sum())

        packed = np.packbits(masks, axis=1)
        wanted: dict[tuple[int, bytes], list[int]] = {}
        for row in np.flatnonzero(~full).tolist():
            wanted.setdefault((int(numbers[row]), packed[row].tobytes()), []).append(row)
        missing = self._look_up(wanted, scores, counted)
        if missing:
            self._compute(missing, wanted, numbers, masks, scores, counted)
        with self._lock:
            self._stats.add(counted)
        return scores

    def _look_up(
        self,
        wanted: dict[tuple[int, bytes], list[int]],
        scores: FloatArray,
        counted: ScorerStats,
    ) -> list[tuple[int, bytes]]:
        """Fill in remembered scores; returns the keys without a score."""
        missing = []
        with self._lock:
            for key, rows in wanted.items():
                known = self._cache.get(key)
                counted.duplicates += len(rows) - 1
                if known is None:
                    missing.append(key)
                    continue
                self._cache.move_to_end(key)
                counted.cache_hits += 1
                scores[rows] = known
        return missing

    def _compute(
        self,
        missing: list[tuple[int, bytes]],
        wanted: dict[tuple[int, bytes], list[int]],
        numbers: IntArray,
        masks: BoolArray,
        scores: FloatArray,
        counted: ScorerStats,
    ) -> None:
        """Ask ``inner`` once for all missing keys and remember its answers."""
        first = np.array([wanted[key][0] for key in missing])
        began = time.perf_counter()
        with NamedFailures(numbers[first], self.source, self._name):
            found = self.inner(numbers[first], masks[first])
        counted.busy_seconds = time.perf_counter() - began
        counted.computed = len(missing)
        values = check_scores(found, numbers[first], self.source, scorer=self._name)
        for key, value in zip(missing, values, strict=True):
            scores[wanted[key]] = value
        if not self._cache_size:
            return
        with self._lock:
            for key, value in zip(missing, values.tolist(), strict=True):
                self._cache[key] = value
                self._cache.move_to_end(key)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
