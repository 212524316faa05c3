"""VisPruner: important tokens by [CLS] attention, then diverse ones; TPRL's demonstrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.reducers.interfaces import Knowledge, Positions, PruneInputs, Pruner, given


@dataclass(frozen=True)
class VisPruner(Pruner):
    """Keep important tokens, then drop duplicates among the rest (VisPruner, 2412.01818v2).

    The ``floor(budget * important_ratio)`` tokens of largest [CLS] attention stay. The others,
    in falling attention, are split by the parity of their place; of the even ones the
    ``drop_per_round`` most similar (cosine of tower features) to any odd one go. What is left,
    even ones by falling similarity before the odd ones, enters the next round, until the rest of
    the budget remains. Where the official code assumes an even number, the even places get the
    extra token and a round drops no more than is due, so exactly ``budget`` tokens stay.

    Attributes:
        important_ratio: Share of the budget given to attention; 1 is FasterVLM, 0 pure
            deduplication.
        drop_per_round: Tokens dropped per round.
    """

    name: ClassVar[str] = "vispruner"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("tower", "cls_attention")
    paper: ClassVar[str] = (
        "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in "
        "VLMs (VisPruner), ICCV 2025, arXiv 2412.01818"
    )
    positions: ClassVar[Positions] = "contiguous"
    important_ratio: float = 0.5
    drop_per_round: int = 8

    def __post_init__(self) -> None:
        """Refuse parameters outside their range."""
        if not 0.0 <= self.important_ratio <= 1.0:
            raise ValueError(f"important_ratio must lie in [0, 1], got {self.important_ratio!r}")
        if self.drop_per_round < 1:
            raise ValueError(f"drop_per_round must be at least 1, got {self.drop_per_round!r}")

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep important tokens and the least redundant of the others."""
        self.check(inputs, budget)
        order = given(inputs.cls_attention).argsort(dim=0, descending=True, stable=True)
        important = int(budget * self.important_ratio)
        diverse = self._deduplicate(given(inputs.tower), order[important:], budget - important)
        keep = torch.zeros(inputs.num_tokens, dtype=torch.bool, device=order.device)
        keep[order[:important]] = True
        keep[diverse] = True
        return keep

    def _deduplicate(self, tower: Tensor, rest: Tensor, count: int) -> Tensor:
        """Indices (count,) that survive among ``rest``, given in falling attention."""
        if count == 0:
            return rest[:0]
        features = F.normalize(tower, dim=1)
        similarity = features @ features.T
        while len(rest) > count:
            even, odd = rest[0::2], rest[1::2]
            drop = min(self.drop_per_round, len(rest) - count, len(even))
            nearest = similarity[even][:, odd].amax(1)
            falling = nearest.argsort(dim=0, descending=True, stable=True)
            rest = torch.cat([even[falling[drop:]], odd])
        return rest
