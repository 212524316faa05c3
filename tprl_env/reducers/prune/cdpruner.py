"""CDPruner: a determinantal point process of similarity and relevance to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from tprl_env.checks import check_choice
from tprl_env.reducers.interfaces import Knowledge, Positions, PruneInputs, Pruner, given
from tprl_env.reducers.text_relevance import NEEDS, Relevance, query_cosine

_EPSILON = 1e-6
_NO_VOLUME = 1e-5  # of the largest; below it float32 cancellation would decide


@dataclass(frozen=True)
class CDPruner(Pruner):
    """Keep tokens that are relevant and unlike each other (CDPruner).

    The kernel is r_i cos(h_i, h_j) r_j with the relevance r brought to [0, 1] (plus 1e-6 above
    the line); greedy maximum a posteriori, ties by lowest index, O(n k^2). Equal relevance, which
    divides by zero in the authors' code, counts as 1 everywhere, so that similarity alone decides.
    Once nothing adds volume (the kernel's rank is reached), the most relevant of the rest fill the
    budget.

    Attributes:
        relevance: "clip", the paper's: the mean of -cos(e_i, t_m) over CLIP's text segments (in
            CLIP the least similar patches are the relevant ones); or "query", a SUBSTITUTE for
            LVLMs without CLIP's text tower: the mean cosine of the projected tokens with the
            question's embeddings (with its plain sign).
    """

    name: ClassVar[str] = "cdpruner"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    paper: ClassVar[str] = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in "
        "MLLMs (CDPruner), NeurIPS 2025"
    )
    positions: ClassVar[Positions] = "contiguous"
    larger_model: ClassVar[bool] = True
    relevance: Relevance = "clip"

    def __post_init__(self) -> None:
        """Refuse an unknown relevance."""
        check_choice("relevance", self.relevance, get_args(Relevance))

    def required(self) -> tuple[str, ...]:
        """The tokens and what the relevance reads."""
        return tuple(dict.fromkeys((*self.needs, *NEEDS[self.relevance])))

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep ``budget`` tokens of large determinant."""
        self.check(inputs, budget)
        if self.relevance == "query":
            raw = query_cosine(inputs)
        else:
            image, text = given(inputs.clip_image), given(inputs.clip_text)
            raw = -(F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).mean(1)
        relevance = scaled(raw)
        features = F.normalize(given(inputs.tokens), dim=1)
        kernel = relevance[:, None] * (features @ features.T) * relevance
        return greedy_determinant(kernel, relevance, int(budget))


def scaled(raw: Tensor) -> Tensor:
    """Values (n,) brought to [0, 1], plus 1e-6 above the line; 1 where all are equal."""
    spread = raw.max() - raw.min()
    return (raw - raw.min() + _EPSILON) / spread if spread > 0 else torch.ones_like(raw)


def greedy_determinant(kernel: Tensor, relevance: Tensor, count: int) -> Tensor:
    """Mask of ``count`` places of (n, n) ``kernel`` with a large determinant."""
    gain = kernel.diagonal().clone()
    least = _NO_VOLUME * gain.max()
    keep = torch.zeros(len(gain), dtype=torch.bool, device=gain.device)
    rows = kernel.new_zeros(count, len(gain))
    for number in range(count):
        best = gain.masked_fill(keep, -torch.inf).argmax()
        if gain[best] <= least:
            best = relevance.masked_fill(keep, -torch.inf).argmax()
        else:
            earlier = rows[:number, best] @ rows[:number]
            rows[number] = (kernel[best] - earlier) / gain[best].sqrt()
            gain = gain - rows[number] ** 2
        keep[best] = True
    return keep
