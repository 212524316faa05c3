"""PPO for keep-masks: RLlib's own training step, and the loss that stock PPO lacks.

Differences from stock PPO (each a field of `PpoSettings`): the ratio of whole masks or per token,
policy loss and entropy per kept token, a penalty on large logits, a loss on the expected count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.ppo import (
    LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY,
    LEARNER_RESULTS_VF_LOSS_UNCLIPPED_KEY,
)
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import VF_LOSS_KEY
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.torch_utils import explained_variance
from torch import Tensor

from tprl_env.rllib.algorithms.losses import (
    Actions,
    SurrogateParts,
    row_mean,
    surrogate_loss,
)
from tprl_env.rllib.algorithms.shared import MaskLearner
from tprl_env.rllib.config import PpoSettings

__all__ = ["LossParts", "PpoLearner", "ppo_loss"]


@dataclass
class LossParts(SurrogateParts):
    """The total and its terms, scalars; `kl` is the k3 estimate of KL(old || new)."""

    value: Tensor
    value_unclipped: Tensor


def ppo_loss(
    batch: Mapping[str, Any],
    distribution: Actions,
    values: Tensor,
    settings: PpoSettings,
    entropy_coefficient: float,
    max_steps: int = 1,
) -> LossParts:
    """Clipped surrogate, value, entropy and penalties (TPRL eq. 19-24; docs/method.md).

    Args:
        batch: Actions, old log-probabilities, advantages, value targets, all (R, ...); with
            ``ratio="token"`` also the old distribution inputs; rows where ``loss_mask`` is False
            do not count.
        distribution: The current one.
        values: (R,), current.
        settings: Coefficients.
        entropy_coefficient: c2.
        max_steps: T.
    """
    parts = surrogate_loss(batch, distribution, settings, entropy_coefficient, max_steps)
    error = (values - batch[Postprocessing.VALUE_TARGETS]).square()
    value = row_mean(batch, error.clamp(max=settings.value_clip))
    parts.total = parts.total + settings.value_coefficient * value
    return LossParts(**vars(parts), value=value, value_unclipped=row_mean(batch, error))


class PpoLearner(MaskLearner):
    """PPO's learner with `ppo_loss`; settings come from ``config.learner_config_dict``."""

    def compute_loss_for_module(
        self, *, module_id: str, config: PPOConfig, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """Loss of one minibatch; logs its parts."""
        module = self.module[module_id].unwrapped()
        values = module.compute_values(batch, embeddings=fwd_out.get(Columns.EMBEDDINGS))
        settings, max_steps = self.settings(PpoSettings)
        distribution = self.distribution(module_id, fwd_out)
        bonus = self.entropy_coefficient(module_id)
        parts = ppo_loss(batch, distribution, values, settings, bonus, max_steps)
        targets = batch[Postprocessing.VALUE_TARGETS]
        self.log_parts(
            module_id,
            parts,
            {
                VF_LOSS_KEY: parts.value,
                LEARNER_RESULTS_VF_LOSS_UNCLIPPED_KEY: parts.value_unclipped,
                LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY: explained_variance(targets, values.detach()),
            },
        )
        return parts.total
