"""The learner that those of all algorithms build on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from ray.rllib.algorithms.ppo.ppo import LEARNER_RESULTS_KL_KEY
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import ENTROPY_KEY, POLICY_LOSS_KEY
from torch import Tensor, nn

from tprl_env.rllib.algorithms.losses import Actions, SurrogateParts
from tprl_env.rllib.config import AlgorithmSettings

__all__ = ["MaskLearner"]

Settings = TypeVar("Settings", bound=AlgorithmSettings)


class MaskLearner(PPOTorchLearner):
    """PPO's learner without its loss: the current distribution, logging, and frozen parameters."""

    def get_parameters(self, module: nn.Module) -> Sequence[Any]:
        """Parameters that are trained; the optimiser never sees a frozen critic or reference."""
        return [part for part in module.parameters() if part.requires_grad]

    def settings(self, kind: type[Settings]) -> tuple[Settings, int]:
        """The algorithm's settings and T, both from ``config.learner_config_dict``."""
        table = self.config.learner_config_dict
        return kind(**table["algorithm"]), table["max_steps"]

    def distribution(self, module_id: str, fwd_out: Mapping[str, Any]) -> Actions:
        """The current distribution of a forward pass."""
        kind = self.module[module_id].unwrapped().get_train_action_dist_cls()
        return kind.from_logits(fwd_out[Columns.ACTION_DIST_INPUTS])

    def entropy_coefficient(self, module_id: str) -> float:
        """Coefficient of the entropy bonus."""
        return float(self.entropy_coeff_schedulers_per_module[module_id].get_current_value())

    def log_parts(
        self, module_id: str, parts: SurrogateParts, others: Mapping[str, Tensor]
    ) -> None:
        """Log the terms of a loss."""
        table = {
            POLICY_LOSS_KEY: parts.policy,
            ENTROPY_KEY: parts.entropy,
            LEARNER_RESULTS_KL_KEY: parts.kl,
            "logit_l2": parts.logit_l2,
            "count_loss": parts.count,
            "clipped_share": parts.clipped,
            **others,
        }
        detached = {name: term.detach() for name, term in table.items()}
        self.metrics.log_dict(detached, key=module_id, window=1)
