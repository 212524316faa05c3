"""ToMe: bipartite merging of similar tokens in every block of the vision tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.checks import check_choice
from tprl_env.reducers.interfaces import Knowledge, Merged, Merger, Positions, PruneInputs, given
from tprl_env.reducers.vision import BlockView, VisionSignals

Where = Literal["tower", "before_llm"]


@dataclass(frozen=True)
class ToMe(Merger):
    """Merge the most similar pairs of even and odd tokens (ToMe, 2210.09461).

    In each block, between attention and MLP, tokens are split by parity; each even one's partner
    is the odd one of most similar head-mean key (cosine), and the r most similar pairs become
    their size-weighted mean. CLS is never merged, nor is it in the output. Every block up to the
    one that makes the LLM's features removes the same number, the first ones one more where it
    does not divide; a block can remove no more than half of its tokens, so a small budget takes
    more from the first blocks. A merged token stands for
    the place of its odd partner, and the output is sorted by place.

    Attributes:
        proportional: Add the logarithm of a token's size to the logits of its key.
        where: "tower" is the method. "before_llm" is a CHEAP APPROXIMATION, not ToMe: the same
            merging on the finished features, by their own cosine, in as few rounds as possible.
    """

    name: ClassVar[str] = "tome"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("vision",)
    paper: ClassVar[str] = "Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461"
    positions: ClassVar[Positions] = "contiguous"
    proportional: bool = True
    where: Where = "tower"

    def __post_init__(self) -> None:
        """Refuse an unknown place."""
        check_choice("where", self.where, get_args(Where))

    def merged(self, inputs: PruneInputs, budget: int) -> Merged:
        """Merged tokens in raster order."""
        vision, n = given(inputs.vision), inputs.num_tokens
        groups = _Groups(n, vision.cls and self.where == "tower")
        if self.where == "tower":
            features = self._in_tower(vision, groups, n - budget)
        else:
            features = vision.features()[int(vision.cls) :]
            while len(features) > budget:
                features = groups.merge(features, features, len(features) - budget)
        first = int(groups.cls)
        order = groups.places[first:].argsort(stable=True)
        places = groups.places[first:][order].to(features.device)
        return Merged(vision.project(features[first:][order.to(features.device)]), places)

    def _in_tower(self, vision: VisionSignals, groups: _Groups, remove: int) -> Tensor:
        counts = _schedule(len(groups.places) - int(groups.cls), vision.last_block + 1, remove)

        def step(number: int, view: BlockView, states: Tensor) -> tuple[Tensor, Tensor | None]:
            states = groups.merge(states, view.key.mean(0), counts[number])
            bias = groups.sizes.log() if self.proportional and remove else None
            return states, None if bias is None else bias.to(states.device)

        return vision.run(step)


class _Groups:
    """Which tokens are one by now: sizes and places of the tokens that are left."""

    def __init__(self, n: int, cls: bool) -> None:
        self.cls = cls
        self.sizes = torch.ones(n + cls)
        self.places = torch.arange(-int(cls), n)  # CLS is place -1

    def merge(self, features: Tensor, metric: Tensor, count: int) -> Tensor:
        """One round of at most ``count`` merges of (t, C) features by their (t, d) metric."""
        count = min(count, (len(features) - int(self.cls)) // 2)
        if count <= 0:
            return features
        metric = F.normalize(metric, dim=1)
        scores = metric[0::2] @ metric[1::2].T
        if self.cls:
            scores[0] = -torch.inf
        best, partner = scores.max(1)
        order = best.argsort(descending=True, stable=True)
        gone, stay = order[:count], order[count:].sort().values
        goes = partner[gone]
        sizes = self.sizes.to(features.device)
        weighted = features * sizes[:, None].to(features.dtype)
        sums = weighted[1::2].index_add(0, goes, weighted[0::2][gone])
        total = sizes[1::2].index_add(0, goes, sizes[0::2][gone])
        merged = sums / total[:, None].to(features.dtype)
        self.sizes = torch.cat([sizes[0::2][stay], total])
        places = self.places.to(features.device)
        self.places = torch.cat([places[0::2][stay], places[1::2]])
        return torch.cat([features[0::2][stay], merged])


def _schedule(n: int, blocks: int, remove: int) -> list[int]:
    """How many each block removes: evenly, more where halving would not reach the budget.

    Raises:
        ValueError: So many cannot be removed in so few blocks.
    """
    budget = n - remove
    least = -(-n // 2**blocks)
    if budget < least:
        raise ValueError(
            f"ToMe in {blocks} blocks can leave {least} to {n} of {n} tokens, got a budget of "
            f"{budget}; take a larger one"
        )
    counts, tokens = [], n
    for later in reversed(range(blocks)):
        evenly = -(-(tokens - budget) // (later + 1))
        needed = tokens - budget * 2**later  # or the later blocks cannot halve it to the budget
        counts.append(min(max(evenly, needed), tokens // 2))
        tokens -= counts[-1]
    return counts
