"""Schedules of reducers inside the language model: average tokens, depth, counts.

Published layers belong to a model of 32 decoder layers. In a model of L layers a method cuts at
the same SHARE of the depth: before layer ``floor(layer * L / 32 + 1/2)``, at least before the first
one its rule can see (1 where it needs the layer below) and at most before the last. Stages that
then fall on one layer are one, with the count of the last of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

from tprl_env.reducers.layer_pruner import Stage


def average_tokens(stages: Sequence[Stage], num_tokens: int, num_layers: int) -> float:
    """Mean over all layers of the visual tokens that enter a layer.

    FastV with K = 2 of 32 layers and 166 of 576 tokens: (2 * 576 + 30 * 166) / 32 = 191.6.
    """
    total, alive, start = 0.0, float(num_tokens), 0
    for stage in stages:
        total += alive * (stage.layer - start)
        alive, start = min(alive, stage.keep), stage.layer
    return (total + alive * (num_layers - start)) / num_layers


def at_depth(layers: Sequence[int], of: int | None, num_layers: int, first: int = 0) -> list[int]:
    """Published layers in a model of another depth; see the head of this module.

    Args:
        layers: Layers in the published model.
        of: Its depth; ``None`` takes ``layers`` literally.
        num_layers: Depth of this model.
        first: The first layer that the rule can cut before.

    Raises:
        ValueError: A literal layer that the model lacks, or no layer left to cut before.
    """
    if first >= num_layers:
        raise ValueError(
            f"this rule cuts before layer {first} or later, the model has {num_layers}"
        )
    if of is None:
        bad = [layer for layer in layers if not first <= layer < num_layers]
        if bad:
            raise ValueError(
                f"layers must lie in [{first}, {num_layers - 1}] in a model of {num_layers} "
                f"decoder layers, got {bad}"
            )
        return list(layers)
    scaled = [math.floor(layer * num_layers / of + 0.5) for layer in layers]
    return [min(max(layer, first), num_layers - 1) for layer in scaled]


def merged_stages(layers: Sequence[int], counts: Sequence[int]) -> tuple[Stage, ...]:
    """Stages in the order of layers; of several on one layer the last count holds."""
    return tuple(Stage(layer, count) for layer, count in sorted(dict(zip(layers, counts)).items()))  # noqa: B905


def exact_count(num_tokens: int, num_layers: int, layer: int, average: float) -> float:
    """Tokens, not rounded, that one cut must leave: (average * L - layer * N) / (L - layer)."""
    return (average * num_layers - layer * num_tokens) / (num_layers - layer)


def check_average(name: str, average: float, low: float, high: float) -> None:
    """Refuse an average that the schedule cannot have.

    Raises:
        ValueError: The message has the feasible range.
    """
    if not low - 1e-9 <= average <= high + 1e-9:  # also NaN
        raise ValueError(
            f"{name} can have an average of {low:.4g} to {high:.4g} visual tokens per layer here, "
            f"got {average:g}; ask for one in that range, or cut before an earlier layer"
        )


def one_cut(
    name: str, num_tokens: int, num_layers: int, layer: int, average: float
) -> tuple[Stage, ...]:
    """One stage that meets an average as closely as whole tokens allow; at least one token stays.

    Raises:
        ValueError: The average is out of reach; the message has the range.
    """
    low = average_tokens([Stage(layer, 1)], num_tokens, num_layers)
    check_average(name, average, low, num_tokens)
    count = round(exact_count(num_tokens, num_layers, layer, average))
    return (Stage(layer, min(max(count, 1), num_tokens)),)


@lru_cache(maxsize=256)
def meet_average(
    name: str,
    layers: tuple[int, ...],
    shares: Callable[[float], Sequence[float]],
    num_tokens: int,
    num_layers: int,
    average: float,
) -> tuple[Stage, ...]:
    """Several stages that meet an average as closely as whole tokens allow; remembered.

    Args:
        name: Of the method, for the message.
        layers: Where the stages are, ascending.
        shares: From a number in [0, 1] to the share of the full image that each stage keeps,
            growing with it.
        num_tokens: Visual tokens of the full image.
        num_layers: Decoder layers of the model.
        average: Wanted average.

    Raises:
        ValueError: The average is out of reach; the message has the range.
    """

    def exact(x: float) -> list[float]:
        return [share * num_tokens for share in shares(x)]

    def mean(counts: Sequence[float]) -> float:
        # of coinciding layers the last count holds, as in `merged_stages`
        kept = sorted(dict(zip(layers, counts, strict=True)).items())
        ends = [layer for layer, _ in kept[1:]] + [num_layers]
        spans = [end - layer for (layer, _), end in zip(kept, ends, strict=True)]
        total = sum(span * count for span, (_, count) in zip(spans, kept, strict=True))
        return (kept[0][0] * num_tokens + total) / num_layers

    check_average(name, average, mean(exact(0.0)), mean(exact(1.0)))
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(exact(middle)) < average else (low, middle)
    stages = list(merged_stages(layers, [round(count) for count in exact(high)]))
    return _rounded_well(stages, num_tokens, num_layers, average)


def _rounded_well(
    stages: list[Stage], num_tokens: int, num_layers: int, average: float
) -> tuple[Stage, ...]:
    """Make up for what rounding cost, token by token: long stages first, order kept."""
    ends = [stage.layer for stage in stages[1:]] + [num_layers]
    spans = [end - stage.layer for stage, end in zip(stages, ends, strict=True)]
    for i in 3 * sorted(range(len(stages)), key=lambda i: -spans[i]):
        missing = (average - average_tokens(stages, num_tokens, num_layers)) * num_layers
        above = stages[i - 1].keep if i else num_tokens
        below = stages[i + 1].keep if i + 1 < len(stages) else 0
        count = stages[i].keep + min(max(round(missing / spans[i]), -1), 1)
        stages[i] = Stage(stages[i].layer, min(max(count, below), above))
    return tuple(stages)
