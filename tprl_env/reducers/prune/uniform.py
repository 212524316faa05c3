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
        keep = torch.zeros(height, width, dtype=torch.bool)
        rows = round((budget * height / width) ** 0.5)
        rows = min(max(rows, -(-budget // width), 1), height, budget)
        for i in range(rows):
            row = (2 * i + 1) * height // (2 * rows)
            count = (i + 1) * budget // rows - i * budget // rows
            for j in range(count):
                keep[row, (2 * j + 1) * width // (2 * count)] = True
        return keep.flatten()
