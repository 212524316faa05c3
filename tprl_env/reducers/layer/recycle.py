"""SparseVLM's recycling: dropped tokens of high score are clustered, and the means go on.

Shapes: G samples, m dropped tokens of each, D token width, c clusters.
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
        states: (G, m, D), samples that dropped the same number of tokens.
        scores: (G, m).
        count: Clusters c, at most m.

    Returns:
        int64 (G, c) the clusters' centres among the m, ascending, and (G, c, D) the means of their
        members.
    """
    pool = min(max(int(scores.shape[1] * 0.3) + 1, count), scores.shape[1])
    chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :pool].sort(1).values
    members = _rows(states.float(), chosen)
    distances = torch.cdist(members, members, compute_mode="donot_use_mm_for_euclid_dist")
    distances = distances / members.shape[2] ** 0.5
    near = distances.topk(min(count, pool), dim=2, largest=False).values
    density = (-near.square().mean(2)).exp()
    place = torch.arange(pool, device=states.device)
    denser = (density[:, None] > density[..., None]) | (
        (density[:, None] == density[..., None]) & (place[None] < place[:, None])
    )
    farthest = distances.amax((1, 2), keepdim=True)
    to_denser = torch.where(denser, distances, farthest).amin(2)
    ranked = (to_denser * density).argsort(dim=1, descending=True, stable=True)
    centres = ranked[:, :count].sort(1).values
    index = centres[:, None].expand(-1, pool, -1)
    cluster = distances.gather(2, index).argmin(2)
    cluster.scatter_(1, centres, torch.arange(count, device=states.device).expand_as(centres))
    member_of = torch.nn.functional.one_hot(cluster, count).to(members.dtype).transpose(1, 2)
    means = member_of @ members / member_of.sum(2, keepdim=True)
    return chosen.gather(1, centres), means.to(states.dtype)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """(G, k, D) rows ``index`` (G, k) of (G, m, D)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
