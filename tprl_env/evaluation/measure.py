"""Compare pruners on one store at matched budgets.

Every method keeps the same number of tokens for every question (top-k), or, for a calibrated
threshold, the same number on average; each answer is scored by the LVLM with only those tokens.
Intervals: Wilson's score interval where every score is 0 or 1, the normal interval of the mean
otherwise; differences between two methods are paired by question.

Shapes: S samples, N visual tokens (padded to ``max_tokens``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tprl_env.checks import quoted
from tprl_env.env.budgets import Budget, is_share, tokens_of
from tprl_env.env.scorer import Scorer
from tprl_env.evaluation.intervals import mean_interval
from tprl_env.evaluation.results import RUN_KEY
from tprl_env.files import write_atomically
from tprl_env.reducers.interfaces import Pruner, checked_mask, prune_inputs
from tprl_env.reducers.vision import VisionSignals

if TYPE_CHECKING:
    from tprl_env.data.features.store import FeatureStore

CHUNK = 256  # questions pruned and scored together; bounds memory, changes no result

FloatArray = npt.NDArray[np.float32]
BoolArray = npt.NDArray[np.bool_]
Vision = Callable[[npt.NDArray[np.uint8]], VisionSignals]


@dataclass(frozen=True)
class MethodResult:
    """One method at one budget.

    Attributes:
        name: Method, as in the table.
        knowledge: ``policy``, ``heuristic``, ``oracle``, ``random``, or ``none`` for all tokens.
        budget: Wanted number of tokens; of a share the mean over the questions, rounded.
        mean_tokens: Mean number of tokens kept.
        std_tokens: Standard deviation of that number over the questions.
        accuracy: Mean score in [0, 1].
        ci95: 95 % interval of ``accuracy``.
        by_type: Mean score per question type.
        seconds: Wall time of pruning and scoring.
        scores: Score of each question, ``(S,)``.
        kept: Tokens kept for each question, ``(S,)``.
        share: The budget as a share of each picture's tokens, where it was given as one.
        tokens_by_type: Mean number of tokens kept per question type.
    """

    name: str
    knowledge: str
    budget: int
    mean_tokens: float
    std_tokens: float
    accuracy: float
    ci95: tuple[float, float]
    by_type: dict[str, float]
    seconds: float
    scores: FloatArray
    kept: npt.NDArray[np.int64]
    share: float | None = None
    tokens_by_type: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The row of ``results.json``; per-question arrays are left to the Parquet file."""
        return {
            "name": self.name,
            "knowledge": self.knowledge,
            "budget": self.budget,
            **({} if self.share is None else {"share": self.share}),
            "mean_tokens": round(self.mean_tokens, 3),
            "std_tokens": round(self.std_tokens, 3),
            "accuracy": round(self.accuracy, 5),
            "ci95": [round(self.ci95[0], 5), round(self.ci95[1], 5)],
            "by_type": {name: round(value, 5) for name, value in self.by_type.items()},
            "seconds": round(self.seconds, 2),
            **(
                {"tokens_by_type": {name: round(n, 3) for name, n in self.tokens_by_type.items()}}
                if self.std_tokens
                else {}
            ),
        }


def by_type(question_types: npt.NDArray[np.str_], scores: FloatArray) -> dict[str, float]:
    """Mean score per question type, in alphabetical order."""
    return {
        str(one): float(scores[question_types == one].mean()) for one in np.unique(question_types)
    }


def summarise(
    name: str,
    knowledge: str,
    budget: int,
    scores: FloatArray,
    kept: npt.NDArray[np.int64],
    question_types: npt.NDArray[np.str_],
    seconds: float,
    share: float | None = None,
) -> MethodResult:
    """Turn per-question scores into one row of the comparison."""
    return MethodResult(
        name=name,
        knowledge=knowledge,
        budget=budget,
        mean_tokens=float(kept.mean()),
        std_tokens=float(kept.std()),
        accuracy=float(scores.mean()),
        ci95=mean_interval(scores),
        by_type=by_type(question_types, scores),
        seconds=seconds,
        scores=scores,
        kept=kept,
        share=share,
        tokens_by_type=by_type(question_types, kept.astype(np.float32)),
    )


