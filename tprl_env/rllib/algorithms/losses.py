"""Clipped surrogate, entropy bonus and penalties: the terms that the losses have in common.

Shapes: R rows of a batch, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from torch import Tensor

from tprl_env.rllib.config import AlgorithmSettings
from tprl_env.rllib.rollout.distributions import BernoulliActions, ExactActions

__all__ = [
    "ROW_WEIGHT",
    "SurrogateParts",
    "divisor",
    "kl_k3",
    "row_mean",
    "surrogate_loss",
]

Actions = BernoulliActions | ExactActions

ROW_WEIGHT = "row_weight"
"""Column (R,), weight of a row in all means; 1 where the batch has none."""


@dataclass
class SurrogateParts:
    """The sum and its terms, scalars; `kl` is the k3 estimate of KL(old || new)."""

    total: Tensor
    policy: Tensor
    entropy: Tensor
    logit_l2: Tensor
    count: Tensor
    kl: Tensor
    clipped: Tensor


def row_mean(batch: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Mean over the rows that count, each times its weight.

    Args:
        batch: May hold ``loss_mask``, bool (R,), and `ROW_WEIGHT`.
        rows: (R,).
    """
    weight = batch.get(ROW_WEIGHT)
    if weight is not None:
        rows = rows * weight
    mask = batch.get(Columns.LOSS_MASK)
    if mask is None:
        return rows.mean()
    return torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1)


def divisor(distribution: Actions, settings: AlgorithmSettings) -> Tensor:
    """What policy loss, entropy and KL of each row are divided by, (R,)."""
    tokens = distribution.divisor
    return tokens if settings.per_token else torch.ones_like(tokens)


def kl_k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - x - 1 with x = log q / p: its mean over draws of p is KL(p || q).

    Never negative and without bias (Schulman 2020, "Approximating KL divergence").
    """
    return torch.expm1(log_ratio) - log_ratio


def surrogate_loss(
    batch: Mapping[str, Any],
    distribution: Actions,
    settings: AlgorithmSettings,
    entropy_coefficient: float,
    max_steps: int = 1,
) -> SurrogateParts:
    """Clipped surrogate, entropy bonus and penalties (TPRL eq. 21, 23; docs/method.md).

    Args:
        batch: Actions, old log-probabilities and advantages, all (R, ...); with ``ratio="token"``
            also the old distribution inputs; rows where ``loss_mask`` is False do not count.
        distribution: The current one.
        settings: Coefficients.
        entropy_coefficient: c2.
        max_steps: T, over which the expected count falls to ``count_target``.
    """
    tokens = divisor(distribution, settings)
    objective, log_ratio, outside = _surrogate(batch, distribution, settings)
    mask = batch.get(Columns.LOSS_MASK)
    alive = distribution.alive
    if mask is not None:
        log_ratio = torch.where(mask, log_ratio, 0.0)
        alive = alive & mask[:, None]
    policy = -row_mean(batch, objective / tokens)
    entropy = row_mean(batch, distribution.entropy() / tokens)
    l2 = distribution.logits.square()[alive].sum() / alive.sum().clamp(min=1)
    count = torch.zeros_like(policy)
    if settings.count_loss:
        count = row_mean(batch, _count_error(distribution, settings, max_steps))
    total = policy - entropy_coefficient * entropy
    total = total + settings.logit_l2 * l2 + settings.count_loss * count
    kl, clipped = row_mean(batch, kl_k3(log_ratio)), row_mean(batch, outside)
    return SurrogateParts(total, policy, entropy, l2, count, kl, clipped)


def _surrogate(
    batch: Mapping[str, Any], distribution: Actions, settings: AlgorithmSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped objective, log ratio of the whole mask, and share of clipped ratios, (R,) each."""
    actions, gain = batch[Columns.ACTIONS], batch[Postprocessing.ADVANTAGES]
    low, high = 1.0 - settings.clip, 1.0 + settings.clip
    if settings.ratio == "joint" or not isinstance(distribution, BernoulliActions):
        log_ratio = distribution.logp(actions) - batch[Columns.ACTION_LOGP]
        ratio = log_ratio.exp()
        outside = ((ratio < low) | (ratio > high)).to(ratio.dtype)
        return torch.minimum(ratio * gain, ratio.clamp(low, high) * gain), log_ratio, outside
    old = BernoulliActions.from_logits(batch[Columns.ACTION_DIST_INPUTS])
    token = distribution.token_logp(actions) - old.token_logp(actions)  # 0 where dead
    ratio = token.exp()
    gain = gain[:, None]
    clipped = torch.minimum(ratio * gain, ratio.clamp(low, high) * gain)
    alive = distribution.alive
    outside = ((ratio < low) | (ratio > high)) & alive
    share = outside.sum(1) / alive.sum(1).clamp(min=1)
    return torch.where(alive, clipped, 0.0).sum(1), token.sum(1), share


def _count_error(distribution: Actions, settings: AlgorithmSettings, max_steps: int) -> Tensor:
    """(R,): log^2 of expected over wanted tokens; equal ratios over the steps of an episode."""
    if not isinstance(distribution, BernoulliActions) or not settings.count_target:
        raise ValueError("count_loss needs distribution='bernoulli' and count_target")
    alive = distribution.alive.sum(1).clamp(min=1)
    total = distribution.logits.shape[1]
    wanted = alive * (settings.count_target / total) ** (1.0 / max_steps)
    expected = distribution.masks.probs.sum(1).clamp(min=1e-6)
    return (expected / wanted.clamp(min=1.0)).log().square()
