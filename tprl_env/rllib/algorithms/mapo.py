"""MAPO for keep-masks (Liang et al. 2018): no critic, a memory of good episodes.

The driver keeps the memory, because there whole iterations and the current policy are at hand: it
mixes what the runners drew with what is remembered of the same samples, which gives every row a
weight and an advantage (`mapo_mixture.py`), and then remembers the best of the new episodes.
Several learners share the weighted rows out; they need no group.

The paper's gradient is that of the first pass over a batch, where ratios are 1. Further passes are
held near it by PPO's clipped ratio, for remembered rows as for new ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.execution.rollout_ops import synchronous_parallel_sample
from ray.rllib.utils.metrics import (
    ALL_MODULES,
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    NUM_ENV_STEPS_SAMPLED_LIFETIME,
    NUM_MODULE_STEPS_TRAINED_LIFETIME,
    SYNCH_WORKER_WEIGHTS_TIMER,
    TIMERS,
)
from torch import Tensor

from tprl_env.data.features import shared_source
from tprl_env.rllib.algorithms.losses import (
    ROW_WEIGHT,
    Actions,
    SurrogateParts,
    surrogate_loss,
)
from tprl_env.rllib.algorithms.mapo_memory import EpisodeMemory
from tprl_env.rllib.algorithms.mapo_mixture import mix
from tprl_env.rllib.algorithms.shared import MaskLearner
from tprl_env.rllib.config import MapoSettings, TrainConfig
from tprl_env.rllib.rollout.episodes import EpisodeColumns

__all__ = ["MAPO", "MapoLearner", "mapo_loss", "new_memory"]

MEMORY = "episode_memory"


def mapo_loss(
    batch: Mapping[str, Any],
    distribution: Actions,
    settings: MapoSettings,
    entropy_coefficient: float,
    max_steps: int = 1,
) -> SurrogateParts:
    """Weighted clipped surrogate of remembered and new episodes (Liang et al. 2018, eq. 7).

    Where ratios are 1 its gradient is -mean(weight x advantage x grad log pi).

    Args:
        batch: As `surrogate_loss` takes it; the column ``row_weight`` (R,), of mean 1 over a batch,
            is needed.
        distribution: The current one.
        settings: Coefficients.
        entropy_coefficient: c2.
        max_steps: T.

    Raises:
        ValueError: Without weights.
    """
    if ROW_WEIGHT not in batch:
        raise ValueError("mapo_loss needs row_weight in the batch; mix() makes it")
    return surrogate_loss(batch, distribution, settings, entropy_coefficient, max_steps)


class MapoLearner(MaskLearner):
    """PPO's learner with `mapo_loss`; settings come from ``config.learner_config_dict``."""

    def compute_loss_for_module(
        self, *, module_id: str, config: PPOConfig, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """Loss of one minibatch; logs its parts."""
        settings, max_steps = self.settings(MapoSettings)
        distribution = self.distribution(module_id, fwd_out)
        bonus = self.entropy_coefficient(module_id)
        parts = mapo_loss(batch, distribution, settings, bonus, max_steps)
        self.log_parts(module_id, parts, {})
        return parts.total


def new_memory(config: TrainConfig) -> EpisodeMemory:
    """An empty memory that knows whose episodes it will hold.

    Raises:
        ValueError: If the run's algorithm has no memory.
    """
    settings, rules = mapo_settings(config), config.rules
    identity = {
        name: getattr(rules, name)
        for name in ("score_kind", "max_steps", "score_steps", "alpha", "beta")
    }
    identity["gamma"] = settings.gamma
    identity["samples"] = shared_source(config.source).fingerprint
    return EpisodeMemory(identity, settings.memory_size, settings.memory_limit)


def mapo_settings(config: TrainConfig) -> MapoSettings:
    """The settings of a run with MAPO.

    Raises:
        ValueError: If the run uses another algorithm.
    """
    if not isinstance(config.algorithm, MapoSettings):
        raise ValueError(f"MAPO needs algorithm='mapo', got {config.algorithm.name!r}")
    return config.algorithm


class MAPO(PPO):
    """PPO's training step with the memory between runners and learners; checkpoints hold it."""

    def setup(self, config: PPOConfig) -> None:
        """Build runners and learners, and an empty memory."""
        super().setup(config)
        train_config = TrainConfig.from_dict(self.config.env_config["train"])
        self.settings = mapo_settings(train_config)
        self.memory = new_memory(train_config)

    def training_step(self) -> None:
        """Roll out, mix, learn, send the weights out (RLlib 2.60's PPO but for the second)."""
        with self.metrics.log_time((TIMERS, ENV_RUNNER_SAMPLING_TIMER)):
            stores, results = synchronous_parallel_sample(
                worker_set=self.env_runner_group,
                max_env_steps=self.config.total_train_batch_size,
                sample_timeout_s=self.config.sample_timeout_s,
                _uses_new_env_runners=True,
                _return_metrics=True,
            )
            if not stores:
                return
            self.metrics.aggregate(results, key=ENV_RUNNER_RESULTS)
        with self.metrics.log_time((TIMERS, LEARNER_UPDATE_TIMER)):
            sampled = (ENV_RUNNER_RESULTS, NUM_ENV_STEPS_SAMPLED_LIFETIME)
            trained = (LEARNER_RESULTS, ALL_MODULES, NUM_MODULE_STEPS_TRAINED_LIFETIME)
            learned = self.learner_group.update(
                episodes=self._mixed(stores),
                timesteps={
                    NUM_ENV_STEPS_SAMPLED_LIFETIME: self.metrics.peek(sampled),
                    NUM_MODULE_STEPS_TRAINED_LIFETIME: self.metrics.peek(trained, default=0),
                },
                num_epochs=self.config.num_epochs,
                minibatch_size=self.config.minibatch_size,
                shuffle_batch_per_epoch=self.config.shuffle_batch_per_epoch,
            )
            self.metrics.aggregate(learned, key=LEARNER_RESULTS)
        with self.metrics.log_time((TIMERS, SYNCH_WORKER_WEIGHTS_TIMER)):
            self.env_runner_group.sync_weights(
                from_worker_or_learner_group=self.learner_group,
                policies=set(learned[0]) - {ALL_MODULES},
                inference_only=True,
            )

    def _mixed(self, stores: list[EpisodeColumns]) -> list[EpisodeColumns]:
        """The batch, judged by the policy that drew it; the local runner has the same weights."""
        mixed, report = mix(
            stores,
            self.memory,
            self.env_runner.module.judge,
            self.settings.memory_weight,
            self.settings.normalize_advantages,
        )
        table = {name: value for name, value in asdict(report).items() if value is not None}
        table["episodes"] = len(self.memory)
        self.metrics.log_dict(table, key="memory", window=1)
        return mixed

    def get_state(
        self, components: Any = None, *, not_components: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """RLlib's state, with the memory."""
        state: dict[str, Any] = super().get_state(
            components, not_components=not_components, **kwargs
        )
        if self._check_component(MEMORY, components, not_components):
            state[MEMORY] = self.memory.get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint.

        Raises:
            ValueError: If its memory belongs to other samples or another reward.
        """
        if MEMORY in state:
            self.memory.set_state(state[MEMORY])
        super().set_state(state)
