"""PACT: prune by queries, keys and norms before one layer, then merge what is left by density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tprl_env.reducers.interfaces import given, keep_top
from tprl_env.reducers.layer.schedule import at_depth, one_cut
from tprl_env.reducers.layer_pruner import Choice, LayerPruner, LayerView, Stage, Wants


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
    than the schedule wants and as many as possible; a share above ``keep`` prunes less. Our
    reading: a cluster counts once in later attention, while the authors add the logarithm of its
    size to the logits (proportional attention), which needs a mask in every later layer.

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
        """Choose sample by sample; clusters are found one after the other."""
        hidden, importance = given(view.hidden), self.importance(view)
        keys = given(view.turned_keys).transpose(1, 2).flatten(2).float()
        keep = torch.zeros_like(view.alive)
        states = hidden.clone()
        for row in range(len(keep)):
            alive, wanted = int(view.alive[row].sum()), int(view.keep[row])
            if not alive:
                continue
            best = max(1, int(self.keep * alive), wanted)
            chosen = keep_top(importance[row, :alive], best).nonzero()[:, 0]
            unit = torch.nn.functional.normalize(keys[row, :alive], dim=1)
            distance = 1 - unit @ unit.T
            inner = distance[chosen][:, chosen]
            density = (-(inner / self.scale).square()).exp().sum(1)
            cutoff = self.cutoff if view.average is None else -1.0
            cluster = clusters(inner, density, cutoff)
            if view.average is not None and len(chosen) > wanted:
                cutoff, cluster = self._searched(inner, density, wanted)
            centres = chosen[cluster == torch.arange(len(cluster), device=cluster.device)]
            keep[row, centres] = True
            merged = means(hidden[row, :alive], distance, chosen, cluster, cutoff * self.margin)
            states[row, centres] = merged.to(states.dtype)
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

    def _searched(self, distance: Tensor, density: Tensor, wanted: int) -> tuple[float, Tensor]:
        """A cutoff that leaves ``wanted`` clusters, or the fewest less that bisection finds."""
        low, high = 0.0, 2.0 + 1e-6  # of cosine distances
        place = torch.arange(len(distance), device=distance.device)
        found = clusters(distance, density, high)
        for _ in range(16):
            middle = (low + high) / 2
            cluster = clusters(distance, density, middle)
            count = int((cluster == place).sum())
            if count <= wanted:
                high, found = middle, cluster
            else:
                low = middle
            if count == wanted:
                break
        return high, found


def clusters(distance: Tensor, density: Tensor, cutoff: float) -> Tensor:
    """Density-based clustering with an upper bound on the distance to the centre.

    Args:
        distance: (m, m).
        density: (m,); of equal ones the lowest index is the denser.
        cutoff: Largest distance of a member to its centre; below zero every token is a centre.

    Returns:
        int64 (m,), each token's centre; a centre's is itself.
    """
    place = torch.arange(len(density), device=density.device)
    if cutoff < 0:
        return place
    denser = (density[None] > density[:, None]) | (
        (density[None] == density[:, None]) & (place[None] < place[:, None])
    )
    rival = denser & (distance <= cutoff)
    centre_of = torch.full_like(place, -1)
    while bool((free := centre_of < 0).any()):
        new = free & ~(rival & free[None]).any(1)
        near = distance.masked_fill(~new[None], torch.inf)
        closest, which = near.min(1)
        joins = free & (closest <= cutoff)
        centre_of = torch.where(joins, which, centre_of)
        centre_of = torch.where(new, place, centre_of)
    return centre_of


def means(
    hidden: Tensor, distance: Tensor, chosen: Tensor, cluster: Tensor, margin: float
) -> Tensor:
    """Mean states (c, D) of the clusters, ascending by centre, with pruned tokens near a centre.

    Args:
        hidden: (n, D) all tokens.
        distance: (n, n) between them.
        chosen: (m,) tokens that were clustered.
        cluster: (m,) each one's centre, among the m.
        margin: Distance to the nearest centre within which a pruned token takes part.
    """
    centres, number = cluster.unique(return_inverse=True)
    member_of = torch.full((len(hidden),), -1, dtype=torch.int64, device=hidden.device)
    closest, which = distance[:, chosen[centres]].min(1)
    pruned = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    pruned[chosen] = False
    near = pruned & (closest <= margin)
    member_of[near] = which[near]
    member_of[chosen] = number
    inside = member_of >= 0
    total = torch.zeros(len(centres), hidden.shape[1], device=hidden.device)
    total.index_add_(0, member_of[inside], hidden[inside].float())
    return total / torch.bincount(member_of[inside], minlength=len(centres))[:, None]
