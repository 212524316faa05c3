"""What an observation holds: its keys, their types and where they come from, once for everyone.

An observation has a part that the sample alone decides (`look_up`) and one that changes with the
episode (`progress`). The environments show both; a store's rows become tensors for the policy from
both (`tprl_env.policy.observations`); the fast path of RLlib carries the second with sample numbers
and looks the first up in its module.

Legend: B rows, N = ``max_tokens``, d code width, Q question tokens, d_q query width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from tprl_env.data.features.placement import Placement, raster
from tprl_env.data.features.source import TokenSource

__all__ = ["VALUE_LIMIT", "Observation", "has_areas", "look_up", "observation_space", "progress"]

Observation = dict[str, npt.NDArray[Any]]
Mask = type[np.bool_] | type[np.int8]

VALUE_LIMIT = 65504.0  # largest float16: stores keep tokens in half precision


def has_areas(source: TokenSource) -> bool:
    """Whether observations of a source hold ``areas``: its images have no grid in common."""
    return not getattr(source, "one_grid", True)


def look_up(
    source: TokenSource,
    samples: npt.NDArray[np.int64],
    query: str,
    masks: Mask = np.bool_,
    areas: bool | None = None,
) -> Observation:
    """The part of an observation that the sample alone decides.

    Args:
        source: The samples.
        samples: int64 (B,), sample numbers.
        query: "mean" or "tokens".
        masks: Type of ``query_mask``; Gymnasium's spaces want int8.
        areas: Add ``areas``; by default where the source's images have no grid in common.

    Returns:
        ``tokens`` float32 (B, N, d) and ``query`` float32 (B, d_q), or, for ``query="tokens"``,
        ``query`` float32 (B, Q, d_q) and ``query_mask`` (B, Q). ``areas`` float32
        (B, N, 5): picture, top, left, bottom, right of each token as shares of its picture, zero
        where padding.
    """
    parts = {"tokens": np.asarray(source.codes(samples), np.float32)}
    if has_areas(source) if areas is None else areas:
        parts["areas"] = _areas(source, samples)
    if query == "tokens":
        question, exists = source.query_tokens(samples)
        parts["query"] = np.asarray(question, np.float32)
        parts["query_mask"] = np.asarray(exists, masks)
    else:
        parts["query"] = np.asarray(source.query(samples), np.float32)
    return parts


def _areas(source: TokenSource, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """(B, N, 5) from the source's own areas, or its grids."""
    found = np.zeros((len(samples), source.max_tokens, 5), np.float32)
    own = getattr(source, "areas", None)  # sources of one grid need not have it
    for row, sample in enumerate(samples.tolist()):
        if own is None:
            coords = raster(*source.grid(sample))
            areas = Placement.in_line(coords).areas()
        else:
            areas = own(sample)
        found[row, : len(areas)] = areas
    return found


def progress(
    alive: npt.ArrayLike,
    step: npt.ArrayLike,
    budget: npt.ArrayLike | None = None,
    masks: Mask = np.bool_,
) -> Observation:
    """The part of an observation that changes with the episode.

    Args:
        alive: bool (B, N), tokens still in play.
        step: Steps taken so far, a number or (B,).
        budget: Count wanted at the end, a number or (B,); None leaves it out.
        masks: Type of ``alive``; Gymnasium's spaces want int8.

    Returns:
        ``alive`` (B, N), ``step`` float32 (B, 1) and, with a budget, ``budget`` float32 (B, 1);
        new arrays.
    """
    parts: Observation = {"alive": np.array(alive, masks)}
    rows = len(parts["alive"])
    parts["step"] = _column(step, rows)
    if budget is not None:
        parts["budget"] = _column(budget, rows)
    return parts


def observation_space(
    source: TokenSource, query: str, max_steps: int, has_budget: bool
) -> spaces.Dict:
    """Space of one row of ``look_up(..., masks=np.int8) | progress(..., masks=np.int8)``."""
    count = source.max_tokens

    def box(*shape: int, low: float = -VALUE_LIMIT, high: float = VALUE_LIMIT) -> spaces.Box:
        return spaces.Box(low, high, shape, np.float32)

    parts: dict[str, spaces.Space[Any]] = {"tokens": box(count, source.code_width)}
    if has_areas(source):
        parts["areas"] = box(count, 5)
    if query == "tokens":
        parts["query"] = box(source.max_question_tokens, source.query_width)
        parts["query_mask"] = spaces.Box(0, 1, (source.max_question_tokens,), np.int8)
    else:
        parts["query"] = box(source.query_width)
    parts["alive"] = spaces.Box(0, 1, (count,), np.int8)
    parts["step"] = box(1, low=0.0, high=float(max_steps))
    if has_budget:
        parts["budget"] = box(1, low=1.0, high=float(count))
    return spaces.Dict(parts)


def _column(value: npt.ArrayLike, rows: int) -> npt.NDArray[np.float32]:
    column = np.empty((rows, 1), np.float32)
    column[:, 0] = value
    return column
