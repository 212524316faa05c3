"""AutoPrune (NeurIPS 2025): a retention curve over the layers for every sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tprl_env.reducers.layer.schedule import at_depth, check_average
from tprl_env.reducers.layer_pruner import (
    Choice,
    LayerView,
    RankingLayerPruner,
    Stage,
    Wants,
    attention,
    mean_rows,
)
from tprl_env.reducers.selection import top_k_mask

_EPSILON = 1e-12


@dataclass(frozen=True)
class AutoPrune(RankingLayerPruner):
    """Tokens leave before every layer along a logistic curve whose steepness the sample decides.

    After the first layers the mutual information I between text and visual tokens is taken from
    the attention of the text to the image, one joint distribution per head, summed over heads.
    The share that stays at layer l is proportional to ``1 / (1 + exp(k (l - x0)))`` with
    ``k = k0 - gamma I``, and the whole curve is scaled (and cut off at all tokens) so that every
    sample spends the same average. Tokens are ranked by the attention of the text in the layer
    below, mean over words and heads.

    Two parts of the authors' code are left out. Its cut behind layer 0 ranks by the vision tower's
    CLS attention, and a rule inside the language model is shown nothing of the tower: prune with
    `fastervlm` before it instead. Its recycling, as SparseVLM's, would add tokens on top of the
    curve, whose counts a sample has spent already. A k below
    zero, where early layers would keep less than late ones, is zero: one count for all layers.

    Attributes:
        k0: Steepness without information.
        gamma: What a unit (nat) of information takes from it.
        x0: Layer of the curve's middle.
        first: First layer that tokens leave before.
        depth: Depth of the model that ``x0``, ``k0``, ``gamma`` and ``first`` belong to.
        share: Average share of the tokens where no average is asked for (64 of 576).
    """

    k0: float = 0.4
    gamma: float = 0.2
    x0: float = 14.9
    first: int = 2
    depth: int | None = 32
    share: float = 1 / 9

    name: ClassVar[str] = "autoprune"
    paper: ClassVar[str] = (
        "AutoPrune: Each Complexity Deserves a Pruning Policy, NeurIPS 2025, arXiv 2509.23931"
    )
    positions: ClassVar[Literal["original", "contiguous"]] = "contiguous"
    larger_model: ClassVar[bool] = True

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """The curve of a sample without information; samples differ in counts, not in average.

        Without an average, a ninth of the tokens, or as few as the first layers allow.
        """
        (begin,) = at_depth([self.first], self.depth, num_layers, first=1)
        low = begin * num_tokens / num_layers
        if average is None:
            average = min(max(self.share * num_tokens, low), num_tokens)
        check_average(self.name, average, low, num_tokens)
        total = round(average * num_layers) - begin * num_tokens
        weights = self._weights(torch.zeros(1), begin, num_layers)
        counts = spend(weights, torch.tensor([max(total, 0)]), torch.tensor([num_tokens]))
        return tuple(Stage(begin + i, keep) for i, keep in enumerate(counts[0].tolist()))

    def _weights(self, information: Tensor, begin: int, num_layers: int) -> Tensor:
        """(B, layers from ``begin`` on): the logistic curves of samples, not scaled yet."""
        scale = 1.0 if self.depth is None else self.depth / num_layers
        layers = torch.arange(begin, num_layers, device=information.device) * scale
        steepness = (self.k0 - self.gamma * information.double()).clamp(min=0)
        return torch.sigmoid(-steepness[:, None] * (layers - self.x0))

    def wants(self, stage: int) -> Wants:
        """Rows of the text in the layer below."""
        return Wants("text", "previous")

    def saliency(self, view: LayerView) -> Tensor:
        """Mean over words and heads."""
        return mean_rows(view)

    def select(self, view: LayerView) -> Choice:
        """Decide the curves in the first stage, and keep the largest in every one."""
        if view.stage == 0:
            view.memory["counts"] = self._counts(view)
        keep = view.memory["counts"][:, view.stage]
        return Choice(top_k_mask(self.saliency(view), view.alive, keep))

    def _counts(self, view: LayerView) -> Tensor:
        """(B, stages) counts of the samples' curves, which cost what the schedule costs."""
        weights = self._weights(mutual_information(view), view.layer, view.num_layers)
        return spend(weights, view.plan.sum(1), view.full)


def spend(weights: Tensor, total: Tensor, most: Tensor) -> Tensor:
    """Spread tokens over layers in proportion to weights, at most all of them on each.

    Args:
        weights: (B, S) positive, not growing along a row.
        total: int64 (B,) tokens to spend.
        most: int64 (B,) tokens of each layer.

    Returns:
        int64 (B, S), not growing along a row; its sum is the smaller of total and S * most.
    """
    number = torch.arange(weights.shape[1], device=weights.device)
    rest = weights.flip(1).cumsum(1).flip(1)
    # with the first j layers full, the others share what is left; j is the first that fits
    factor = (total[:, None] - number * most[:, None]) / rest
    full = (factor * weights <= most[:, None]).double().argmax(1)
    exact = factor.gather(1, full[:, None]) * weights
    exact = torch.where(number < full[:, None], most[:, None], exact)
    exact = exact.clamp(min=0).minimum(most[:, None].to(exact.dtype))
    counts = exact.floor()
    missing = (total - counts.sum(1)).clamp(min=0)
    fraction = (exact - counts).masked_fill(counts >= most[:, None], -1)
    rank = fraction.argsort(dim=1, descending=True, stable=True).argsort(1)
    counts += (rank < missing[:, None]) & (counts < most[:, None])
    return counts.long()


def mutual_information(view: LayerView) -> Tensor:
    """(B,) nats between words and visual tokens, summed over heads.

    Each head's rows onto the visual tokens, divided by their sum, are a joint distribution p:
    ``I = sum p log(p / (p_word p_token))``.
    """
    joint = attention(view).double()
    joint = joint / joint.sum((2, 3), keepdim=True).clamp(min=_EPSILON)
    product = joint.sum(3, keepdim=True) * joint.sum(2, keepdim=True)
    terms = joint * (joint.clamp(min=_EPSILON).log() - product.clamp(min=_EPSILON).log())
    return terms.sum((1, 2, 3)).clamp(min=0).float()
