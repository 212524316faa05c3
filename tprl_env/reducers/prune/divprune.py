"""DivPrune: greedy max-min diversity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.reducers.interfaces import Knowledge, Positions, PruneInputs, Pruner, given


@dataclass(frozen=True)
class DivPrune(Pruner):
    """Greedy max-min diversity of the projected tokens (DivPrune).

    The distance is 1 - cosine. The first token is the one farthest from its nearest other; then
    always the one farthest from everything chosen, ties by lowest index.
    """

    name: ClassVar[str] = "divprune"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    paper: ClassVar[str] = (
        "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models, CVPR 2025"
    )
    positions: ClassVar[Positions] = "contiguous"

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep ``budget`` tokens that are far from each other."""
        self.check(inputs, budget)
        features = F.normalize(given(inputs.tokens), dim=1)
        distance = 1.0 - features @ features.T
        away = distance.clone().fill_diagonal_(math.inf).amin(1)
        keep = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        pick = away.argmax()
        nearest = torch.full_like(away, math.inf)
        for _ in range(budget):
            keep[pick] = True
            nearest = torch.minimum(nearest, distance[pick])
            pick = nearest.masked_fill(keep, -math.inf).argmax()
        return keep
