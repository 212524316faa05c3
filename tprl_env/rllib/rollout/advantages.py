"""From scores to rewards and advantages, one function per algorithm.

The advantages need whole groups (all draws of one sample), so the runner computes them.

Shapes: B episodes, T steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env.env import rewards as rewards_
from tprl_env.env.rules import EpisodeRules
from tprl_env.rllib.config import GrpoSettings, PpoSettings, TrainConfig
from tprl_env.rllib.rollout.episodes import EPISODE, GROUP, RETURN, Floats, Rollout

__all__ = [
    "Estimate",
    "advantages",
    "episode_returns",
    "estimate",
    "generalised_advantages",
    "group_advantages",
]


@dataclass(frozen=True)
class Estimate:
    """What the scores of a rollout are turned into.

    Attributes:
        rewards: float32 (T, B), 0 where no step was taken.
        columns: For the learner, name -> (T, B).
    """

    rewards: Floats
    columns: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    @property
    def advantages(self) -> Floats:
        """Advantages (T, B), 0 where no step was taken."""
        return self.columns[Postprocessing.ADVANTAGES]

    @property
    def targets(self) -> Floats:
        """What the critic should say, (T, B)."""
        return self.columns[Postprocessing.VALUE_TARGETS]


def estimate(
    config: TrainConfig, rollout: Rollout, scores: Floats, rules: EpisodeRules
) -> Estimate:
    """The estimate that the run's algorithm learns from; ``scores`` (T, B), NaN if not scored."""
    algorithm, without_count = config.algorithm, config.rollout.count_regression_baseline
    if isinstance(algorithm, PpoSettings):
        return advantages(
            rollout,
            scores,
            rules,
            gamma=algorithm.gamma,
            gae_lambda=algorithm.gae_lambda,
            group_baseline=config.rollout.group_baseline,
            count_regression_baseline=without_count,
        )
    if isinstance(algorithm, GrpoSettings):
        return group_advantages(
            rollout,
            scores,
            rules,
            gamma=algorithm.gamma,
            count_regression_baseline=without_count,
        )
    return episode_returns(rollout, scores, rules, gamma=algorithm.gamma)


def advantages(
    rollout: Rollout,
    scores: Floats,
    rules: EpisodeRules,
    *,
    gamma: float,
    gae_lambda: float,
    group_baseline: bool = False,
    count_regression_baseline: bool = False,
) -> Estimate:
    """Turn scores (T, B) of a rollout into what PPO learns from.

    Args:
        rollout: The episodes.
        scores: (T, B), NaN where not scored.
        rules: The MDP.
        gamma: Discount.
        gae_lambda: lambda of generalised advantage estimation.
        group_baseline: Subtract the mean advantage of the group at the same step.
        count_regression_baseline: Subtract what the log of the final count explains inside groups.
    """
    live, rewards = rollout.taken(), _rewards(rollout, scores, rules)
    values = np.stack(rollout.values)
    estimates = generalised_advantages(rewards, values, live, gamma, gae_lambda)
    targets = np.where(live, estimates + values, 0.0).astype(np.float32)
    if group_baseline:
        estimates = _minus_group_mean(estimates, rollout.group, live)
    if count_regression_baseline:
        estimates = _minus_count(estimates, rollout, live)
    columns = {Postprocessing.ADVANTAGES: estimates.astype(np.float32)}
    return Estimate(rewards, columns | {Postprocessing.VALUE_TARGETS: targets})


