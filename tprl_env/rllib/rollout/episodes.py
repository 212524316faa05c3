"""Whole episodes before they are scored, and as the columns that RLlib carries to the learner.

Observations here hold sample numbers in place of codes, which the module looks up.

Shapes: B episodes, T steps, R rows (steps that were taken), N visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from ray.rllib.core.columns import Columns

from tprl_env.env.observations import Observation, progress

__all__ = [
    "EPISODE",
    "GROUP",
    "RETURN",
    "EpisodeColumns",
    "NumberedSpaces",
    "Rollout",
    "join_columns",
    "learner_columns",
    "numbered_observation",
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


def numbered_observation(
    samples: npt.NDArray[np.int64],
    state: npt.ArrayLike,
    alive: npt.ArrayLike,
    step: npt.ArrayLike,
    budget: npt.ArrayLike | None,
) -> Observation:
    """An observation by sample number; equal ``state`` says that rows are equal.

    Args:
        samples: int64 (R,), sample numbers.
        state: int (R,), number of the row's state: rows that share it are forwarded once.
        alive: bool (R, N), tokens still in play.
        step: Steps taken so far, a number or (R,).
        budget: Wanted counts (R,), None without a budget.
    """
    numbers = {"sample": samples, "state": np.asarray(state, np.int64)}
    return numbers | progress(alive, step, budget)


class NumberedSpaces:
    """Stands in for the environment that the fast runner does not have: spaces and a size."""

    def __init__(self, tokens: int, has_budget: bool, num_envs: int) -> None:
        box = gymnasium.spaces.Box
        parts: dict[str, gymnasium.Space[Any]] = {
            "sample": box(0, np.iinfo(np.int64).max, (), np.int64),
            "state": box(0, np.iinfo(np.int64).max, (), np.int64),
            "alive": gymnasium.spaces.MultiBinary(tokens),
            "step": box(0.0, np.inf, (1,), np.float32),
        }
        if has_budget:
            parts["budget"] = box(1.0, float(tokens), (1,), np.float32)
        self.single_observation_space = self.observation_space = gymnasium.spaces.Dict(parts)
        self.single_action_space = self.action_space = gymnasium.spaces.MultiBinary(tokens)
        self.num_envs = num_envs

    @property
    def unwrapped(self) -> NumberedSpaces:
        """Itself, as a vector environment without wrappers."""
        return self

    def close(self) -> None:
        """Nothing to close."""
