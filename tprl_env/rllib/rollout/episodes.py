"""Whole episodes before they are scored, and as the columns that RLlib carries to the learner.

Shapes: B episodes, T steps, R rows (steps that were taken), N visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

__all__ = [
    "EPISODE",
    "GROUP",
    "RETURN",
    "EpisodeColumns",
    "Rollout",
    "join_columns",
    "learner_columns",
]

Floats = npt.NDArray[np.float32]

EPISODE, GROUP, RETURN = "episode", "group", "return"
"""Columns (R,) for MAPO: number of the row's episode in its rollout, its group and its return."""


class EpisodeColumns:
    """Rows of many complete episodes; an opaque leaf for dm-tree that RLlib treats as an episode.

    Args:
        columns: Name -> (R, ...) array, or a dict of such arrays under ``obs``.
        rows: R.
    """

    __slots__ = ("columns", "rows")

    def __init__(self, columns: dict[str, Any], rows: int) -> None:
        self.columns, self.rows = columns, rows

    def __len__(self) -> int:
        """Environment steps R."""
        return self.rows

    def env_steps(self) -> int:
        """Environment steps R."""
        return self.rows

    def agent_steps(self) -> int:
        """Agent steps R."""
        return self.rows

    def __getitem__(self, rows: slice) -> EpisodeColumns:
        """Some rows; RLlib shares a batch out to several learners this way."""

        def cut(columns: dict[str, Any]) -> dict[str, Any]:
            return {
                name: cut(part) if isinstance(part, dict) else part[rows]
                for name, part in columns.items()
            }

        return EpisodeColumns(cut(self.columns), len(range(*rows.indices(self.rows))))

    def slice(self, rows: slice, len_lookback_buffer: int | None = None) -> EpisodeColumns:
        """The same under RLlib's name; advantages are known, so nothing must be looked back at."""
        return self[rows]


@dataclass
class Rollout:
    """B episodes in lockstep before they are scored; per-step lists hold (B, ...) arrays.

    Attributes:
        samples: int64 (B,).
        group: int64 (B,), episodes of one group have the same sample and budget.
        budget: int64 (B,).
        full: float32 (B,), scores with all tokens.
        counts: K_0 ... K_T, (B,) each.
        live: bool (B,) per step, episodes that took it.
        wanted: bool (B,) per step, episodes whose mask after it must be scored.
        masks: bool (B, N) per step, alive tokens after it.
        steps: What the learner needs of each step: columns of its live rows.
        values: float32 (B,) per step, 0 where not live.
    """

    samples: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    budget: npt.NDArray[np.int64]
    full: Floats
    counts: list[npt.NDArray[np.int64]] = field(default_factory=list)
    live: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    wanted: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    masks: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)

    def taken(self) -> npt.NDArray[np.bool_]:
        """Steps that were taken, bool (T, B)."""
        return np.stack(self.live)


def learner_columns(rollout: Rollout, results: Mapping[str, npt.NDArray[Any]]) -> EpisodeColumns:
    """Rows of all steps that were taken, step by step.

    Args:
        rollout: The episodes.
        results: Columns to add, (T, B) each.

    Raises:
        RuntimeError: If a group is not whole; its advantages would mean nothing.
    """
    sizes = np.bincount(rollout.group)
    if (sizes != sizes[0]).any():
        raise RuntimeError(f"a rollout must hold whole groups, got groups of {sizes.tolist()}")
    parts = [
        {**rollout.steps[step], **{name: part[step][live] for name, part in results.items()}}
        for step, live in enumerate(rollout.live)
    ]
    columns = join_columns(parts)
    return EpisodeColumns(columns, len(columns[Columns.ACTION_LOGP]))


def join_columns(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Concatenate columns row-wise; nested under the same names."""
    if len(parts) == 1:
        return parts[0]
    return {
        name: join_columns([part[name] for part in parts])
        if isinstance(first, dict)
        else np.concatenate([part[name] for part in parts])
        for name, first in parts[0].items()
    }
