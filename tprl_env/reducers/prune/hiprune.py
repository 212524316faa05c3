"""HiPrune: anchors of a middle block with their neighbours, then a late block's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tprl_env.reducers.interfaces import (
    Knowledge,
    Positions,
    PruneInputs,
    Pruner,
    given,
    keep_top,
)


@dataclass(frozen=True)
class HiPrune(Pruner):
    """Anchors, buffers and registers (HiPrune).

    The attention that a patch receives is the mean over heads and rows. The round(k alpha / 5)
    anchors receive most in the object block; each brings the places one to the left and right and
    one row up and down, clamped to the image's first and last place and not aware of row ends.
    The rest of the budget k goes to the patches that receive most in the late block. Ties go to
    the lowest index. Needs no CLS token. Attention over all pairs in two
    blocks, O(n^2) each: as long as the built-in LVLM's prefill at 576 tokens.

    Attributes:
        alpha: Share of the budget for anchors and their neighbours.
        object_block: Block of the anchors, from 0; None takes the tower's first third (8 of 24,
            which the authors count as layer 9).
    """

    name: ClassVar[str] = "hiprune"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("vision", "grid")
    paper: ClassVar[str] = (
        "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in "
        "Vision-Language Models, 2025"
    )
    positions: ClassVar[Positions] = "contiguous"
    alpha: float = 0.1
    object_block: int | None = None

    def __post_init__(self) -> None:
        """Refuse a share outside its range."""
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha!r}")

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep anchors, their neighbours and registers."""
        self.check(inputs, budget)
        vision, width = given(inputs.vision), given(inputs.grid)[1]
        number = vision.blocks // 3 if self.object_block is None else self.object_block
        early = vision.block(number).patch_attention()
        late = vision.block(vision.cls_block).patch_attention()
        # never more than the budget can hold with all neighbours
        anchors = min(round(budget * self.alpha / 5), budget // 5)
        near = keep_top(early, anchors).nonzero()[:, 0]
        offsets = torch.tensor([0, -1, 1, -width, width], device=near.device)
        keep = torch.zeros(len(early), dtype=torch.bool, device=early.device)
        keep[(near[:, None] + offsets).clamp(0, len(early) - 1).flatten()] = True
        left = int(budget) - int(keep.sum())
        return keep | keep_top(late.masked_fill(keep, -torch.inf), left)