def check_budgets(budgets: Sequence[Budget], max_tokens: int) -> None:
    """Refuse budgets that no image of the store can meet.

    Raises:
        ValueError: A budget is neither in ``[1, max_tokens]`` nor a share in (0, 1), or none is
            given.
    """
    whole = (int, np.integer)
    bad = [
        budget
        for budget in budgets
        if not (is_share(budget) or (isinstance(budget, whole) and 1 <= budget <= max_tokens))
    ]
    if bad or not budgets:
        raise ValueError(
            f"budgets must be one or more counts in [1, {max_tokens}] for this store, or shares "
            f"such as 0.2, got {list(budgets)}; drop {bad or 'nothing, add one'}"
        )


def wanted_count(budget: Budget, tokens: npt.NDArray[np.integer[Any]]) -> int:
    """The count that a budget means; of a share the mean over pictures of so many tokens."""
    if not is_share(budget):
        return int(budget)
    return round(float(np.mean([tokens_of(budget, int(one)) for one in tokens])))


def one_count(budget: Budget, store: FeatureStore) -> int:
    """A budget as one count for all pictures of a store.

    Raises:
        ValueError: It is a share and the pictures differ in size.
    """
    tokens = np.array([store.image_count(image) for image in range(store.num_images)])
    if is_share(budget) and tokens.min() != tokens.max():
        raise ValueError(
            f"the pictures of {store.location} have {tokens.min()} to {tokens.max()} tokens, so "
            f"the budget {budget:g} is no single count; give counts"
        )
    return wanted_count(budget, tokens[:1])


def keep_masks(
    pruner: Pruner,
    store: FeatureStore,
    samples: npt.NDArray[np.int64],
    budget: Budget,
    vision: Vision | None = None,
) -> BoolArray:
    """Masks of one pruner, padded to the store's ``max_tokens``.

    Args:
        pruner: Any pruner.
        store: Store that the samples are rows of.
        samples: Sample numbers, ``(B,)``.
        budget: Number of tokens to keep; samples with fewer keep all. Or a share of each sample's.
        vision: An LVLM's ``vision_signals``, for pruners that look into the tower.

    Returns:
        ``(B, max_tokens)`` bool, False where padding.

    Raises:
        ValueError: What the pruner gave for a sample is no mask of its tokens, or keeps another
            number than an exact pruner promises; pruner and sample are named.
    """
    if is_share(budget):
        keep = store.exists(samples)
        counts = np.array([tokens_of(budget, int(total)) for total in keep.sum(1)])
        for count in np.unique(counts).tolist():
            own = counts == count
            keep[own] = keep_masks(pruner, store, samples[own], count, vision)
        return keep
    keep = store.exists(samples)
    tokens = keep.sum(1)
    rows = np.arange(len(samples))  # of a budget that nothing can meet: the pruner refuses it
    if isinstance(budget, (int, np.integer)) and budget <= store.max_tokens:
        rows = np.flatnonzero(tokens >= budget)  # smaller pictures keep all they have
    inputs = [prune_inputs(store, int(samples[row]), _reads(pruner), vision) for row in rows]
    wanted: Any = budget  # what is no count is the pruner's to refuse
    masks = pruner.prune_batch(inputs, wanted) if len(rows) else []
    if not isinstance(masks, Sequence) or len(masks) != len(rows):
        raise ValueError(
            f"pruner {pruner.name!r} must give {len(rows)} masks, one per sample, got "
            f"{quoted(masks)}"
        )
    for row, mask in zip(rows, masks, strict=True):
        where = f"pruner {pruner.name!r} on sample {store.id(int(samples[row]))!r}"
        exactly = int(budget) if pruner.exact else None
        keep[row, : tokens[row]] = checked_mask(mask, int(tokens[row]), exactly, where)
    return keep


def _reads(pruner: Pruner) -> tuple[str, ...]:
    """Fields to read for a pruner; a policy looks at the question in either form."""
    needs = pruner.required()
    return (*needs, "query", "query_tokens") if "codes" in needs else needs


def iterate_chunks(samples: npt.NDArray[np.int64]) -> Iterator[slice]:
    """Slices of at most ``CHUNK`` samples."""
    for start in range(0, len(samples), CHUNK):
        yield slice(start, min(start + CHUNK, len(samples)))


