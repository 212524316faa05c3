"""Selection by rank, once for every method that ranks tokens: top-k, ties, dead tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["top_k_mask"]


def top_k_mask(values: Tensor, alive: Tensor, count: Tensor) -> Tensor:
    """Keep the ``count`` largest alive values of each row, ties by lowest index.

    Args:
        values: float (B, N); dead entries are ignored.
        alive: bool (B, N).
        count: int64 (B,); clamped to the number of alive tokens, because one budget serves images
            of different sizes. Where a user asks for a budget, ``Pruner.check`` refuses more.

    Returns:
        bool (B, N) with ``min(count, alive.sum(1))`` True per row.
    """
    ranked = torch.where(alive, values, -math.inf)
    # two stable sorts: an alive token of value -inf still comes before every dead one
    order = ranked.argsort(dim=1, descending=True, stable=True)
    living_first = (
        alive.gather(1, order).to(torch.int8).argsort(dim=1, descending=True, stable=True)
    )
    order = order.gather(1, living_first)
    places = torch.arange(values.shape[1], device=values.device)
    chosen = places < torch.minimum(count, alive.sum(1))[:, None]
    return torch.zeros_like(alive).scatter_(1, order, chosen)
