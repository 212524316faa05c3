"""Scoring masks of a feature store's samples with a real LVLM: the inner loop of training.

Batching rule: the rows of a request are sorted by the length of their sequence (prompt + kept
tokens + longest answer), longest first, and cut into batches. A batch ends when it is full
(``batch_size`` rows or ``batch_tokens`` padded places), or when the next row is shorter than
``1 - max_padding`` of the batch's longest. Order of the request does not matter to speed, and
results come back in its order.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.data.features.store import FeatureStore
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
from tprl_env.lvlm.protocol import LVLM, Inside, Positions, Prompt
from tprl_env.lvlm.stored import beside_fixed, stored_prompt, with_fixed, without_fixed
from tprl_env.reducers.interfaces import Merged
from tprl_env.reducers.layer_pruner import LayerPruner

SCORE_KINDS = ("exact", "likelihood")


@dataclass(frozen=True)
class InsideScores:
    """Scores of B samples whose tokens left between layers.

    Attributes:
        exact: float32 (B,).
        likelihood: float32 (B,).
        lives: uint8 (B, N), decoder layers that each token entered, 0 where there is none.
    """

    exact: FloatArray
    likelihood: FloatArray
    lives: npt.NDArray[np.uint8]


class LVLMScorer:
    """Computes scores with an LVLM; wrap it in :class:`~tprl_env.scoring.CachedScorer`.

    Attributes:
        stats: Counters; read them from any thread.
    """

    def __init__(
        self,
        lvlm: LVLM,
        store: FeatureStore,
        score_kind: str = "exact",
        batch_size: int = 128,
        *,
        batch_tokens: int | None = None,
        max_padding: float = 0.25,
        positions: Positions = "original",
        token_cache_mb: int = 512,
    ) -> None:
        """Score samples of ``store`` with ``lvlm``.

        Args:
            lvlm: The LVLM that encoded the store.
            store: Visual tokens, prompts and answers by sample number.
            score_kind: ``"exact"`` (greedy answer is right, 0 or 1) or ``"likelihood"``.
            batch_size: Most rows of one forward pass.
            batch_tokens: Most padded places of one forward pass. Default by measurement: 1024 on
                a CPU in float32 (activations then stay in its cache), 2048 in bfloat16, 65536 on
                a GPU.
            max_padding: Share of the longest row by which a row of its batch may be shorter.
            positions: Rotary positions of kept tokens.
            token_cache_mb: Memory for visual tokens already converted to the LVLM's type.

        Raises:
            ValueError: The store was encoded by another LVLM, or an argument is out of range.
        """
        if store.manifest.lvlm_fingerprint != lvlm.fingerprint:
            raise ValueError(
                f"the store was encoded by another LVLM ({store.manifest.lvlm_fingerprint}) than "
                f"{lvlm.name} ({lvlm.fingerprint}); encode it again or load the LVLM it names"
            )
        kind = getattr(lvlm, "model_type", "")
        if store.manifest.version < 2 and kind not in ("", "llava"):
            raise ValueError(
                f"{store.path} has format version 1, which does not say where the visual tokens of "
                f"a {kind!r} checkpoint stand; encode it again with --restart"
            )
        if score_kind not in SCORE_KINDS:
            raise ValueError(
                f"score_kind must be one of {', '.join(SCORE_KINDS)}, got {score_kind!r}"
            )
        if batch_size < 1 or not 0 <= max_padding <= 1:
            raise ValueError(
                f"batch_size must be positive and max_padding in [0, 1], "
                f"got {batch_size} and {max_padding}"
            )
        self.lvlm = lvlm
        self.store = store
        self.score_kind = score_kind
        self.stats = ScorerStats()
        self._name = f"LVLMScorer({lvlm.name}, {score_kind})"
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens or _default_batch_tokens(lvlm)
        self._max_padding = max_padding
        self._positions: Positions = positions
        self._cache_bytes = token_cache_mb << 20
        self._cached_bytes = 0
        self._tokens: OrderedDict[int, Tensor] = OrderedDict()
        self._texts: dict[int, tuple[Prompt, list[tuple[int, ...]]]] = {}
        self._lock = threading.Lock()

    def __call__(self, samples: IntArray, keep: BoolArray) -> FloatArray:
        """Score a request with ``score_kind``; see :class:`~tprl_env.env.scorer.Scorer`.

        Of a request of lives, rows that say no more than a mask are scored as masks.

        Raises:
            ValueError: The request is malformed.
            ScoringError: The LVLM failed; the message names the samples.
        """
        entered, lives = split_lives(keep, self.num_layers)
        if lives is None:
            exact, likelihood = self.score_both(samples, entered)
            return exact if self.score_kind == "exact" else likelihood
        numbers, masks, exists = check_request(samples, entered, self.store)
        lives = lives * exists.astype(np.uint8)
        inside = ((lives > 0) & (lives != self.num_layers)).any(1)
        found = np.zeros(len(numbers), np.float32)
        if not inside.all():
            found[~inside] = self(numbers[~inside], masks[~inside])
        if inside.any():
            scores = self.score_inside(
                numbers[inside], lives=lives[inside], positions=self._positions
            )
            found[inside] = scores.exact if self.score_kind == "exact" else scores.likelihood
        return found

    @property
    def num_layers(self) -> int:
        """Decoder layers, the largest value of lives."""
        return self.lvlm.num_layers

    def score_both(
        self, samples: IntArray, keep: BoolArray | None = None
    ) -> tuple[FloatArray, FloatArray]:
        """Both metrics of the same pass.

        Args:
            samples: (B,) sample numbers.
            keep: (B, N) masks, or ``None`` for all tokens.

        Returns:
            (exact, likelihood), float32 (B,) each.
        """
        if keep is None:
            keep = self.store.exists(samples)
        numbers, masks, exists = check_request(samples, keep, self.store)
        began = time.perf_counter()
        counted = ScorerStats(requests=1, scores=len(numbers), computed=len(numbers))
        found = np.zeros((2, len(numbers)), np.float32)
        texts = [self._text(int(sample)) for sample in numbers]
        lengths = masks.sum(1) + self._beside(numbers, texts)
        sequences = np.array([len(answers) for _, answers in texts], np.int64)
        counts = exists.sum(1).tolist()
        for rows in self._batches(lengths, sequences):
            batch = numbers[rows]
            with NamedFailures(batch, self.store, self._name):
                scores = self.lvlm.score(
                    [texts[r][0] for r in rows],
                    [texts[r][1] for r in rows],
                    [self._visual(int(sample)) for sample in batch],
                    [self._whole(numbers[r], masks[r, : counts[r]], True) for r in rows],
                    self._positions,
                )
            found[0, rows], found[1, rows] = scores.exact, scores.likelihood
            counted.batches += 1
            counted.batch_rows += scores.sequences
            counted.padded_tokens += scores.padded_tokens
        checked = [check_scores(one, numbers, self.store, scorer=self._name) for one in found]
        counted.busy_seconds = time.perf_counter() - began
        with self._lock:
            self.stats.add(counted)
        return checked[0], checked[1]

    def score_inside(
        self,
        samples: IntArray,
        *,
        lives: npt.NDArray[np.uint8] | None = None,
        reducer: LayerPruner | None = None,
        average: float | None = None,
        positions: Positions | None = None,
    ) -> InsideScores:
        """Score samples whose visual tokens leave between the LVLM's layers.

        Questions about one image are scored together, because they share the layers before the
        first cut.

        Args:
            samples: (B,) sample numbers.
            lives: (B, N) decoder layers that each token enters, 0 where there is none.
            reducer: A method that chooses them instead, in the same pass.
            average: Its wanted average of visual tokens per layer.
            positions: Rotary positions; default: the reducer's own, else original.

        Raises:
            ValueError: Both or neither of lives and reducer, or the LVLM refuses them.
        """
        if (lives is None) == (reducer is None):
            raise ValueError("give lives or a reducer, one of the two")
        numbers = np.asarray(samples, np.int64)
        exists = self.store.exists(numbers)
        counts = exists.sum(1).tolist()
        given = exists.astype(np.int64) if lives is None else np.asarray(lives)
        if given.shape != exists.shape:
            raise ValueError(f"lives must be {exists.shape}, got {given.shape}")
        found = np.zeros((2, len(numbers)), np.float32)
        entered = np.zeros(exists.shape, np.uint8)
        began = time.perf_counter()
        counted = ScorerStats(requests=1, scores=len(numbers), computed=len(numbers))
        for rows in self._image_batches(numbers, (given > 0).sum(1)):
            texts = [self._text(int(numbers[r])) for r in rows]
            inside: Inside = {"reducer": reducer, "average": average}
            if lives is not None:
                depth = self.lvlm.num_layers
                inside = {
                    "lives": [self._whole(numbers[r], given[r, : counts[r]], depth) for r in rows]
                }
            with NamedFailures(numbers[rows], self.store, self._name):
                scores = self.lvlm.score(
                    [prompt for prompt, _ in texts],
                    [answers for _, answers in texts],
                    [self._visual(int(numbers[r])) for r in rows],
                    None,
                    positions,
                    **inside,
                )
            found[0, rows], found[1, rows] = scores.exact, scores.likelihood
            for r, one in zip(rows, scores.lives or (), strict=False):
                entered[r, : counts[r]] = without_fixed(self.store, int(numbers[r]), one)
            counted.batches += 1
            counted.batch_rows += scores.sequences
            counted.padded_tokens += scores.padded_tokens
        checked = [check_scores(one, numbers, self.store, scorer=self._name) for one in found]
        counted.busy_seconds = time.perf_counter() - began
        with self._lock:
            self.stats.add(counted)
        return InsideScores(
            checked[0], checked[1], entered if lives is None else given.astype(np.uint8)
        )

    def score_merged(
        self,
        samples: IntArray,
        merged: Sequence[Merged],
        positions: Positions | None = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Score samples from merged tokens instead of their own.

        Args:
            samples: (B,) sample numbers.
            merged: What a merger left of the droppable tokens of each.
            positions: Rotary positions; default: original.

        Returns:
            (exact, likelihood), float32 (B,) each.
        """
        numbers = np.asarray(samples, np.int64)
        texts = [self._text(int(sample)) for sample in numbers]
        lengths = np.array([len(one.places) for one in merged]) + self._beside(numbers, texts)
        sequences = np.array([len(answers) for _, answers in texts], np.int64)
        whole = [self._merged(int(n), one) for n, one in zip(numbers, merged, strict=True)]
        found = np.zeros((2, len(numbers)), np.float32)
        for rows in self._batches(lengths, sequences):
            with NamedFailures(numbers[rows], self.store, self._name):
                scores = self.lvlm.score(
                    [texts[r][0] for r in rows],
                    [texts[r][1] for r in rows],
                    [whole[r][0].to(self.lvlm.device, self.lvlm.dtype) for r in rows],
                    None,
                    positions,
                    places=[whole[r][1] for r in rows],
                    sizes=[whole[r][2] for r in rows],
                )
            found[0, rows], found[1, rows] = scores.exact, scores.likelihood
        checked = [check_scores(one, numbers, self.store, scorer=self._name) for one in found]
        return checked[0], checked[1]

    def _image_batches(self, numbers: IntArray, visual: IntArray) -> Iterator[list[int]]:
        """Rows by image, then by length; a shared first layer allows larger batches."""
        images = np.array([self.store.image_number(int(sample)) for sample in numbers])
        texts = [self._text(int(sample)) for sample in numbers]
        lengths = visual + self._beside(numbers, texts)
        batch: list[int] = []
        places = 0
        for row in np.lexsort((lengths, images)).tolist():
            needed = int(lengths[row]) * len(texts[row][1])
            if batch and (
                len(batch) == self._batch_size or places + needed > 2.5 * self._batch_tokens
            ):
                yield batch
                batch, places = [], 0
            batch.append(row)
            places += needed
        if batch:
            yield batch

    def _batches(self, lengths: IntArray, sequences: IntArray) -> Iterator[list[int]]:
        """Cut rows into batches by the rule of this module."""
        batch: list[int] = []
        longest = used = 0
        for row in np.argsort(-lengths, kind="stable").tolist():
            length, count = int(lengths[row]), int(sequences[row])
            full = (
                len(batch) == self._batch_size
                or (used + count) * longest > self._batch_tokens
                or length < (1 - self._max_padding) * longest
            )
            if batch and full:
                yield batch
                batch, used = [], 0
            if not batch:
                longest = length
            batch.append(row)
            used += count
        if batch:
            yield batch

    def _beside(
        self, numbers: IntArray, texts: Sequence[tuple[Prompt, list[tuple[int, ...]]]]
    ) -> IntArray:
        """(B,) places that a sequence has beside the droppable tokens it keeps."""
        fixed = [self.store.fixed_count(self.store.image_number(int(one))) for one in numbers]
        places = [len(p.ids) - len(p.visual_at) + max(map(len, a)) - 1 for p, a in texts]
        return np.array(places, np.int64) + np.array(fixed, np.int64)

    def _merged(self, sample: int, merged: Merged) -> tuple[Tensor, IntArray, int]:
        """Merged tokens with those that are always kept, their places, and all places."""
        tokens = self._visual(sample)
        placement = self.store.placement(self.store.image_number(sample))
        return (*beside_fixed(merged, tokens, placement), len(tokens))

    def _whole(self, sample: int, values: npt.NDArray[Any], fixed: int) -> npt.NDArray[Any]:
        """A mask or lives with the tokens that are always kept."""
        return with_fixed(self.store, int(sample), values, fixed)

    def _text(self, sample: int) -> tuple[Prompt, list[tuple[int, ...]]]:
        """Prompt and answers of a sample, read once (a few hundred bytes each)."""
        known = self._texts.get(sample)
        if known is None:
            prompt = stored_prompt(self.store, sample)
            answers: Sequence[IntArray] = self.store.answer_ids(sample)
            known = (prompt, [tuple(answer.tolist()) for answer in answers])
            self._texts[sample] = known
        return known

    def _visual(self, sample: int) -> Tensor:
        """Visual tokens of a sample in the LVLM's type, on its device, from the cache if there."""
        image = self.store.image_number(sample)
        with self._lock:
            known = self._tokens.get(image)
            if known is not None:
                self._tokens.move_to_end(image)
                return known
        stored = np.array(self.store.visual(sample).tokens)  # a copy: the store is read-only
        tokens = torch.from_numpy(stored).to(self.lvlm.device, self.lvlm.dtype)
        with self._lock:
            if image not in self._tokens:
                self._tokens[image] = tokens
                self._cached_bytes += tokens.nbytes
            while self._cached_bytes > self._cache_bytes and len(self._tokens) > 1:
                self._cached_bytes -= self._tokens.popitem(last=False)[1].nbytes
        return tokens


def _default_batch_tokens(lvlm: LVLM) -> int:
    if lvlm.device.type != "cpu":
        return 65536
    return 1024 if lvlm.dtype == torch.float32 else 2048
