"""The policy on alive tokens only: rows of similar length together, dead tokens not computed.

After the first step of an episode most tokens are dead. The policy masks them out, so leaving them
out gives the same numbers, up to rounding, for less work: attention costs tokens squared.

Shapes: B rows, N visual tokens, L tokens of the longest row of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from tprl_env.policy.network import DEAD_LOGIT, PolicyOutput

__all__ = ["forward_alive_only", "groups_by_length"]

Forward = Callable[[Mapping[str, Tensor]], PolicyOutput]

# A group of its own costs one more pass over the layers; with less to save, padding is cheaper.
SHORTER = 0.6
LEAST_SAVED = 16


def forward_alive_only(policy: Forward, obs: Mapping[str, Tensor]) -> PolicyOutput:
    """What ``policy(obs)`` gives, up to rounding, without computing dead tokens.

    Args:
        policy: The policy, or another function of its observations.
        obs: Batched observation as `PruningPolicy.forward` takes it.

    Returns:
        Logits (B, N) with ``DEAD_LOGIT`` where dead, and values (B,).
    """
    alive = obs["alive"].bool()
    count = alive.sum(1)
    groups = groups_by_length(count)
    longest = [max(int(count[rows[0]]), 1) for rows in groups]  # no token left is legal
    width = alive.shape[1]
    if longest == [width]:
        return policy(obs)
    logits, values = [], []
    for rows, length in zip(groups, longest, strict=True):
        few = {name: part[rows] for name, part in obs.items()}
        found = policy(few) if length == width else _shortened(policy, few, length)
        logits.append(found.logits)
        values.append(found.value)
    back = torch.cat(groups).argsort()
    return PolicyOutput(torch.cat(logits)[back], torch.cat(values)[back])


def _shortened(policy: Forward, obs: dict[str, Tensor], length: int) -> PolicyOutput:
    """Policy on the alive tokens of each row, moved to the front and back again."""
    alive, tokens = obs["alive"].bool(), obs["tokens"]
    place = alive.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :length]
    moved = tokens.gather(1, place[..., None].expand(-1, -1, tokens.shape[2]))
    few = {**obs, "tokens": moved, "alive": alive.gather(1, place), "index": place}
    if "areas" in obs:
        few["areas"] = obs["areas"].gather(1, place[..., None].expand(-1, -1, 5))
    found = policy(few)
    dead = torch.full(alive.shape, DEAD_LOGIT, dtype=found.logits.dtype, device=alive.device)
    return PolicyOutput(dead.scatter(1, place, found.logits), found.value)


def groups_by_length(count: Tensor) -> list[Tensor]:
    """Row numbers of groups of similar length, longest first between and within groups.

    Args:
        count: int (B,), alive tokens of each row, B >= 1.

    Returns:
        int64 tensors that hold every row once. A row begins a new group when it has at most
        `SHORTER` of the tokens of its group's longest, and at least `LEAST_SAVED` fewer.
    """
    ordered, rows = count.sort(descending=True, stable=True)
    lengths = ordered.tolist()
    starts = [0]
    for place, length in enumerate(lengths):
        longest = lengths[starts[-1]]
        if length <= SHORTER * longest and longest - length >= LEAST_SAVED:
            starts.append(place)
    return list(rows.tensor_split(starts[1:]))
