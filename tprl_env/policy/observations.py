"""Observations as tensors for a policy outside the environment: from a store or prune inputs.

Keys and types are those of `tprl_env.env.observations`, which this module calls where there is a
store. `observe_inputs` and `with_progress` have twins there and stay apart: prune inputs are
tensors of unequal length without a store, and a mask that the policy has just drawn is on its
device, where numpy cannot reach it without a copy.

Shapes: B batch, N tokens (padded), d code width, Q question tokens, d_q query width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.data.features.placement import Placement, raster
from tprl_env.data.features.source import TokenSource
from tprl_env.env.observations import Observation, look_up, progress
from tprl_env.policy.network import PolicyConfig

if TYPE_CHECKING:
    from tprl_env.reducers.interfaces import PruneInputs


def observe(
    source: TokenSource,
    samples: npt.ArrayLike,
    config: PolicyConfig,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """First observation of samples: all tokens alive, step 0, no budget yet.

    Args:
        source: The store.
        samples: Sample numbers (B,).
        config: Says whether the question comes as its mean or token by token.
        device: Where the tensors go.

    Returns:
        ``tokens`` (B, N, d), ``alive`` bool (B, N), ``step`` (B, 1), ``query`` and, for
        ``config.query == "tokens"``, ``query_mask``.
    """
    numbers = np.asarray(samples, dtype=np.int64)
    areas = True if config.coordinates else None
    parts = look_up(source, numbers, config.query, areas=areas)
    parts |= progress(source.exists(numbers), step=0)
    return to_tensors(parts, device)


def to_tensors(parts: Observation, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Arrays as tensors on a device; memory is shared where the array allows it."""
    return {
        name: torch.from_numpy(np.require(part, requirements=["C", "W"])).to(device)
        for name, part in parts.items()
    }


def observe_inputs(
    inputs: Sequence[PruneInputs], config: PolicyConfig, *, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The same from prune inputs, padded to the longest of them."""
    tokens, alive = _pad([_field(one, "codes") for one in inputs])
    obs = {"tokens": tokens}
    if config.query == "tokens":
        obs["query"], obs["query_mask"] = _pad([_field(one, "query_tokens") for one in inputs])
    else:
        obs["query"] = torch.stack([_field(one, "query") for one in inputs])
    if config.coordinates:
        obs["areas"] = _pad([_areas(one) for one in inputs])[0]
    obs = with_progress(obs, alive=alive, step=0, budget=None)
    return {key: value.to(device) for key, value in obs.items()}


def with_progress(
    obs: dict[str, Tensor], *, alive: Tensor, step: int | Tensor, budget: int | Tensor | None
) -> dict[str, Tensor]:
    """The observation later in the episode.

    Args:
        obs: From :func:`observe` or :func:`observe_inputs`.
        alive: bool (B, N), tokens still in play.
        step: Steps taken so far, a number or (B,).
        budget: Count wanted at the end, a number or (B,); None leaves it out.
    """
    rows = len(alive)
    changed = dict(obs, alive=alive, step=_column(step, rows, alive.device))
    if budget is not None:
        changed["budget"] = _column(budget, rows, alive.device)
    return changed


def _field(inputs: PruneInputs, name: str) -> Tensor:
    value = getattr(inputs, name)
    if value is None:
        raise ValueError(f"the policy needs {name}, which sample {inputs.sample} lacks")
    field: Tensor = value
    return field


def _areas(inputs: PruneInputs) -> Tensor:
    """(n, 5) as the environment's ``areas``; of a grid where nothing else is given."""
    if inputs.areas is not None:
        return inputs.areas
    rows, columns = inputs.grid or (0, 0)
    if rows * columns != inputs.num_tokens:
        raise ValueError(
            f"the policy needs to know where the tokens of sample {inputs.sample} are; give areas "
            f"(n, 5), or the grid"
        )
    return torch.from_numpy(Placement.in_line(raster(rows, columns)).areas())


def _column(value: int | Tensor, rows: int, device: torch.device) -> Tensor:
    column = torch.as_tensor(value, dtype=torch.float32, device=device)
    return column.expand(rows)[:, None]


def _pad(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack (n_i, w) rows into (B, max n, w) with the mask of what exists."""
    longest = max(len(row) for row in rows)
    padded = rows[0].new_zeros(len(rows), longest, rows[0].shape[1])
    exists = torch.zeros(len(rows), longest, dtype=torch.bool, device=rows[0].device)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = row
        exists[number, : len(row)] = True
    return padded, exists
