"""What need not be computed again: the one cache in front of every scorer.

The LVLM is frozen, so a score is a pure function of (sample, keep); `ScoreCache` uses that three
times: equal rows of a request, masks scored earlier, and the mask with all tokens. It is cut in
two, because the pool computes the middle elsewhere: `ScoreCache.plan` leaves the masks that nobody
knows, `ScoreCache.finish` joins their scores with the known ones. `CachedScorer` has a scorer for
the middle.

Shapes: B rows of a request, N = ``source.max_tokens`` visual tokens, U distinct rows among them,
M rows that must be computed.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.source import TokenSource
from tprl_env.env.scorer import (
    BoolArray,
    FloatArray,
    IntArray,
    NamedFailures,
    Scorer,
    ScorerStats,
    check_request,
    check_scores,
    split_lives,
)

__all__ = ["CachedScorer", "Plan", "ScoreCache"]


@dataclass
class Plan:
    """A request of B rows reduced to M masks that must be computed.

    Attributes:
        samples: int64 (M,), sample numbers to compute.
        keep: bool (M, N), their masks, padding cleared.
        packed: uint8 (M, ceil(N / 8)), `numpy.packbits` of ``keep``.
        lives: uint8 (M, N), decoder layers that each token enters; None where masks say it all.
        keys: M cache keys.
        known: float32 (U,), scores of the distinct rows, NaN where not known yet.
        missing: int64 (M,), places of the computed rows among the distinct ones.
        inverse: int64 (B,), distinct row of each row.
        counted: What the request adds to the counters once it is answered.
    """

    samples: IntArray
    keep: BoolArray
    packed: npt.NDArray[np.uint8]
    keys: list[bytes]
    known: FloatArray
    missing: IntArray
    inverse: IntArray
    counted: ScorerStats
    lives: npt.NDArray[np.uint8] | None = None


class ScoreCache:
    """Deduplication, full-token shortcut and memory of earlier masks.

    In this order: a row that keeps every existing token is answered from
    ``source.full_scores(score_kind)``; equal rows of one request are computed once; masks scored by
    earlier requests come from an LRU memory keyed by (sample, packed mask bits). Entries of
    ``keep`` beyond a sample's own tokens are ignored. Lives (uint8, see
    :class:`~tprl_env.env.scorer.Scorer`) of 0 and L alone are masks in every respect; others are
    keyed by (sample, lives).

    Safe to call from several threads. Nothing is locked between `plan` and `finish`, so two threads
    that ask for the same new mask at the same moment both compute it (and get the same number).

    Args:
        source: Where sample numbers point; gives the scores with all tokens.
        score_kind: ``"exact"`` or ``"likelihood"``.
        size: Masks remembered (about 150 bytes each at 144 tokens); 0 switches the memory off.
        num_layers: Decoder layers of the scorer's LVLM, for lives.

    Raises:
        ValueError: ``size`` is negative.
    """

    def __init__(
        self,
        source: TokenSource,
        score_kind: str,
        size: int = 200_000,
        num_layers: int | None = None,
    ) -> None:
        if size < 0:
            raise ValueError(f"cache_size must be 0 (off) or positive, got {size}")
        self.source, self.score_kind, self._size = source, score_kind, size
        self.num_layers = num_layers
        self._full = np.asarray(source.full_scores(score_kind))
        self._memory: OrderedDict[bytes, float] = OrderedDict()
        self._lock = threading.Lock()
        self._stats = ScorerStats()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start with an empty memory: a lock cannot be copied."""
        return ScoreCache, (self.source, self.score_kind, self._size, self.num_layers)

    @property
    def stats(self) -> ScorerStats:
        """Snapshot of the counters; a request counts once it is answered."""
        with self._lock:
            return ScorerStats().add(self._stats)

    def plan(self, samples: IntArray, keep: BoolArray) -> Plan:
        """Reduce a request.

        Args:
            samples: int (B,), sample numbers.
            keep: bool (B, N), or uint8 lives; entries beyond a sample's tokens are ignored.

        Raises:
            ValueError: The request is malformed.
            ScoringError: The source's score with all tokens is not a score.
        """
        mask, lives = split_lives(keep, self.num_layers)
        samples, keep, exists = check_request(samples, mask, self.source)
        packed = np.packbits(keep, axis=1)
        every = _keys(samples, packed)
        whole = (keep == exists).all(axis=1)
        if lives is not None:
            lives = lives * exists.astype(np.uint8)
            inside = ((lives > 0) & (lives != self.num_layers)).any(axis=1)
            whole &= ~inside
            # one byte more than sample and lives: no mask has such a key, not even of one token
            named = _keys(samples, np.pad(lives, ((0, 0), (0, 1))))
            every = [b if there else a for a, b, there in zip(every, named, inside, strict=True)]
        keys, first, inverse = _distinct(every)
        full, full_hits = whole[first], int(whole.sum())
        known = np.full(len(first), np.nan, np.float32)
        if full_hits:
            asked = samples[first[full]]
            name = f"full_scores({self.score_kind!r})"
            known[full] = check_scores(self._full[asked], asked, self.source, scorer=name)
        partial = (~full).nonzero()[0].tolist()
        missing = self._look_up(keys, partial, known)
        rows = first[missing]
        counted = ScorerStats(
            requests=1,
            scores=len(samples),
            computed=len(missing),
            duplicates=len(samples) - full_hits - len(partial),
            cache_hits=len(partial) - len(missing),
            full_hits=full_hits,
        )
        wanted = [keys[place] for place in missing.tolist()]
        if lives is not None:
            lives = lives[rows] if bool(inside[rows].any()) else None
        masks = keep[rows], packed[rows]
        return Plan(samples[rows], *masks, wanted, known, missing, inverse, counted, lives)

    def _look_up(self, keys: list[bytes], places: list[int], known: FloatArray) -> IntArray:
        """Fill in remembered scores; returns the places that nobody has scored yet."""
        missing = []
        with self._lock:
            for place in places:
                score = self._memory.get(keys[place])
                if score is None:
                    missing.append(place)
                else:
                    self._memory.move_to_end(keys[place])
                    known[place] = score
        return np.array(missing, np.int64)

    def finish(self, plan: Plan, scores: FloatArray) -> FloatArray:
        """Answer a request and remember what was computed for it.

        Args:
            plan: From `plan`; every plan is finished once.
            scores: float32 (M,), checked scores of ``plan.samples`` and ``plan.keep``.

        Returns:
            float32 (B,), scores of the whole request.
        """
        plan.known[plan.missing] = scores
        with self._lock:
            self._stats.add(plan.counted)
            if self._size:
                for key, score in zip(plan.keys, scores.tolist(), strict=True):
                    self._memory[key] = score
                    self._memory.move_to_end(key)
                while len(self._memory) > self._size:
                    self._memory.popitem(last=False)
        return plan.known[plan.inverse]


