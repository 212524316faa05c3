"""Whole episodes as columns: advantages, targets and the object RLlib carries to the learner.

Shapes: B episodes, T steps, R rows (steps that were taken), N visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env import rewards as rewards_
from tprl_env.rules import EpisodeRules

__all__ = ["Advantages", "EpisodeColumns", "Rollout", "advantages", "generalised_advantages"]

Floats = NDArray[np.float32]


class EpisodeColumns:
    """Rows of many complete episodes; an opaque leaf for dm-tree that RLlib treats as an episode.

    Args:
        columns: name -> (R, ...) array, or a dict of such arrays under ``obs``.
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
        masks: bool (B, N) per step, alive tokens after it.
        steps: what the learner needs of each step: columns of its live rows.
        values: float32 (B,) per step, 0 where not live.
    """

    samples: NDArray[np.int64]
    group: NDArray[np.int64]
    budget: NDArray[np.int64]
    full: Floats
    counts: list[NDArray[np.int64]] = field(default_factory=list)
    live: list[NDArray[np.bool_]] = field(default_factory=list)
    masks: list[NDArray[np.bool_]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    values: list[Floats] = field(default_factory=list)

    def taken(self) -> NDArray[np.bool_]:
        """Steps that were taken, bool (T, B)."""
        return np.stack(self.live)

    def scored(self, score_steps: str) -> NDArray[np.bool_]:
        """Steps whose mask must be scored, bool (T, B)."""
        live = self.taken()
        if score_steps == "all":
            return live
        following = np.concatenate([live[1:], np.zeros_like(live[:1])])
        return live & ~following


@dataclass(frozen=True)
class Advantages:
    """Rewards, advantages and value targets, float32 (T, B), 0 where no step was taken."""

    rewards: Floats
    advantages: Floats
    targets: Floats


def advantages(
    rollout: Rollout,
    scores: Floats,
    rules: EpisodeRules,
    *,
    gamma: float,
    gae_lambda: float,
    group_baseline: bool = False,
    regress_count: bool = False,
) -> Advantages:
    """Turn scores (T, B) of a rollout into what PPO learns from.

    Args:
        rollout: the episodes.
        scores: (T, B), NaN where not scored.
        rules: the MDP.
        gamma: discount.
        gae_lambda: lambda of generalised advantage estimation.
        group_baseline: subtract the mean advantage of the group at the same step.
        regress_count: subtract what the log of the final count explains inside groups.
    """
    live = rollout.taken()
    rewards = rewards_.episode_rewards(
        scores,
        rollout.full,
        np.stack(rollout.counts),
        live,
        rules.alpha,
        rules.beta,
        rules.score_steps,
    )
    size = rules.reward_batch_size
    if size > 1:
        shape = (len(live), -1, size)
        shared = rewards_.batch_mean_reward(rewards.reshape(shape), live.reshape(shape))
        rewards = shared.reshape(live.shape)
    values = np.stack(rollout.values)
    estimates = generalised_advantages(rewards, values, live, gamma, gae_lambda)
    targets = np.where(live, estimates + values, 0.0).astype(np.float32)
    if group_baseline:
        estimates = _minus_group_mean(estimates, rollout.group, live)
    if regress_count:
        estimates = _minus_count(estimates, rollout, live)
    return Advantages(rewards, estimates.astype(np.float32), targets)


def generalised_advantages(
    rewards: Floats, values: Floats, live: NDArray[np.bool_], gamma: float, gae_lambda: float
) -> Floats:
    """GAE (Schulman et al. 2016, eq. 16) of episodes that all end: no bootstrap value.

    Args:
        rewards: (T, B).
        values: (T, B).
        live: bool (T, B), a prefix of each column.
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        (T, B), 0 where not live.
    """
    result = np.zeros_like(rewards)
    following = np.zeros(rewards.shape[1], np.float32)
    next_value = np.zeros_like(following)
    for step in reversed(range(len(rewards))):
        delta = rewards[step] + gamma * next_value - values[step]
        following = np.where(live[step], delta + gamma * gae_lambda * following, 0.0)
        following = following.astype(np.float32)
        result[step] = following
        next_value = np.where(live[step], values[step], 0.0).astype(np.float32)
    return result


def _minus_group_mean(
    values: Floats, group: NDArray[np.int64], live: NDArray[np.bool_]
) -> NDArray[Any]:
    """Subtract from each step the mean over the group's episodes that took it."""
    result = np.zeros_like(values)
    for step, taken in enumerate(live):
        total = np.bincount(group, np.where(taken, values[step], 0.0))
        number = np.maximum(np.bincount(group, taken), 1)
        result[step] = np.where(taken, values[step] - (total / number)[group], 0.0)
    return result


def _minus_count(values: Floats, rollout: Rollout, live: NDArray[np.bool_]) -> NDArray[Any]:
    """Residual of a regression on the group-centred log of the final count (spec section 5).

    Without it a Bernoulli policy learns "keep more" from every group, whatever it keeps.
    """
    everything = np.ones((1, len(rollout.group)), bool)
    log_count = np.log(rollout.counts[-1] + 1.0)[None].astype(np.float32)
    x = _minus_group_mean(log_count, rollout.group, everything)[0]
    result = np.zeros_like(values)
    for step, taken in enumerate(live):
        slope = (x * values[step])[taken].sum() / (np.square(x[taken]).sum() + 1e-6)
        result[step] = np.where(taken, values[step] - slope * x, 0.0)
    return result


def learner_columns(rollout: Rollout, result: Advantages) -> EpisodeColumns:
    """Rows of all steps that were taken, step by step."""
    parts = []
    for step, live in enumerate(rollout.live):
        extra = {
            Postprocessing.ADVANTAGES: result.advantages[step][live],
            Postprocessing.VALUE_TARGETS: result.targets[step][live],
        }
        parts.append({**rollout.steps[step], **extra})
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
