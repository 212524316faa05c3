"""SparseVLM's recycling: dropped tokens of high score are clustered, and the means go on.

Shapes: m dropped tokens, D token width, c clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clusters_of(dropped: int) -> int:
    """Clusters that the authors make of so many dropped tokens: a tenth of the best 30 %, + 1."""
    return (int(dropped * 0.3) + 1) // 10 + 1 if dropped else 0


def kept_and_recycled(alive: int, total: int) -> tuple[int, int]:
    """How many of ``total`` tokens are kept ones, and how many clusters of the dropped.

    The largest number of kept tokens whose clusters still fit; where none fit, nothing is recycled.
    """
    if total >= alive:
        return alive, 0
    for kept in range(total, 0, -1):
        recycled = clusters_of(alive - kept)
        if kept + recycled <= total:
            return kept, total - kept
    return total, 0


def recycle(states: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cluster the best 30 % (+ 1) of the dropped tokens by density peaks (DPC-kNN).

    The density of a token is ``exp(-mean(d^2))`` over its ``count`` nearest, itself included, with
    distances divided by the square root of the width; centres have the largest product of density
    and distance to anything denser. The authors break ties by noise, we by the lowest index.

    Args:
        states: (m, D).
        scores: (m,).
        count: Clusters c, at most m.

    Returns:
        int64 (c,) the clusters' centres among the m, and (c, D) the means of their members.
    """
    pool = min(max(int(len(scores) * 0.3) + 1, count), len(scores))
    chosen = scores.argsort(descending=True, stable=True)[:pool].sort().values
    members = states[chosen].float()
    distances = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / members.shape[1] ** 0.5
    near = distances.topk(min(count, pool), dim=1, largest=False).values
    density = (-near.square().mean(1)).exp()
    place = torch.arange(pool, device=states.device)
    denser = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (place[None] < place[:, None])
    )
    to_denser = distances.masked_fill(~denser, float(distances.max())).amin(1)
    centres = (to_denser * density).argsort(descending=True, stable=True)[:count].sort().values
    cluster = distances[:, centres].argmin(1)
    cluster[centres] = torch.arange(len(centres), device=states.device)
    means = torch.zeros(len(centres), members.shape[1], device=states.device)
    means.index_add_(0, cluster, members)
    sizes = torch.bincount(cluster, minlength=len(centres))
    return chosen[centres], (means / sizes[:, None]).to(states.dtype)