class CachedScorer(ScoreCache):
    """A scorer behind its cache: what is not known yet is computed in one call of ``inner``.

    Args:
        inner: Computes scores; may be any callable with the ``Scorer`` signature.
        source: Where sample numbers point.
        score_kind: ``"exact"`` or ``"likelihood"``, the score_kind that ``inner`` computes.
        cache_size: Masks remembered, as `ScoreCache` says; 0 switches the memory off.

    Raises:
        ValueError: ``cache_size`` is negative.
    """

    def __init__(
        self, inner: Scorer, source: TokenSource, score_kind: str, cache_size: int = 200_000
    ) -> None:
        super().__init__(source, score_kind, cache_size, getattr(inner, "num_layers", None))
        self.inner = inner
        self._name = getattr(inner, "__name__", type(inner).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start with an empty memory: a lock cannot be copied."""
        return CachedScorer, (self.inner, self.source, self.score_kind, self._size)

    @property
    def stats(self) -> ScorerStats:
        """Snapshot of the counters, with the batch counters of ``inner`` when it has any."""
        total = super().stats
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
        plan = self.plan(samples, keep)
        if not plan.keys:
            return self.finish(plan, np.zeros(0, np.float32))
        began = time.perf_counter()
        with NamedFailures(plan.samples, self.source, self._name):
            wanted: Any = plan.keep if plan.lives is None else plan.lives
            found = self.inner(plan.samples, wanted)
        plan.counted.busy_seconds = time.perf_counter() - began
        return self.finish(plan, check_scores(found, plan.samples, self.source, scorer=self._name))


def _keys(samples: IntArray, packed: npt.NDArray[np.uint8]) -> list[bytes]:
    """Bytes of (sample, mask) of each row; numpy cuts a void array into bytes at C speed."""
    numbers = np.ascontiguousarray(samples).view(np.uint8).reshape(-1, 8)
    rows = np.concatenate([numbers, packed], axis=1)
    keys: list[bytes] = rows.view(f"V{rows.shape[1]}")[:, 0].tolist()
    return keys


def _distinct(keys: list[bytes]) -> tuple[list[bytes], IntArray, IntArray]:
    """Distinct keys (U), the first row of each (U,), and the distinct one of each row (B,)."""
    places: dict[bytes, int] = {}
    first: list[int] = []
    inverse: list[int] = []
    for row, key in enumerate(keys):
        place = places.setdefault(key, len(first))
        inverse.append(place)
        if place == len(first):
            first.append(row)
    return list(places), np.array(first, np.int64), np.array(inverse, np.int64)
