"""Measure pruners, mergers and layer pruners at one average of visual tokens over all layers.

The reducer and the LLM are timed apart. A reducer's time has what it computes from the tokens and
from the states that the vision tower left anyway; a method that changes the tower runs it again. A
layer pruner works inside the pass: its time is that of the pass less that of a replay of the same
``lives``.

Shapes: B questions of a chunk, S of all, N visual tokens (padded), L decoder layers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.intervals import mean_interval, paired_difference
from tprl_env.evaluation.measure import by_type, iterate_chunks
from tprl_env.evaluation.reducer_flops import counted_flops, mean_flops
from tprl_env.evaluation.reducer_names import Contender, kind_of, substitute_of
from tprl_env.lvlm.protocol import Positions
from tprl_env.lvlm.stored import stored_prompt, without_fixed
from tprl_env.reducers.interfaces import (
    Merged,
    Merger,
    PruneInputs,
    Pruner,
    Reducer,
    checked_mask,
    prune_inputs,
)
from tprl_env.reducers.layer.question_rows import QuestionRows
from tprl_env.reducers.layer_pruner import LayerPruner
from tprl_env.scoring.lvlm_scorer import LVLMScorer

COUNTED = 4  # questions whose matrix products are counted one by one

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]
Lives = npt.NDArray[np.uint8]


@dataclass
class Part:
    """What a reducer did to some questions.

    Attributes:
        scores: float32 (B,).
        lives: uint8 (B, N), layers that each place's token enters; of merged tokens the places
            that they stand for.
        visual: int64 (B, L), visual tokens that enter each layer.
        reducer_seconds: Of all B.
        llm_seconds: Of all B.
    """

    scores: FloatArray
    lives: Lives
    visual: IntArray
    reducer_seconds: float = 0.0
    llm_seconds: float = 0.0


@dataclass(frozen=True)
class Measured:
    """One row: what a results file says, and what pictures and differences are made from.

    Attributes:
        row: JSON-able.
        scores: (S,); ``None`` where the budget is not feasible.
        lives: (S, N), as in `Part`.
    """

    row: dict[str, Any]
    scores: FloatArray | None = None
    lives: Lives | None = None


class Bench:
    """A store and its LVLM, ready to measure reducers.

    Attributes:
        store: Encoded split.
        lvlm: Its LVLM.
        samples: Questions used.
        full: Exact scores with all tokens.
    """

    def __init__(self, store: FeatureStore, lvlm: Any, samples: IntArray) -> None:
        """Score everything once with all tokens, which also warms up."""
        self.store, self.lvlm, self.samples = store, lvlm, samples
        kinds: tuple[Positions, ...] = ("original", "contiguous")
        self._scorers = {kind: LVLMScorer(lvlm, store, positions=kind) for kind in kinds}
        self.full = self._scorers["original"].score_both(samples)[0]
        self._scorers["contiguous"].score_both(samples[:64])
        exists = store.exists(samples)
        self.smallest_image = int(exists.sum(1).min())
        self._texts: IntArray = np.array([self._beside(int(one)) for one in samples], np.int64)

    def flops(self, visual: IntArray, part: slice = slice(None)) -> int | None:
        """Mean of the LLM's operations per question for visual lengths (B, L), where known."""
        found = mean_flops(self.lvlm.text_config, visual + self._texts[part, None])
        return None if found is None else round(found)

    def full_row(self) -> dict[str, Any]:
        """The LLM with all tokens."""
        exists = self.store.exists(self.samples)
        visual = np.repeat(exists.sum(1)[:, None], self.lvlm.num_layers, 1).astype(np.int64)
        began = time.perf_counter()
        self._scorers["original"].score_both(self.samples)
        seconds = time.perf_counter() - began
        return {
            "accuracy": round(float(self.full.mean()), 5),
            "ci95": [round(bound, 5) for bound in mean_interval(self.full)],
            "by_type": self._by_type(self.full),
            "average_tokens": round(float(visual.mean()), 3),
            "ms_llm": round(1000 * seconds / len(self.samples), 3),
            "flops_llm": self.flops(visual),
            "flops_tower": self._tower_flops(),
        }

    def _tower_flops(self) -> int:
        """Of one plain pass, which ToMe and FlowCut run in another form."""
        pictures = self.store.pictures(int(self.samples[0]))
        signals = self.lvlm.vision_signals
        return counted_flops(lambda: [signals(one).features() for one in pictures])

    def measure(self, contender: Contender, budgets: Sequence[int]) -> list[Measured]:
        """One contender at every budget; those it cannot have become rows that say why."""
        refused = {budget: self.refusal(contender, budget) for budget in budgets}
        parts: dict[int, list[Part]] = {b: [] for b in budgets if not refused[b]}
        for part in iterate_chunks(self.samples):
            samples = self.samples[part]
            for budget, done in parts.items():
                done.append(self._run(contender, contender.make(budget), samples, budget))
        rows = []
        for budget in budgets:
            reducer = contender.make(budget)
            row = describe(contender, reducer, budget)
            if refused[budget]:
                rows.append(Measured({**row, "feasible": False, "reason": refused[budget]}))
            else:
                rows.append(self._summary(row, contender, reducer, parts[budget]))
        return rows

    def refusal(self, contender: Contender, budget: int) -> str:
        """Why a contender cannot have a budget, found out on the first question; "" if it can."""
        if not 1 <= budget <= self.smallest_image:
            return f"budgets lie in [1, {self.smallest_image}] here, got {budget}"
        reducer, sample = contender.make(budget), int(self.samples[0])
        if "vision" in reducer.required() and self.store.has_sets:
            return "it looks into the vision tower at one picture, some questions here have several"
        try:
            if isinstance(reducer, LayerPruner):
                prompt = stored_prompt(self.store, sample)
                tokens = self.store.visual(sample).tokens
                self.lvlm.reduce([prompt], [tokens], reducer, float(budget), contender.positions)
            else:
                inputs = self.inputs(reducer, np.array([sample]))
                self._maps(reducer, inputs)
                reduce_before(reducer, inputs, budget)
        except ValueError as error:
            return str(error)
        return ""

    def inputs(self, reducer: Reducer, samples: IntArray) -> list[PruneInputs]:
        """What a reducer before the LLM reads: from the store, else computed by the LVLM."""
        needs = reducer.required()
        reads = (*needs, "query", "query_tokens") if "codes" in needs else needs
        stored = [name for name in reads if name not in ("question_attention", "question_rows")]
        found = [prune_inputs(self.store, int(sample), stored) for sample in samples]
        if "vision" in needs:
            seen: dict[int, Any] = {}
            for one, sample in zip(found, samples.tolist(), strict=True):
                image = self.store.image_number(sample)
                if image not in seen:
                    seen[image] = self.lvlm.vision_signals(self.store.picture(sample))
                    seen[image].features()  # the tower has run for every method
                one.vision = seen[image]
        return found

    def _maps(self, reducer: Reducer, inputs: list[PruneInputs]) -> None:
        """The LVLM's maps, computed, since reading a stored one would not show what they cost."""
        for name in ("question_attention", "question_rows"):
            if name not in reducer.required():
                continue
            numbers = [one.sample for one in inputs]
            for start in range(0, len(inputs), 32):
                batch = numbers[start : start + 32]
                prompts = [stored_prompt(self.store, sample) for sample in batch]
                tokens = [self.store.visual(sample).tokens for sample in batch]
                if name == "question_attention":
                    maps = self.lvlm.question_attention(prompts, tokens)
                else:
                    maps = self.lvlm.saliency(prompts, tokens, QuestionRows(layer=0))
                for one, found in zip(inputs[start : start + 32], maps, strict=True):
                    shown = without_fixed(self.store, one.sample, found)
                    setattr(one, name, torch.as_tensor(shown))

    def _beside(self, sample: int) -> int:
        """Places that the LLM's sequence has beside the droppable tokens."""
        placeholders = len(self.store.visual_at(sample))
        fixed = self.store.fixed_count(self.store.image_number(sample))
        return len(self.store.prompt_ids(sample)) - placeholders + fixed

    def _run(self, contender: Contender, reducer: Reducer, samples: IntArray, budget: int) -> Part:
        scorer = self._scorers[contender.positions]
        if isinstance(reducer, LayerPruner):
            return self._inside(scorer, reducer, samples, budget, contender.positions)
        inputs = self.inputs(reducer, samples)
        began = time.perf_counter()
        self._maps(reducer, inputs)
        results = reduce_before(reducer, inputs, budget)
        reduced = time.perf_counter()
        lives = np.zeros((len(samples), self.store.max_tokens), np.uint8)
        depth = self.lvlm.num_layers
        counts = np.zeros(len(samples), np.int64)
        for row, result in enumerate(results):
            kept = result.places.cpu().numpy() if isinstance(result, Merged) else result.nonzero()
            lives[row, kept] = depth
            counts[row] = len(result.places) if isinstance(result, Merged) else result.sum()
        scored = time.perf_counter()
        if isinstance(reducer, Merger):
            merged = [one for one in results if isinstance(one, Merged)]
            scores, _ = scorer.score_merged(samples, merged, contender.positions)
        else:
            scores, _ = scorer.score_both(samples, lives > 0)
        ended = time.perf_counter()
        visual = np.repeat(counts[:, None], depth, 1)
        return Part(scores, lives, visual, reduced - began, ended - scored)

    def _inside(
        self,
        scorer: LVLMScorer,
        reducer: LayerPruner,
        samples: IntArray,
        budget: int,
        positions: Positions,
    ) -> Part:
        began = time.perf_counter()
        found = scorer.score_inside(
            samples, reducer=reducer, average=float(budget), positions=positions
        )
        passed = time.perf_counter()
        scorer.score_inside(samples, lives=found.lives, positions=positions)
        llm = time.perf_counter() - passed
        layers = np.arange(self.lvlm.num_layers)
        visual = (found.lives[..., None] > layers).sum(1)
        return Part(found.exact, found.lives, visual, max(passed - began - llm, 0.0), llm)

    def _by_type(self, scores: FloatArray) -> dict[str, float]:
        types = np.array([self.store.question_type(int(sample)) for sample in self.samples])
        return {name: round(value, 5) for name, value in by_type(types, scores).items()}

    def _summary(
        self, row: dict[str, Any], contender: Contender, reducer: Reducer, parts: Sequence[Part]
    ) -> Measured:
        scores = np.concatenate([part.scores for part in parts])
        visual = np.concatenate([part.visual for part in parts])
        count = len(self.samples)
        row |= {
            "feasible": True,
            "accuracy": round(float(scores.mean()), 5),
            "ci95": [round(bound, 5) for bound in mean_interval(scores)],
            "by_type": self._by_type(scores),
            "average_tokens": round(float(visual.mean()), 3),
            "entering_tokens": round(float(visual[:, 0].mean()), 3),
            "ms_reducer": round(1000 * sum(p.reducer_seconds for p in parts) / count, 3),
            "ms_llm": round(1000 * sum(p.llm_seconds for p in parts) / count, 3),
            "flops_llm": self.flops(visual),
            "flops_reducer": round(self._reducer_flops(contender, reducer, row["budget"])),
        }
        return Measured(row, scores, np.concatenate([part.lives for part in parts]))

    def _reducer_flops(self, contender: Contender, reducer: Reducer, budget: int) -> float:
        """Mean over the first questions, one by one."""
        chosen = self.samples[:COUNTED]
        count = self._flops_inside if isinstance(reducer, LayerPruner) else self._flops_before
        return max(sum(count(contender, one[None], budget) for one in chosen), 0) / len(chosen)

    def _flops_before(self, contender: Contender, sample: IntArray, budget: int) -> int:
        reducer = contender.make(budget)
        inputs = self.inputs(reducer, sample)

        def reduce() -> None:
            self._maps(reducer, inputs)
            reduce_before(reducer, inputs, budget)

        return counted_flops(reduce)

    def _flops_inside(self, contender: Contender, sample: IntArray, budget: int) -> int:
        reducer, positions = contender.make(budget), contender.positions
        scorer = self._scorers[positions]
        if not isinstance(reducer, LayerPruner):
            raise ValueError(f"{reducer.name!r} does not work inside the language model")
        lives: list[Lives] = []

        def reduce() -> None:
            found = scorer.score_inside(
                sample, reducer=reducer, average=float(budget), positions=positions
            )
            lives.append(found.lives)

        def replay() -> None:
            scorer.score_inside(sample, lives=lives[0], positions=positions)

        return counted_flops(reduce) - counted_flops(replay)