def group_advantages(
    rollout: Rollout,
    scores: Floats,
    rules: EpisodeRules,
    *,
    gamma: float,
    count_regression_baseline: bool = False,
) -> Estimate:
    """(return - group mean) / (group deviation + 1e-6), one value for a whole episode.

    DeepSeekMath (Shao et al. 2024, section 4.1.2) on discounted returns. A group whose returns are
    all equal teaches nothing: its advantages are 0.

    Args:
        rollout: The episodes.
        scores: (T, B), NaN where not scored.
        rules: The MDP.
        gamma: Discount of the returns.
        count_regression_baseline: Free the returns of what log K explains inside groups first.
    """
    live, rewards = rollout.taken(), _rewards(rollout, scores, rules)
    everything = np.ones((1, len(rollout.group)), bool)
    centred = _minus_group_mean(_returns(rewards, gamma), rollout.group, everything)
    if count_regression_baseline:
        centred = _minus_count(centred, rollout, everything)
    square = np.bincount(rollout.group, np.square(centred[0])) / np.bincount(rollout.group)
    gains = centred[0] / (np.sqrt(square)[rollout.group] + 1e-6)
    columns = {Postprocessing.ADVANTAGES: np.where(live, gains, 0.0).astype(np.float32)}
    return Estimate(rewards, columns)


def episode_returns(
    rollout: Rollout, scores: Floats, rules: EpisodeRules, *, gamma: float
) -> Estimate:
    """Returns alone, for MAPO: advantages follow when the draws are mixed with the memory."""
    rewards = _rewards(rollout, scores, rules)
    rows = {
        EPISODE: np.arange(len(rollout.group)),
        GROUP: rollout.group,
        RETURN: _returns(rewards, gamma)[0],
    }
    columns = {name: np.broadcast_to(row, rewards.shape) for name, row in rows.items()}
    return Estimate(rewards, columns)


def _rewards(rollout: Rollout, scores: Floats, rules: EpisodeRules) -> Floats:
    """Rewards (T, B), shared by mini-batches if the rules say so."""
    live, size = rollout.taken(), rules.reward_batch_size
    rewards = rewards_.episode_rewards(
        scores,
        rollout.full,
        np.stack(rollout.counts),
        live,
        rules.alpha,
        rules.beta,
        rules.score_steps,
    )
    if size == 1:
        return rewards
    shape = (len(live), -1, size)
    shared = rewards_.batch_mean_reward(rewards.reshape(shape), live.reshape(shape))
    return shared.reshape(live.shape)


def _returns(rewards: Floats, gamma: float) -> Floats:
    """Discounted return of each episode from its first step, (1, B)."""
    discounts = gamma ** np.arange(len(rewards), dtype=np.float64)
    return (discounts[:, None] * rewards).sum(axis=0, keepdims=True).astype(np.float32)


def generalised_advantages(
    rewards: Floats, values: Floats, live: npt.NDArray[np.bool_], gamma: float, gae_lambda: float
) -> Floats:
    """GAE (Schulman et al. 2016, eq. 16) of episodes that all end: no bootstrap value.

    Args:
        rewards: (T, B).
        values: (T, B).
        live: bool (T, B), a prefix of each column.
        gamma: Discount.
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
    values: Floats, group: npt.NDArray[np.int64], live: npt.NDArray[np.bool_]
) -> npt.NDArray[Any]:
    """Subtract from each step the mean over the group's episodes that took it."""
    result = np.zeros_like(values)
    for step, taken in enumerate(live):
        total = np.bincount(group, np.where(taken, values[step], 0.0))
        number = np.maximum(np.bincount(group, taken), 1)
        result[step] = np.where(taken, values[step] - (total / number)[group], 0.0)
    return result


def _minus_count(values: Floats, rollout: Rollout, live: npt.NDArray[np.bool_]) -> npt.NDArray[Any]:
    """Residual of a regression on the group-centred log of the final count.

    Ours, see docs/method.md, "Bernoulli". Without it a Bernoulli policy learns to keep more tokens
    from every group, whichever tokens these are.
    """
    everything = np.ones((1, len(rollout.group)), bool)
    log_count = np.log(rollout.counts[-1] + 1.0)[None].astype(np.float32)
    x = _minus_group_mean(log_count, rollout.group, everything)[0]
    result = np.zeros_like(values)
    for step, taken in enumerate(live):
        slope = (x * values[step])[taken].sum() / (np.square(x[taken]).sum() + 1e-6)
        result[step] = np.where(taken, values[step] - slope * x, 0.0)
    return result
