"""LLaVA-PruMerge and PruMerge+: centres of large [CLS] attention that absorb similar tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.checks import check_integer
from tprl_env.reducers.interfaces import Knowledge, Merged, Merger, Positions, PruneInputs, given
from tprl_env.reducers.outliers import outlier_count
from tprl_env.reducers.vision import VisionSignals


@dataclass(frozen=True)
class PruMerge(Merger):
    """Merge into the tokens that [CLS] of the last block attends to (PruMerge).

    The attention a is that of the tower's last block with the heads side by side, not separated.
    Each centre i becomes v_i + sum a_j v_j over the ``neighbours`` other tokens of most similar
    keys (cosine; other centres may be among them); one more token, sum a_j v_j over all tokens
    that are no centre, is appended. Then all are projected. The order is falling attention, the
    additional token last; it stands for the place of the largest attention among its tokens.

    At a fixed budget the centres are the budget - 1 tokens of largest attention. With
    ``adaptive`` there are as many as the attention has outliers (the authors' rule): the budget
    is then ignored, and without any outlier, as when all attentions are equal, one centre stays.

    Attributes:
        neighbours: Tokens merged into each centre.
        adaptive: Whether the outliers decide the count instead of the budget.
    """

    name: ClassVar[str] = "prumerge"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("vision",)
    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025"
    )
    positions: ClassVar[Positions] = "contiguous"
    order = "method"
    neighbours: int = 32
    adaptive: bool = False

    def __post_init__(self) -> None:
        """Refuse a negative number of neighbours."""
        check_integer("neighbours", self.neighbours, 0)

    @property
    def exact(self) -> bool:
        """Whether the budget decides."""
        return not self.adaptive

    @property
    def smallest(self) -> int:
        """One centre and the additional token."""
        return 2

    def centres(self, attention: Tensor, budget: int) -> Tensor:
        """Places of the centres for an attention (n,), in the order they come out."""
        count = budget - 1
        if self.adaptive:
            count = min(max(outlier_count(attention), 1), len(attention) - 1)
        return attention.argsort(descending=True, stable=True)[:count]

    def merged(self, inputs: PruneInputs, budget: int) -> Merged:
        """Centres with their neighbours, then the rest as one token."""
        vision = given(inputs.vision)
        attention, keys = _last_block(vision)
        features = vision.features()[1:]
        centres = self.centres(attention, budget)
        keys = F.normalize(keys, dim=1)
        similarity = keys[centres] @ keys.T
        similarity[torch.arange(len(centres)), centres] = -torch.inf
        near = min(self.neighbours, len(keys) - 1)
        found = similarity.argsort(dim=1, descending=True, stable=True)[:, :near]
        added = (attention[found][..., None] * features[found]).sum(1)
        rest = attention.clone()
        rest[centres] = 0.0
        tokens = torch.cat([features[centres] + added, (rest @ features)[None]])
        outside = torch.ones_like(attention, dtype=torch.bool)
        outside[centres] = False
        last = rest.masked_fill(~outside, -torch.inf).argmax()
        return Merged(vision.project(tokens), torch.cat([centres, last[None]]))


@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with centres spread over the image as well (PruMerge+).

    With outlier ratio r and s = floor(1 / r), the places 0, floor(s / 3), 2 floor(s / 3), ... below
    n - 1 become centres too, behind those of large attention. The authors' code divides by zero
    at r = 0 and steps by zero above r = 1/3: here one centre counts as the least outliers, and
    above 1/3 there are no additional centres.

    At a fixed budget the ratio is the largest up to 1/3 whose centres fit; what is then free goes
    to the next tokens in attention.
    """

    name: ClassVar[str] = "prumerge_plus"
    paper: ClassVar[str] = (
        "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, ICCV 2025"
    )

    def centres(self, attention: Tensor, budget: int) -> Tensor:
        """Places of the centres: falling attention, then spread ones in raster order."""
        ranked: list[int] = attention.argsort(descending=True, stable=True).tolist()
        n = len(ranked)
        if self.adaptive:
            count = min(max(outlier_count(attention), 1), n - 1)
            chosen = ranked[:count] + _spread(ranked[:count], n)
            return torch.tensor(chosen[: n - 1], device=attention.device)
        wanted = budget - 1
        sizes = [c + len(_spread(ranked[:c], n)) for c in range(1, min(wanted, n // 3) + 1)]
        fitting = [c for c, size in enumerate(sizes, 1) if size <= wanted]
        first = ranked[: fitting[-1]] if fitting else []
        spread = _spread(first, n) if first else []
        free = wanted - len(first) - len(spread)
        taken = {*first, *spread}
        more = [place for place in ranked if place not in taken][:free]
        return torch.tensor(first + more + spread, device=attention.device)


def _spread(centres: list[int], n: int) -> list[int]:
    """Further places for centres of share ``len(centres) / n``, without those."""
    step, taken = n // len(centres) // 3, set(centres)
    return [place for place in range(0, n - 1, step) if place not in taken] if step else []


def _last_block(vision: VisionSignals) -> tuple[Tensor, Tensor]:
    """Attention of CLS to the patches and their keys, heads not separated: (n,), (n, C)."""
    view = vision.block(-1)
    if not view.cls:
        raise ValueError("merger 'prumerge' needs a CLS token, which this vision tower lacks")
    query, key = view.full_width("query"), view.full_width("key")
    attention = torch.softmax(query[0] @ key.T * key.shape[1] ** -0.5, -1)
    return attention[1:], key[1:]