def reduce_before(
    reducer: Reducer, inputs: Sequence[PruneInputs], budget: int
) -> list[npt.NDArray[np.bool_] | Merged]:
    """Masks or merged tokens, checked.

    Raises:
        ValueError: The reducer refuses the budget or the inputs, or breaks its contract.
    """
    if isinstance(reducer, Merger):
        return list(reducer.merge_batch(inputs, budget))
    if not isinstance(reducer, Pruner):
        raise ValueError(f"{reducer.name!r} does not work before the language model")
    masks = reducer.prune_batch(inputs, budget)
    exactly = budget if reducer.exact else None
    return [
        checked_mask(mask, one.num_tokens, exactly, f"pruner {reducer.name!r}")
        for mask, one in zip(masks, inputs, strict=True)
    ]


def describe(contender: Contender, reducer: Reducer, budget: int) -> dict[str, Any]:
    """What a row says of a method before anything is measured."""
    return {
        "name": contender.label,
        "reducer": reducer.name,
        "fields": {key: value for key, value in contender.fields.items()},
        "version": getattr(reducer, "version", None),
        "kind": kind_of(reducer),
        "knowledge": reducer.knowledge,
        "needs": list(reducer.required()),
        "substitute": substitute_of(reducer),
        "positions": contender.positions,
        "paper": reducer.paper,
        "larger_model": reducer.larger_model,
        "budget": budget,
    }


def with_differences(
    measured: Sequence[Measured], policy: Sequence[Measured]
) -> list[dict[str, Any]]:
    """Rows with the paired difference to the policy at the same budget."""
    reference = {one.row["budget"]: one.scores for one in policy}
    rows = []
    for one in measured:
        row, other = dict(one.row), reference.get(one.row["budget"])
        if one.scores is not None and other is not None and one.row["knowledge"] != "policy":
            row["minus_policy"] = [round(v, 5) for v in paired_difference(one.scores, other)]
        rows.append(row)
    return rows
