"""PACT: prune by queries, keys and norms before one layer, then merge what is left by density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tprl_env.reducers.interfaces import given
from tprl_env.reducers.layer.schedule import at_depth, one_cut
from tprl_env.reducers.layer_pruner import (
    Choice,
    LayerPruner,
    LayerView,
    Stage,
    Wants,
    rows_of_equal_counts,
)
from tprl_env.reducers.selection import top_k_mask


@dataclass(frozen=True)
class PACT(LayerPruner):
    """Unimportant tokens are pruned, the others clustered by their keys and replaced by means.

    Importance of a token: softmax over the visual tokens of mean query times key (no rotary turn,
    mean over heads), times the norm of its state. The best ``keep`` are clustered by the cosine
    distance d of their turned keys: density ``sum exp(-(d / scale)^2)``; a token is a centre where
    no denser unassigned one lies within the cutoff, those within the cutoff of a centre join the
    nearest, and so on until all are assigned. A cluster becomes the mean state of its members and
    of the pruned tokens within ``margin`` cutoffs, at its centre's place.

    The number of clusters follows from the image. Where an average is asked for, the cutoff is
    searched for each sample instead, by at most 16 bisections, so that no more clusters are left
    than the schedule wants and as many as possible; a share above ``keep`` prunes less. Each
    clustering is O(n^2) and as many rounds as centres wait for one another. Our
    reading: a cluster counts once in later attention, while the authors add the logarithm of its
    size to the logits (proportional attention). That is an additive mask in every later layer and
    decoding step, while prefill here runs without one (a causal mask kept by the fused kernel);
    clusters of many tokens weigh less than in the authors' figures.

    Attributes:
        layer: The cut is before this layer.
        keep: Share of the tokens that are not pruned.
        cutoff: Distance within which tokens are merged, where no average is asked for.
        scale: Of the density.
        margin: Cutoffs within which pruned tokens join a cluster.
        depth: Depth of the model that ``layer`` belongs to; ``None`` takes it literally.
    """

    layer: int = 4
    keep: float = 0.55
    cutoff: float = 0.21
    scale: float = 2.0
    margin: float = 1.5
    depth: int | None = 28

    name: ClassVar[str] = "pact"
    paper: ClassVar[str] = (
        "PACT: Pruning and Clustering-Based Token Reduction for Faster Visual Language Models, "
        "CVPR 2025"
    )
    larger_model: ClassVar[bool] = True
    merges: ClassVar[bool] = True

    @property
    def exact(self) -> bool:
        """The number of clusters follows from the image."""
        return False

    def __post_init__(self) -> None:
        """Refuse shares and distances that are none.

        Raises:
            ValueError: ``keep`` is not in (0, 1], or a distance is negative.
        """
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be in (0, 1], the share not to prune, got {self.keep}")
        if not (self.cutoff >= 0 and self.margin >= 0 and self.scale > 0):
            raise ValueError(
                f"cutoff and margin must be at least 0 and scale above 0, got {self.cutoff}, "
                f"{self.margin} and {self.scale}"
            )

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """One cut; without an average the share that is not pruned, of which clusters are fewer."""
        (layer,) = at_depth([self.layer], self.depth, num_layers)
        if average is None:
            return (Stage(layer, max(1, int(self.keep * num_tokens))),)
        return one_cut(self.name, num_tokens, num_layers, layer, average)

    def wants(self, stage: int) -> Wants:
        """States, queries and keys of the visual tokens."""
        return Wants(hidden=True, vectors=True)

    def select(self, view: LayerView) -> Choice:
        """Choose, for samples of equal counts together; clusters come one after the other."""
        hidden, importance = given(view.hidden), self.importance(view)
        keys = given(view.turned_keys).transpose(1, 2).flatten(2).float()
        keep = torch.zeros_like(view.alive)
        states = hidden.clone()
        for alive, wanted, rows in rows_of_equal_counts(view):
            if not alive:
                continue
            best = max(1, int(self.keep * alive), wanted)
            values = importance[rows, :alive]
            everything = torch.ones_like(values, dtype=torch.bool)
            kept = top_k_mask(values, everything, torch.full_like(rows, best))
            chosen = kept.nonzero()[:, 1].view(len(rows), -1)
            unit = torch.nn.functional.normalize(keys[rows, :alive], dim=2)
            distance = 1 - unit @ unit.mT
            each = torch.arange(len(rows), device=rows.device)[:, None, None]
            inner = distance[each, chosen[:, :, None], chosen[:, None]]
            density = (-(inner / self.scale).square()).exp().sum(2)
            cutoff = self.cutoff if view.average is None else -1.0
            cutoffs = torch.full((len(rows),), cutoff, dtype=torch.float64, device=rows.device)
            if view.average is not None and chosen.shape[1] > wanted:
                cutoffs, cluster = self._searched(inner, density, wanted)
            else:
                cluster = clusters(inner, density, cutoffs)
            centre, merged = means(
                hidden[rows, :alive], distance, chosen, cluster, cutoffs * self.margin
            )
            keep[rows, :alive] = centre
            merged = torch.where(centre[..., None], merged.to(states.dtype), hidden[rows, :alive])
            states[rows, :alive] = merged
        return Choice(keep, states)

    def importance(self, view: LayerView) -> Tensor:
        """(B, M): how much the mean query looks for a token, times the norm of its state."""
        queries, keys = given(view.queries).float(), given(view.keys).float()
        alive = view.alive[:, None, :, None]
        mean = (queries * alive).sum(2) / alive.sum(2).clamp(min=1)
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        logits = (mean[:, :, None] * keys).sum(3) * queries.shape[3] ** -0.5
        weights = logits.masked_fill(~view.alive[:, None], -torch.inf).softmax(2).mean(1)
        return weights * given(view.hidden).float().norm(dim=2)

    def _searched(self, distance: Tensor, density: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        """Cutoffs that leave ``wanted`` clusters, or the fewest less that bisection finds."""
        low = torch.zeros(len(distance), dtype=torch.float64, device=distance.device)
        high = low + (2.0 + 1e-6)  # of cosine distances
        denser = _denser(density)
        searching = torch.ones_like(low, dtype=torch.bool)
        for _ in range(16):
            middle = (low + high) / 2
            count = _number_of_clusters(distance, denser, middle)
            fits = searching & (count <= wanted)
            low = torch.where(searching & ~fits, middle, low)
            high = torch.where(fits, middle, high)
            searching = searching & (count != wanted)
            if not bool(searching.any()):
                break
        return high, clusters(distance, density, high)


def _denser(density: Tensor) -> Tensor:
    """Bool (G, m, m): whether the second token is denser; of equal ones the lower index is."""
    place = torch.arange(density.shape[1], device=density.device)
    ahead, behind = density[:, None], density[..., None]
    return (ahead > behind) | ((ahead == behind) & (place < place[:, None]))


def _number_of_clusters(distance: Tensor, denser: Tensor, cutoff: Tensor) -> Tensor:
    """Int64 (G,), as :func:`clusters` finds; products of zeros and ones are faster than `any`."""
    within = (distance <= cutoff.to(distance.dtype)[:, None, None]).float()
    rival = within * denser
    free = torch.ones(*distance.shape[:2], 1, device=distance.device)
    count = torch.zeros(len(distance), dtype=torch.int64, device=distance.device)
    while bool((free > 0).any()):
        new = free * (rival @ free == 0)
        count += new.sum((1, 2)).long()
        free = free * (within @ new == 0) * (1 - new)
    return count


def clusters(distance: Tensor, density: Tensor, cutoff: Tensor) -> Tensor:
    """Density-based clustering with an upper bound on the distance to the centre.

    Args:
        distance: (G, m, m).
        density: (G, m); of equal ones the lowest index is the denser.
        cutoff: (G,) largest distance of a member to its centre; below zero every token is a
            centre.

    Returns:
        int64 (G, m), each token's centre; a centre's is itself.
    """
    place = torch.arange(density.shape[1], device=density.device).expand_as(density)
    limit = cutoff.to(distance.dtype)[:, None]
    rival = _denser(density) & (distance <= limit[..., None])
    centre_of = torch.where(limit < 0, place, -1)
    while bool((free := centre_of < 0).any()):
        new = free & ~(rival & free[:, None]).any(2)
        closest, which = distance.masked_fill(~new[:, None], torch.inf).min(2)
        joins = free & (closest <= limit)
        centre_of = torch.where(joins, which, centre_of)
        centre_of = torch.where(new, place, centre_of)
    return centre_of


def means(
    hidden: Tensor, distance: Tensor, chosen: Tensor, cluster: Tensor, margin: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean states of the clusters, with pruned tokens near a centre.

    Args:
        hidden: (G, n, D) all tokens.
        distance: (G, n, n) between them.
        chosen: (G, m) tokens that were clustered, ascending.
        cluster: (G, m) each one's centre, among the m.
        margin: (G,) distance to the nearest centre within which a pruned token takes part.

    Returns:
        bool (G, n), the centres, and float32 (G, n, D), at each centre the mean of its cluster.
    """
    size, count, width = hidden.shape
    centre = torch.zeros(size, count, dtype=torch.bool, device=hidden.device)
    own = cluster == torch.arange(cluster.shape[1], device=hidden.device)
    centre.scatter_(1, chosen, own)
    closest, which = distance.masked_fill(~centre[:, None], torch.inf).min(2)
    # those that take part in nothing go to a spare place behind the last
    member_of = torch.where(closest <= margin.to(distance.dtype)[:, None], which, count)
    member_of.scatter_(1, chosen, chosen.gather(1, cluster))
    flat = (member_of + torch.arange(size, device=hidden.device)[:, None] * (count + 1)).flatten()
    total = torch.zeros(size * (count + 1), width, device=hidden.device)
    total.index_add_(0, flat, hidden.flatten(0, 1).float())
    members = torch.bincount(flat, minlength=len(total)).clamp(min=1)
    return centre, (total / members[:, None]).view(size, count + 1, width)[:, :count]
