"""Uniform grid: tokens spread evenly over the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tprl_env.reducers.interfaces import Knowledge, PruneInputs, Pruner


@dataclass(frozen=True)
class UniformPruner(Pruner):
    """Spread the budget evenly over the two-dimensional grid, for any budget.

    With h x w tokens and budget k: take r = round(sqrt(k h / w)) rows, but no fewer than k tokens
    need (ceil(k / w)) and no more than there are (min(h, k)). Row number i of the r is
    floor((i + 1/2) h / r). It holds floor((i + 1) k / r) - floor(i k / r) tokens, and token j of
    its c is in column floor((j + 1/2) w / c). All places are distinct, so exactly k are kept.

    Of several tiles each gets its share of the budget by its number of tokens (largest remainders,
    ties by tile). A tile with gaps gets tokens at even distances along its rows.
    """

    name: ClassVar[str] = "uniform"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("grid",)

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep an even lattice of ``budget`` tokens."""
        self.check(inputs, budget)
        height, width = inputs.grid or (0, 0)
        if height * width != inputs.num_tokens:
            raise ValueError(
                f"pruner 'uniform' needs a full grid, got {height}x{width} for "
                f"{inputs.num_tokens} tokens of sample {inputs.sample}"
            )
        if inputs.coords is not None:
            return _over_tiles(inputs.coords, int(budget))
        return _lattice(height, width, int(budget))


def _over_tiles(coords: Tensor, budget: int) -> Tensor:
    """Lattices in all tiles, each with its share."""
    counts = coords[:, 0].bincount()
    exact = counts.double() * budget / len(coords)
    share = exact.floor().long()
    order = (exact - share).argsort(descending=True, stable=True)
    share[order[: budget - int(share.sum())]] += 1
    keep = torch.zeros(len(coords), dtype=torch.bool)
    for tile in counts.nonzero()[:, 0].tolist():
        mine = (coords[:, 0] == tile).nonzero()[:, 0]
        row, column = coords[mine, 1:].T
        # a sequence may run through several tiles row by row
        mine = mine[(row * (int(column.max()) + 1) + column).argsort(stable=True)]
        rows, columns = len(row.unique()), len(column.unique())
        count = int(share[tile])
        if len(mine) == rows * columns:
            keep[mine] = _lattice(rows, columns, count)
        else:
            even = [(2 * i + 1) * len(mine) // (2 * count) for i in range(count)]
            keep[mine[even]] = True
    return keep


def _lattice(height: int, width: int, budget: int) -> Tensor:
    """An even lattice of ``budget`` tokens of a full grid."""
    keep = torch.zeros(height, width, dtype=torch.bool)
    if budget == 0:
        return keep.flatten()
    rows = round((budget * height / width) ** 0.5)
    rows = min(max(rows, -(-budget // width), 1), height, budget)
    for i in range(rows):
        row = (2 * i + 1) * height // (2 * rows)
        count = (i + 1) * budget // rows - i * budget // rows
        for j in range(count):
            keep[row, (2 * j + 1) * width // (2 * count)] = True
    return keep.flatten()
