"""SCOPE: tokens that cover the others, weighted by [CLS] attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.reducers.interfaces import Knowledge, Positions, PruneInputs, Pruner, given


@dataclass(frozen=True)
class Scope(Pruner):
    """Greedy facility location times saliency (SCOPE, NeurIPS 2025).

    With S the cosines of the tower's features and c what is covered so far (0 at first), the gain
    of token j is sum_i max(0, S_ij - c_i), times its CLS attention to the power ``alpha``; the
    largest is taken and c becomes max(c, S_j). Ties, also those of an attention of zero
    everywhere or of equal features once one is taken, go to the lowest index. Every
    pick sums over all pairs, O(k n^2), which takes longer than the built-in LVLM's prefill from
    576 tokens on.

    Attributes:
        alpha: Power of the attention; 0 leaves coverage alone.
    """

    name: ClassVar[str] = "scope"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("tower", "cls_attention")
    paper: ClassVar[str] = "SCOPE: Saliency-Coverage Oriented Token Pruning, NeurIPS 2025"
    positions: ClassVar[Positions] = "contiguous"
    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a negative power, which would divide by an attention of zero."""
        if not self.alpha >= 0.0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha!r}")

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep ``budget`` tokens of large weighted coverage."""
        self.check(inputs, budget)
        features = F.normalize(given(inputs.tower), dim=1)
        similarity = features @ features.T
        weight = given(inputs.cls_attention) ** self.alpha
        covered = torch.zeros_like(weight)
        keep = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        for _ in range(budget):
            gain = (similarity - covered[:, None]).clamp(min=0).sum(0) * weight
            best = gain.masked_fill(keep, -torch.inf).argmax()
            keep[best] = True
            covered = torch.maximum(covered, similarity[:, best])
        return keep
