"""Scoring by what the LVLM writes: greedy answers from kept tokens, graded as the samples say.

Slower than teacher forcing, and the only way where an answer may be written in more than one way.
"""

from __future__ import annotations

import time

import numpy as np

from tprl_env.data.features.store import FeatureStore
from tprl_env.data.graders import GRADED_TOKENS, grade
from tprl_env.env.scorer import (
    BoolArray,
    FloatArray,
    IntArray,
    NamedFailures,
    ScorerStats,
    check_request,
    check_scores,
    split_lives,
)
from tprl_env.lvlm.protocol import LVLM, Inside, Positions
from tprl_env.scoring.lvlm_scorer import LVLMScorer


class GradedScorer(LVLMScorer):
    """Computes the score kind "graded" of a store that was encoded with it."""

    def __init__(
        self,
        lvlm: LVLM,
        store: FeatureStore,
        batch_size: int = 128,
        *,
        positions: Positions = "original",
    ) -> None:
        """Grade answers to a store's samples.

        Args:
            lvlm: The LVLM that encoded the store.
            store: Encoded with ``grade=True``.
            batch_size: Most questions per pass.
            positions: Rotary positions of kept tokens.

        Raises:
            ValueError: As for ``LVLMScorer``, or the store has no graded scores.
        """
        super().__init__(lvlm, store, "exact", batch_size, positions=positions)
        store.full_scores("graded")  # refuses a store without them
        self.score_kind = "graded"
        self._name = f"GradedScorer({lvlm.name})"
        self._longest = GRADED_TOKENS

    def __call__(self, samples: IntArray, keep: BoolArray) -> FloatArray:
        """Score a request of masks or lives; see :class:`~tprl_env.env.scorer.Scorer`.

        Raises:
            ValueError: The request is malformed.
            ScoringError: The LVLM failed; the message names the samples.
        """
        entered, lives = split_lives(keep, self.num_layers)
        numbers, masks, exists = check_request(samples, entered, self.store)
        began = time.perf_counter()
        counted = ScorerStats(requests=1, scores=len(numbers), computed=len(numbers))
        counts = exists.sum(1).tolist()
        found = np.zeros(len(numbers), np.float32)
        texts = [self._text(int(sample)) for sample in numbers]
        lengths = masks.sum(1) + self._beside(numbers, texts) + self._longest
        for rows in self._batches(lengths, np.ones(len(numbers), np.int64)):
            inside: Inside = {}
            keeps = None
            if lives is None:
                keeps = [self._whole(numbers[r], masks[r, : counts[r]], 1) for r in rows]
            else:
                depth = self.num_layers
                inside["lives"] = [
                    self._whole(numbers[r], lives[r, : counts[r]], depth) for r in rows
                ]
            with NamedFailures(numbers[rows], self.store, self._name):
                written = self.lvlm.generate(
                    [texts[r][0] for r in rows],
                    [self._visual(int(numbers[r])) for r in rows],
                    keeps,
                    self._longest,
                    self._positions,
                    **inside,
                )
            for row, text in zip(rows, written, strict=True):
                sample = int(numbers[row])
                found[row] = grade(self.store.grader(sample), text, self.store.answers(sample))
            counted.batches += 1
            counted.batch_rows += len(rows)
        counted.busy_seconds = time.perf_counter() - began
        checked = check_scores(found, numbers, self.store, scorer=self._name)
        with self._lock:
            self.stats.add(counted)
        return checked