def evaluate_method(
    name: str,
    pruner: Pruner,
    store: FeatureStore,
    scorer: Scorer,
    budget: Budget,
    samples: npt.NDArray[np.int64],
    vision: Vision | None = None,
) -> MethodResult:
    """Score one pruner at one budget on the given samples."""
    start = time.perf_counter()
    scores = np.zeros(len(samples), dtype=np.float32)
    kept = np.zeros(len(samples), dtype=np.int64)
    for part in iterate_chunks(samples):
        keep = keep_masks(pruner, store, samples[part], budget, vision)
        scores[part] = scorer(samples[part], keep)
        kept[part] = keep.sum(1)
    question_types = np.array([store.question_type(int(sample)) for sample in samples])
    seconds = time.perf_counter() - start
    share = float(budget) if is_share(budget) else None
    count = wanted_count(budget, store.exists(samples).sum(1) if share else kept)
    return summarise(name, pruner.knowledge, count, scores, kept, question_types, seconds, share)


def evaluate_full(store: FeatureStore, samples: npt.NDArray[np.int64]) -> MethodResult:
    """The unpruned LVLM, from the exact scores that encoding stored."""
    scores = np.asarray(store.full_scores("exact"))[samples]
    kept = store.exists(samples).sum(1).astype(np.int64)
    question_types = np.array([store.question_type(int(sample)) for sample in samples])
    return summarise("all tokens", "none", int(kept.max()), scores, kept, question_types, 0.0)


def evaluate(
    store: FeatureStore,
    scorer: Scorer,
    pruners: Mapping[str, Pruner | Callable[[Any], Pruner]],
    budgets: Sequence[Budget],
    *,
    samples: npt.NDArray[np.int64] | None = None,
    vision: Vision | None = None,
    on_result: Callable[[MethodResult], None] | None = None,
) -> list[MethodResult]:
    """Compare pruners at the same budgets.

    Args:
        store: Encoded split to evaluate on.
        scorer: Exact-match scorer of the same LVLM, any :class:`~tprl_env.scoring.cache.Scorer`.
        pruners: Name to pruner, or name to a function from the budget to a pruner (a threshold
            calibrated for that budget, for instance).
        budgets: Token counts, or shares in (0, 1) of each picture's tokens.
        samples: Sample numbers to use; all by default.
        vision: An LVLM's ``vision_signals``, for pruners that look into the tower.
        on_result: Called after each row, for live output.

    Returns:
        The unpruned LVLM first, then one row per method and budget.

    Raises:
        ValueError: No samples, a budget out of range, two that are one count here, or a scorer of
            another score_kind.
    """
    chosen = np.arange(len(store), dtype=np.int64) if samples is None else samples
    if not len(chosen):
        raise ValueError("there is nothing to evaluate: got 0 samples, expected at least 1")
    check_budgets(budgets, store.max_tokens)
    if any(map(is_share, budgets)):
        tokens = store.exists(chosen).sum(1)
        found = {budget: wanted_count(budget, tokens) for budget in budgets}
        if len(set(found.values())) < len(found):
            raise ValueError(f"some budgets are one count here: {found}; drop those that double")
    score_kind = getattr(scorer, "score_kind", "exact")
    if score_kind != "exact":
        raise ValueError(f"evaluation needs a scorer of score_kind 'exact', got {score_kind!r}")
    results = [evaluate_full(store, chosen)]
    if on_result is not None:
        on_result(results[0])
    for name, entry in pruners.items():
        for budget in budgets:
            pruner = entry if isinstance(entry, Pruner) else entry(budget)
            results.append(evaluate_method(name, pruner, store, scorer, budget, chosen, vision))
            if on_result is not None:
                on_result(results[-1])
    return results


def write_per_question(
    results: Sequence[MethodResult],
    ids: Sequence[str],
    question_types: Sequence[str],
    path: Path,
    run: str = "",
) -> None:
    """Write every single score as Parquet, so that others can compute their own statistics.

    Columns: ``method``, ``knowledge``, ``budget``, ``sample``, ``question_type``, ``kept``,
    ``score``. The metadata of the schema holds ``run`` of the results file that this belongs to.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [
        pa.table(
            {
                "method": [result.name] * len(ids),
                "knowledge": [result.knowledge] * len(ids),
                "budget": pa.array([result.budget] * len(ids), pa.int32()),
                "sample": list(ids),
                "question_type": list(question_types),
                "kept": pa.array(result.kept, pa.int32()),
                "score": pa.array(result.scores, pa.float32()),
            }
        )
        for result in results
    ]
    table = pa.concat_tables(tables)
    if run:
        table = table.replace_schema_metadata({RUN_KEY: run.encode()})
    write_atomically(path, lambda stream: pq.write_table(table, stream))
