"""VisionZip: dominant tokens by [CLS] attention, the others merged by their keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from tprl_env.checks import check_integer
from tprl_env.reducers.interfaces import (
    Knowledge,
    Merged,
    Merger,
    Positions,
    PruneInputs,
    given,
    keep_top,
)


@dataclass(frozen=True)
class VisionZip(Merger):
    """Dominant tokens and contextual ones (VisionZip).

    Dominant: the CLS token itself and the patches of largest head-sum CLS attention. Contextual:
    of the R other patches every max(1, R // contextual)-th is a target; each remaining one goes
    to the target of most similar head-mean key, and a target becomes itself plus the mean of
    what it got (itself alone where it got nothing). Then all are projected.

    The budget counts everything that the LLM sees: dominant=191 and contextual=30 of the authors'
    code are 190 patches + CLS + 30 = 221. The order is CLS, dominant patches in raster order,
    contextual ones in raster order; CLS, which has no place, comes first as place 0.

    Attributes:
        contextual: Contextual tokens; None takes 10 of 64 of the budget, which is each of the
            published settings 162 + 30, 108 + 20 and 54 + 10.
    """

    name: ClassVar[str] = "visionzip"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("vision",)
    paper: ClassVar[str] = (
        "VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025"
    )
    positions: ClassVar[Positions] = "contiguous"
    order = "method"
    contextual: int | None = None

    def __post_init__(self) -> None:
        """Refuse a negative number of contextual tokens."""
        if self.contextual is not None:
            check_integer("contextual", self.contextual, 0)

    @property
    def smallest(self) -> int:
        """The contextual tokens and CLS."""
        return 1 + (self.contextual or 0)

    def split(self, budget: int) -> tuple[int, int]:
        """Dominant patches and contextual tokens of a budget; CLS is the one between."""
        contextual = round(budget * 10 / 64) if self.contextual is None else self.contextual
        contextual = min(contextual, budget - 1)
        return budget - contextual - 1, contextual

    def merged(self, inputs: PruneInputs, budget: int) -> Merged:
        """CLS, dominant patches, contextual tokens."""
        vision = given(inputs.vision)
        view = vision.block(vision.cls_block)
        attention = view.cls_attention().sum(0)
        patches, contextual = self.split(budget)
        features = vision.features()
        cls, features = features[:1], features[1:]
        dominant = keep_top(attention, patches)
        kept, rest = dominant.nonzero()[:, 0], (~dominant).nonzero()[:, 0]
        step = max(1, len(rest) // max(contextual, 1))
        at = torch.arange(contextual, device=rest.device) * step
        free = torch.ones(len(rest), dtype=torch.bool, device=rest.device)
        free[at] = False
        targets, others = rest[at], rest[free]
        gathered = features[targets]
        if contextual and len(others):
            keys = F.normalize(view.mean_keys(), dim=1)
            goes = (keys[others] @ keys[targets].T).argmax(1)
            sums = torch.zeros_like(gathered).index_add_(0, goes, features[others])
            counts = goes.bincount(minlength=contextual).clamp(min=1)
            gathered = gathered + sums / counts[:, None]
        tokens = torch.cat([cls, features[kept], gathered])
        return Merged(vision.project(tokens), torch.cat([kept.new_zeros(1), kept, targets]))
