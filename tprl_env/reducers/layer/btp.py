"""Balanced Token Pruning: attention late, diversity and space early, nothing at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from tprl_env.reducers.interfaces import given
from tprl_env.reducers.layer.schedule import at_depth, meet_average, merged_stages
from tprl_env.reducers.layer_pruner import (
    Choice,
    LayerPruner,
    LayerView,
    Stage,
    Wants,
    mean_rows,
    rows_of_equal_counts,
)


@dataclass(frozen=True)
class BTP(LayerPruner):
    """Four cuts whose balance of attention and diversity moves with depth.

    1. Half of the k tokens by farthest-point sampling on the grid (Manhattan, from token 0), three
       tenths by attention, the rest by diversity: each next token has the largest cosine distance
       to the nearest token already chosen.
    2. Nine tenths by attention, the rest by diversity.
    3. All by attention.
    4. Nothing stays.

    Attention is that of the prompt's last token in the layer below, mean over heads. Against its
    bias towards late tokens, the candidates (3.7, 1.5 and 1.2 times as many as are picked) with an
    index below k are taken first, then the others, each in the order of attention. Our reading:
    diversity continues from what the other two have chosen, so that exactly k tokens stay. The grid
    is square, or as wide as the rounded-up root of the number of tokens.

    Attributes:
        layers: The cuts are before these layers; the authors find them on a calibration set.
        shares: Share of the full image behind each cut where no average is asked for; an average
            is met by raising them to a common power.
        depth: Depth of the model that ``layers`` belong to; ``None`` takes them literally.
    """

    layers: tuple[int, int, int, int] = (3, 6, 14, 22)
    shares: tuple[float, float, float, float] = (1 / 2, 1 / 4, 1 / 12, 0.0)
    depth: int | None = 32

    name: ClassVar[str] = "btp"
    paper: ClassVar[str] = (
        "Balanced Token Pruning: Accelerating Vision Language Models Beyond Local Optimization, "
        "NeurIPS 2025"
    )
    larger_model: ClassVar[bool] = True
    attention_shares: ClassVar[tuple[float, ...]] = (0.3, 0.9, 1.0, 1.0)
    candidates: ClassVar[tuple[float, ...]] = (3.7, 1.5, 1.2, 1.0)

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """288, 144, 48 and none of 576 before layers 3, 6, 14 and 22: average 129."""
        layers = tuple(at_depth(self.layers, self.depth, num_layers, first=1))
        if average is None:
            return merged_stages(layers, [round(share * num_tokens) for share in self.shares])
        return meet_average(self.name, layers, self._powers, num_tokens, num_layers, average)

    def _powers(self, x: float) -> Sequence[float]:
        if x == 0:
            return [float(share == 1) for share in self.shares]
        return [share ** ((1 - x) / x) if share else 0.0 for share in self.shares]

    def wants(self, stage: int) -> Wants:
        """The last token's row in the layer below, and states."""
        return Wants("last", "previous", hidden=True)

    def select(self, view: LayerView) -> Choice:
        """Choose, for samples of equal counts together."""
        layers = at_depth(self.layers, self.depth, view.num_layers, first=1)
        kinds = [kind for _, kind in sorted(dict(zip(layers, range(4), strict=True)).items())]
        kind = kinds[min(view.stage, len(kinds) - 1)]
        saliency, hidden = mean_rows(view), given(view.hidden)
        keep = torch.zeros_like(view.alive)
        for alive, count, rows in rows_of_equal_counts(view):
            chosen = self._choose(kind, saliency[rows, :alive], count)
            fill_by_diversity(hidden[rows, :alive], chosen, count)
            keep[rows, :alive] = chosen
        return Choice(keep)

    def _choose(self, kind: int, saliency: Tensor, count: int) -> Tensor:
        """Masks (G, n) of what space and attention choose."""
        alive = saliency.shape[1]
        chosen = torch.zeros_like(saliency, dtype=torch.bool)
        if kind == 0:
            chosen[:, list(spread_on_grid(alive, count // 2))] = True
        wanted = int(self.attention_shares[kind] * count)
        pool = min(int(self.candidates[kind] * wanted), alive)
        best = saliency.argsort(dim=1, descending=True, stable=True)[:, : max(pool, wanted)]
        late = (best >= count).to(torch.int8)
        best = best.gather(1, late.argsort(dim=1, stable=True))
        return chosen.scatter(1, best[:, :wanted], True)


@lru_cache(maxsize=256)
def spread_on_grid(num_tokens: int, count: int) -> tuple[int, ...]:
    """Farthest points on the grid by Manhattan distance, from token 0, ties by lowest index."""
    width = math.isqrt(max(num_tokens - 1, 0)) + 1
    place = torch.arange(num_tokens)
    rows, columns = place // width, place % width
    distance = torch.full((num_tokens,), math.inf)
    found: list[int] = []
    for _ in range(min(count, num_tokens)):
        new = int(distance.argmax()) if found else 0
        found.append(new)
        away = (rows - rows[new]).abs() + (columns - columns[new]).abs()
        distance = torch.minimum(distance, away.float())
        distance[found] = -1
    return tuple(found)


def fill_by_diversity(hidden: Tensor, chosen: Tensor, count: int) -> None:
    """Add the tokens farthest from those already in until ``count`` are.

    Args:
        hidden: (G, n, D) states.
        chosen: bool (G, n), changed in place.
        count: Tokens wanted of each sample, at most n.
    """
    missing = count - chosen.sum(1)
    most = int(missing.max())
    if most <= 0:
        return
    unit = torch.nn.functional.normalize(hidden.float(), dim=2)
    distance = 1 - unit @ unit.mT
    empty = ~chosen.any(1)
    chosen[:, 0] |= empty
    missing = missing - empty.long()
    nearest = distance.masked_fill(~chosen[:, None], math.inf).amin(2).masked_fill(chosen, -1)
    rows = torch.arange(len(chosen), device=chosen.device)
    for step in range(most):
        new = nearest.argmax(1)
        chosen[rows, new] |= step < missing
        nearest = torch.minimum(nearest, distance[rows, new])
        nearest[rows, new] = -1
