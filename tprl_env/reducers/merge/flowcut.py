"""FlowCut: drop tokens inside the vision tower by what flows through each block."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tprl_env.reducers.interfaces import (
    Knowledge,
    Merged,
    Merger,
    Positions,
    PruneInputs,
    given,
    keep_top,
)
from tprl_env.reducers.vision import BlockView


@dataclass(frozen=True)
class FlowCut(Merger):
    """Drop by CLS attention, value similarity and value size over blocks (FlowCut).

    With a the head-mean CLS attention, u the head-mean softmax of the CLS value's products with the
    patches' values and |v|_1 of the head-mean values, a block's score is
    (a / sum a + u / sum u) |v|_1, and the cumulative score is half the old one plus half the new
    one (the first block's score to begin with). r counts the blocks that follow, the last one not
    counted. Where r is even, round((N - k) / sqrt(r) (1 - (H(a) / log N)^2)) of the N patches go,
    lowest first and never below the budget k; at r = 0 k stay. H is the entropy of a, 0 log 0 = 0,
    and an attention of zero everywhere counts as even (the authors' code gives NaN for both).
    Dropping changes what later blocks see, so the tokens are new, but each has its own place.
    """

    name: ClassVar[str] = "flowcut"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("vision",)
    paper: ClassVar[str] = (
        "FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language "
        "Models, NeurIPS 2025"
    )
    positions: ClassVar[Positions] = "contiguous"

    def merged(self, inputs: PruneInputs, budget: int) -> Merged:
        """The tokens that survive the tower, in raster order."""
        vision = given(inputs.vision)
        places = torch.arange(inputs.num_tokens)
        total: Tensor | None = None

        def step(number: int, view: BlockView, states: Tensor) -> tuple[Tensor, None]:
            nonlocal places, total
            attention = share(view.cls_attention().mean(0))
            score = flow_score(attention, view.value)
            total = score if total is None else 0.5 * total + 0.5 * score
            count = len(score)
            # the last block's features are what the LLM gets; a tower of one block is cut there
            left = max(vision.last_block - number - 1, 0)
            if left % 2 or count <= budget:
                return states, None
            keep = keep_top(total, max(budget, count - drops(attention, budget, left)))
            total, places = total[keep], places.to(keep.device)[keep]
            return torch.cat([states[:1], states[1:][keep]]), None

        tokens = vision.project(vision.run(step)[1:])
        return Merged(tokens, places.to(tokens.device))


def share(values: Tensor) -> Tensor:
    """Values over their sum; even where the sum is zero."""
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / len(values))


def flow_score(attention: Tensor, value: Tensor) -> Tensor:
    """Score (n,) of one block from shares of attention (n,) and values (H, 1 + n, d)."""
    similar = torch.softmax(value[:, :1] @ value[:, 1:].transpose(1, 2), -1)[:, 0].mean(0)
    return (attention + share(similar)) * value[:, 1:].mean(0).abs().sum(1)


def drops(attention: Tensor, budget: int, left: int) -> int:
    """How many of N patches go with ``left`` blocks to follow; all above the budget at 0."""
    n = len(attention)
    if left == 0:
        return n - budget
    entropy = -float(torch.special.xlogy(attention, attention).sum())
    return max(0, round((n - budget) / math.sqrt(left) * (1 - (entropy / math.log(n)) ** 2)))
