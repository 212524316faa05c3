"""GRPO for keep-masks (Shao et al. 2024): no critic, a KL penalty towards the initial policy.

An iteration draws ``draws`` masks for each sample. Where the group is whole, in the runner, an
episode's return becomes (return - group mean) / (group deviation + 1e-6), the advantage of all its
steps. Several learners share the rows out afterwards; they need no group.

The k3 penalty refers to the policy that the run started from: the one after imitation, or
``init_policy``. Without either the initial policy is untrained, and the penalty only keeps the
policy near it. Its value estimates KL(policy || start policy). Its expected gradient at ratio 1 is
that of KL(start policy || policy): the policy is asked to cover what the start policy did. The
learner keeps a frozen copy of the start policy, checkpoints hold it, and its log-probabilities are
computed once per iteration. Values are not computed; the critic's parameters stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.columns import Columns
from torch import Tensor

from tprl_env.rllib.algorithms.losses import (
    Actions,
    SurrogateParts,
    divisor,
    kl_k3,
    row_mean,
    surrogate_loss,
)
from tprl_env.rllib.algorithms.shared import MaskLearner
from tprl_env.rllib.config import GrpoSettings
from tprl_env.rllib.rollout.connector import REFERENCE_LOGP
from tprl_env.rllib.rollout.distributions import BernoulliActions

__all__ = ["GRPO", "GrpoLearner", "GrpoParts", "grpo_loss"]


class GRPO(PPO):
    """PPO's training step under its own name; what differs is in runner, learner and module."""


@dataclass
class GrpoParts(SurrogateParts):
    """The total and its terms; `reference_kl` is the k3 estimate of KL(policy || start policy)."""

    reference_kl: Tensor


def grpo_loss(
    batch: Mapping[str, Any],
    distribution: Actions,
    settings: GrpoSettings,
    entropy_coefficient: float,
    max_steps: int = 1,
) -> GrpoParts:
    """Clipped surrogate with a penalty on KL(policy || start policy) (Shao et al. 2024, eq. 3, 4).

    The estimate is of whole masks with ``ratio="joint"`` and of each token with
    ``ratio="token"``, and divided by the tokens of a row as the surrogate is.

    Args:
        batch: As `surrogate_loss` takes it, with ``reference_logp``, (R,), or (R, N) per token.
        distribution: The current one.
        settings: Coefficients.
        entropy_coefficient: c2.
        max_steps: T.
    """
    parts = surrogate_loss(batch, distribution, settings, entropy_coefficient, max_steps)
    actions = batch[Columns.ACTIONS]
    if settings.ratio == "token" and isinstance(distribution, BernoulliActions):
        estimate = kl_k3(batch[REFERENCE_LOGP] - distribution.token_logp(actions)).sum(1)
    else:
        estimate = kl_k3(batch[REFERENCE_LOGP] - distribution.logp(actions))
    penalty = row_mean(batch, estimate / divisor(distribution, settings))
    parts.total = parts.total + settings.kl_coefficient * penalty
    return GrpoParts(**vars(parts), reference_kl=row_mean(batch, estimate))


class GrpoLearner(MaskLearner):
    """PPO's learner with `grpo_loss`; settings come from ``config.learner_config_dict``."""

    def compute_loss_for_module(
        self, *, module_id: str, config: PPOConfig, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """Loss of one minibatch; logs its parts."""
        settings, max_steps = self.settings(GrpoSettings)
        distribution = self.distribution(module_id, fwd_out)
        bonus = self.entropy_coefficient(module_id)
        parts = grpo_loss(batch, distribution, settings, bonus, max_steps)
        self.log_parts(module_id, parts, {"reference_kl": parts.reference_kl})
        return parts.total
