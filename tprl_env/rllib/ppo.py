"""PPO for keep-masks: RLlib's own training step, and the loss that stock PPO lacks.

Differences from stock PPO (each a field of `TrainConfig`): the ratio of whole masks or per token,
policy loss and entropy per kept token, a penalty on large logits, a loss on the expected count.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from ray import tune
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.ppo import (
    LEARNER_RESULTS_KL_KEY,
    LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY,
    LEARNER_RESULTS_VF_LOSS_UNCLIPPED_KEY,
)
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import ENTROPY_KEY, POLICY_LOSS_KEY, VF_LOSS_KEY
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.torch_utils import explained_variance
from torch import Tensor

from tprl_env.rllib.action_distributions import BernoulliActions, ExactActions
from tprl_env.rllib.callbacks import EnvironmentMetrics, StopOnScoringFailure
from tprl_env.rllib.config import TrainConfig, policy_config, rules
from tprl_env.rllib.connector import ColumnsToBatch
from tprl_env.rllib.local_scores import open_scorer
from tprl_env.rllib.module import TokenPruningModule, shared_source
from tprl_env.rllib.runner import TokenPruningRunner
from tprl_env.rllib.scorer_spec import PoolAddress
from tprl_env.vector_env import TokenPruningVectorEnv

__all__ = ["LossParts", "LossSettings", "TokenPruningLearner", "ppo_config", "ppo_loss"]

ENV_NAME = "tprl_env_token_pruning"


@dataclass(frozen=True)
class LossSettings:
    """What the loss needs beyond stock PPO; fields of `TrainConfig` of the same name."""

    clip: float = 0.2
    ratio: str = "joint"
    per_token: bool = True
    logit_l2: float = 0.0
    count_loss: float = 0.0
    count_target: float | None = None
    max_steps: int = 1
    value_coefficient: float = 0.5
    value_clip: float = 1e6


@dataclass
class LossParts:
    """The total and its terms, scalars; `kl` is the k3 estimate of KL(old || new)."""

    total: Tensor
    policy: Tensor
    value: Tensor
    value_unclipped: Tensor
    entropy: Tensor
    logit_l2: Tensor
    count: Tensor
    kl: Tensor
    clipped: Tensor


def ppo_loss(
    batch: Mapping[str, Any],
    distribution: BernoulliActions | ExactActions,
    values: Tensor,
    settings: LossSettings,
    entropy_coefficient: float,
) -> LossParts:
    """Clipped surrogate, value, entropy and penalties (TPRL eq. 19-24; spec section 5).

    Args:
        batch: actions, old log-probabilities, advantages, value targets, all (R, ...); with
            ``ratio="token"`` also the old distribution inputs; rows where ``loss_mask`` is False
            do not count.
        distribution: the current one.
        values: (R,), current.
        settings: coefficients.
        entropy_coefficient: c2.
    """
    mask = batch.get(Columns.LOSS_MASK)
    weight = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    number = weight.sum().clamp(min=1.0)

    def mean(rows: Tensor) -> Tensor:
        return torch.where(weight > 0, rows, 0.0).sum() / number

    divisor = distribution.divisor if settings.per_token else torch.ones_like(values)
    surrogate, log_ratio, outside = _surrogate(batch, distribution, settings)
    log_ratio = torch.where(weight > 0, log_ratio, 0.0)
    policy = -mean(surrogate / divisor)
    error = (values - batch[Postprocessing.VALUE_TARGETS]).square()
    value = mean(error.clamp(max=settings.value_clip))
    entropy = mean(distribution.entropy() / divisor)
    alive = distribution.alive & (weight > 0)[:, None]
    l2 = distribution.logits.square()[alive].sum() / alive.sum().clamp(min=1)
    count = torch.zeros_like(policy)
    if settings.count_loss:
        count = mean(_count_error(distribution, settings))
    total = policy + settings.value_coefficient * value - entropy_coefficient * entropy
    total = total + settings.logit_l2 * l2 + settings.count_loss * count
    return LossParts(
        total,
        policy,
        value,
        mean(error),
        entropy,
        l2,
        count,
        mean(torch.expm1(log_ratio) - log_ratio),
        mean(outside),
    )


def _surrogate(
    batch: Mapping[str, Any],
    distribution: BernoulliActions | ExactActions,
    settings: LossSettings,
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


def _count_error(distribution: BernoulliActions | ExactActions, settings: LossSettings) -> Tensor:
    """(R,): log^2 of expected over wanted tokens; equal ratios over the steps of an episode."""
    if not isinstance(distribution, BernoulliActions) or not settings.count_target:
        raise ValueError("count_loss needs distribution='bernoulli' and count_target")
    alive = distribution.alive.sum(1).clamp(min=1)
    total = distribution.logits.shape[1]
    wanted = alive * (settings.count_target / total) ** (1.0 / settings.max_steps)
    expected = distribution.masks.probs.sum(1).clamp(min=1e-6)
    return (expected / wanted.clamp(min=1.0)).log().square()


class TokenPruningLearner(PPOTorchLearner):
    """PPO's learner with `ppo_loss`; settings come from ``config.learner_config_dict``."""

    def compute_loss_for_module(
        self, *, module_id: str, config: PPOConfig, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> Tensor:
        """Loss of one minibatch; logs its parts."""
        module = self.module[module_id].unwrapped()
        inputs = fwd_out[Columns.ACTION_DIST_INPUTS]
        distribution = module.get_train_action_dist_cls().from_logits(inputs)
        values = module.compute_values(batch, embeddings=fwd_out.get(Columns.EMBEDDINGS))
        coefficient = self.entropy_coeff_schedulers_per_module[module_id].get_current_value()
        settings = LossSettings(**config.learner_config_dict["loss"])
        parts = ppo_loss(batch, distribution, values, settings, float(coefficient))
        targets = batch[Postprocessing.VALUE_TARGETS]
        self.metrics.log_dict(
            {
                POLICY_LOSS_KEY: parts.policy.detach(),
                VF_LOSS_KEY: parts.value.detach(),
                LEARNER_RESULTS_VF_LOSS_UNCLIPPED_KEY: parts.value_unclipped.detach(),
                LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY: explained_variance(targets, values.detach()),
                ENTROPY_KEY: parts.entropy.detach(),
                LEARNER_RESULTS_KL_KEY: parts.kl.detach(),
                "logit_l2": parts.logit_l2.detach(),
                "count_loss": parts.count.detach(),
                "clipped_share": parts.clipped.detach(),
            },
            key=module_id,
            window=1,
        )
        return parts.total


def loss_settings(config: TrainConfig) -> LossSettings:
    """The loss of a run."""
    return LossSettings(
        **{field.name: getattr(config, field.name) for field in fields(LossSettings)}
    )


def make_vector_env(context: Mapping[str, Any]) -> TokenPruningVectorEnv:
    """The vector environment of a run, for RLlib's default runner."""
    config = TrainConfig.from_dict(context["train"])
    return TokenPruningVectorEnv(
        context.get("num_envs", 1),
        config.source,
        open_scorer(config, context.get("pool")),
        group_size=config.draws,
        **asdict(rules(config)),
    )


def ppo_config(
    config: TrainConfig,
    *,
    pool: PoolAddress | None = None,
    init_policy: str | None = None,
) -> PPOConfig:
    """RLlib configuration of a run.

    Args:
        config: the run.
        pool: running scorer actors; None lets each runner score in its own process.
        init_policy: folder of a saved policy that learner and runners start from.

    Raises:
        ValueError: if the config does not fit its source.
    """
    source = shared_source(config.source)
    rules(config).check_source(source)
    tune.register_env(ENV_NAME, make_vector_env)
    module = RLModuleSpec(
        module_class=TokenPruningModule,
        model_config={
            "policy": asdict(policy_config(config, source)),
            "distribution": config.distribution,
            "discount": config.discount,
            "max_steps": config.max_steps,
            "source": config.source,
            "seed": config.seed,
            "load": init_policy,
        },
    )
    address = None if pool is None else pool.as_dict()
    ppo = (
        PPOConfig()
        .environment(
            ENV_NAME,
            env_config={"train": config.as_dict(), "pool": address},
            disable_env_checking=True,
        )
        .framework("torch")
        .rl_module(rl_module_spec=module)
        .callbacks(StopOnScoringFailure if config.runner == "fast" else EnvironmentMetrics)
        .debugging(seed=config.seed, log_level="WARN")
        .learners(
            num_learners=config.num_learners,
            num_gpus_per_learner=config.gpus_per_learner,
        )
        .fault_tolerance(
            restart_failed_env_runners=True,
            delay_between_env_runner_restarts_s=0.0,
        )
    )
    _set_runner(ppo, config)
    _set_training(ppo, config)
    return ppo


def _set_runner(ppo: PPOConfig, config: TrainConfig) -> None:
    """Fast path, or RLlib's own runner on the vector environment."""
    share = config.samples // config.rounds // max(1, config.num_env_runners)
    ppo.env_runners(
        num_env_runners=config.num_env_runners,
        num_envs_per_env_runner=share * config.draws,
        gym_env_vectorize_mode="vector_entry_point",
        batch_mode="complete_episodes",
        sample_timeout_s=config.sample_timeout,
        explore=True,
    )
    options = {
        "normalize": config.normalize_advantages,
        "shuffle": bool(config.minibatch_size),
        "seed": config.seed,
    }
    if config.runner == "fast":
        ppo.env_runners(env_runner_cls=TokenPruningRunner)
        ppo.learners(
            add_default_connectors_to_learner_pipeline=False,
            learner_connector=functools.partial(_make_connector, options=options),
        )


def _make_connector(*spaces: Any, options: dict[str, Any]) -> ColumnsToBatch:
    """RLlib passes the spaces, and the device in some places."""
    return ColumnsToBatch(*spaces[:2], **options)


def _set_training(ppo: PPOConfig, config: TrainConfig) -> None:
    rows = config.samples * config.draws
    minibatch = config.minibatch_size
    if config.num_learners > 1 and not minibatch:
        # Several learners must be told a size (RLlib 2.60); this is all that each of them gets.
        minibatch = rows * config.max_steps // config.num_learners
    share = max(1, rows // max(1, config.num_learners))
    ppo.learners(
        learner_class=TokenPruningLearner,
        learner_config_dict={"loss": asdict(loss_settings(config))},
    )
    ppo.training(
        lr=config.lr,
        gamma=config.gamma,
        lambda_=config.gae_lambda,
        use_critic=True,
        use_gae=True,
        use_kl_loss=False,
        clip_param=config.clip,
        vf_loss_coeff=config.value_coefficient,
        vf_clip_param=config.value_clip,
        entropy_coeff=config.entropy,
        grad_clip=config.grad_clip,
        grad_clip_by="global_norm",
        num_epochs=config.epochs,
        # one pass of all runners always has at least one row per episode
        train_batch_size_per_learner=max(share, minibatch),
        minibatch_size=minibatch or None,
        shuffle_batch_per_epoch=bool(config.minibatch_size),
    )
