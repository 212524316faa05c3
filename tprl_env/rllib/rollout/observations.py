"""Observations of the fast path: sample numbers in place of codes, which the module looks up.

Shapes: R rows, N visual tokens.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from tprl_env.env.observations import Observation, progress

__all__ = ["NumberedSpaces", "numbered_observation"]


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
