"""HoloV: every part of the image gets a share of the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.checks import check_integer
from tprl_env.reducers.interfaces import (
    Knowledge,
    Positions,
    PruneInputs,
    Pruner,
    given,
    keep_top,
)


@dataclass(frozen=True)
class HoloV(Pruner):
    """Quotas for crops by attention and variety, attention inside them (HoloV).

    The raster sequence is cut into ``crops`` runs (the first ones one longer where it does not
    divide). In a run of m tokens S are the cosines of the projected tokens with a diagonal of zero,
    mu_i = sum_j S_ij / (m - 1) and var_i = sum_j (S_ij - mu_i)^2 / (m - 1); a token scores
    1000 a_i + alpha var_i mean|1000 a| / mean|var|, and a run the mean of its tokens. A run of one
    token scores a alone, as in the authors' code. Quotas are floor(k score / sum of scores), one
    more for the best runs until k is reached; inside a run the attention alone decides. What a
    quota exceeds a run by goes to the best runs with room (the authors' code pads with zeros).
    Scores of zero everywhere make equal quotas; equal tokens (no variance) leave the attention.

    Attributes:
        crops: Number of runs.
        alpha: Weight of the variance.
    """

    name: ClassVar[str] = "holov"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("tokens", "cls_attention")
    paper: ClassVar[str] = (
        'Don\'t Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context '
        "Retention (HoloV), NeurIPS 2025"
    )
    positions: ClassVar[Positions] = "contiguous"
    crops: int = 16
    alpha: float = 0.09

    def __post_init__(self) -> None:
        """Refuse a number of crops below one."""
        check_integer("crops", self.crops, 1)

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep each run's quota of largest attention."""
        self.check(inputs, budget)
        attention, tokens = given(inputs.cls_attention), given(inputs.tokens)
        runs = torch.arange(len(tokens)).tensor_split(min(self.crops, len(tokens)))
        scores = [self._score(tokens[run], attention[run]) for run in runs]
        counts = quotas(scores, [len(run) for run in runs], int(budget))
        keep = [keep_top(attention[run], count) for run, count in zip(runs, counts, strict=True)]
        return torch.cat(keep)

    def _score(self, tokens: Tensor, attention: Tensor) -> float:
        m = len(tokens)
        if m == 1:
            return float(attention[0])
        features = F.normalize(tokens, dim=1)
        similarity = (features @ features.T).fill_diagonal_(0.0)
        mean = similarity.sum(1, keepdim=True) / (m - 1)
        variance = ((similarity - mean) ** 2).sum(1) / (m - 1)
        scaled, size = 1000 * attention, variance.mean()
        if size > 0:
            scaled = scaled + self.alpha * variance * scaled.abs().mean() / size
        return float(scaled.mean())


def quotas(scores: list[float], sizes: list[int], budget: int) -> list[int]:
    """Tokens for each run, ``budget`` in all and none above its size."""
    total = sum(scores)
    weights = [one / total if total > 0 else 1 / len(scores) for one in scores]
    counts = [int(weight * budget) for weight in weights]
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    for i in best[: budget - sum(counts)]:
        counts[i] += 1
    counts = [min(count, size) for count, size in zip(counts, sizes, strict=True)]
    while (surplus := budget - sum(counts)) > 0:
        for i in [i for i in best if counts[i] < sizes[i]][:surplus]:
            counts[i] += 1
    return counts
