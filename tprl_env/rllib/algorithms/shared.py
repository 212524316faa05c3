"""Base of the RLlib configurations and learners of all algorithms.

All of them use PPO's training step: roll out, pass over the batch a few times, send the weights
out. What differs is the estimate of the advantages, the loss, and what the module holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

from ray import tune
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.algorithms.ppo.ppo import LEARNER_RESULTS_KL_KEY
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner import ENTROPY_KEY, POLICY_LOSS_KEY
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from torch import Tensor, nn

from tprl_env.data.features import shared_source
from tprl_env.env.vector import TokenPruningVectorEnv
from tprl_env.rllib.algorithms.losses import Actions, SurrogateParts
from tprl_env.rllib.config import TrainConfig, policy_config, rules
from tprl_env.rllib.rollout.callbacks import EnvironmentMetrics, StopOnScoringFailure
from tprl_env.rllib.rollout.connector import ColumnsToBatch
from tprl_env.rllib.rollout.module import TokenPruningModule
from tprl_env.rllib.rollout.runner import TokenPruningRunner
from tprl_env.rllib.rollout.scorers import open_scorer
from tprl_env.scoring.spec import PoolAddress

__all__ = ["MaskLearner", "base_config", "settings_of"]

ENV_NAME = "tprl_env_token_pruning"
Settings = TypeVar("Settings")


class MaskLearner(PPOTorchLearner):
    """PPO's learner without its loss: the current distribution, logging, and frozen parameters."""

    def get_parameters(self, module: nn.Module) -> Sequence[Any]:
        """Parameters that are trained; the optimiser never sees a frozen critic or reference."""
        return [part for part in module.parameters() if part.requires_grad]

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


def settings_of(kind: type[Settings], config: TrainConfig) -> Settings:
    """A dataclass of settings, each the config's field of the same name."""
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: getattr(config, name) for name in names})


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


def base_config(
    config: TrainConfig,
    *,
    pool: PoolAddress | None,
    init_policy: str | None,
    learner: type[MaskLearner],
    loss: Mapping[str, Any],
    algorithm: type[PPO] = PPO,
    normalize: bool = False,
    critic: bool = True,
    reference: bool = False,
) -> PPOConfig:
    """RLlib configuration of a run.

    Args:
        config: the run.
        pool: running scorer actors; None lets each runner score in its own process.
        init_policy: folder of a saved policy that learner and runners start from.
        learner: computes the loss.
        loss: settings of the loss, given to the learner as ``learner_config_dict["loss"]``.
        algorithm: what `PPOConfig.build_algo` makes.
        normalize: let the learner's connector normalise the advantages over the batch.
        critic: compute and train values.
        reference: keep the start policy in the learner's module.

    Raises:
        ValueError: if the config does not fit its source.
    """
    rules(config).check_source(shared_source(config.source))
    tune.register_env(ENV_NAME, make_vector_env)
    address = None if pool is None else pool.as_dict()
    ppo = (
        PPOConfig(algo_class=algorithm)
        .environment(
            ENV_NAME,
            env_config={"train": config.as_dict(), "pool": address},
            disable_env_checking=True,
        )
        .framework("torch")
        .rl_module(rl_module_spec=_module(config, init_policy, critic, reference))
        .callbacks(StopOnScoringFailure if config.runner == "fast" else EnvironmentMetrics)
        .debugging(seed=config.seed, log_level="WARN")
        .learners(
            learner_class=learner,
            learner_config_dict={"loss": dict(loss)},
            num_learners=config.num_learners,
            num_gpus_per_learner=config.gpus_per_learner,
        )
        .fault_tolerance(
            restart_failed_env_runners=True,
            delay_between_env_runner_restarts_s=0.0,
        )
    )
    options = {
        "normalize": normalize,
        "reference": reference,
        "per_token": config.ratio == "token",
        "shuffle": bool(config.minibatch_size),
        "seed": config.seed,
    }
    _set_runner(ppo, config, options)
    _set_training(ppo, config, critic)
    return ppo


def _module(
    config: TrainConfig, init_policy: str | None, critic: bool, reference: bool
) -> RLModuleSpec:
    """How runners and learners build their policy."""
    model_config = {
        "policy": asdict(policy_config(config, shared_source(config.source))),
        "distribution": config.distribution,
        "discount": config.discount,
        "max_steps": config.max_steps,
        "source": config.source,
        "seed": config.seed,
        "load": init_policy,
        "critic": critic,
        "reference": reference,
    }
    return RLModuleSpec(module_class=TokenPruningModule, model_config=model_config)


def _set_runner(ppo: PPOConfig, config: TrainConfig, options: dict[str, Any]) -> None:
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
    if config.runner == "fast":
        ppo.env_runners(env_runner_cls=TokenPruningRunner)
        ppo.learners(
            add_default_connectors_to_learner_pipeline=False,
            learner_connector=functools.partial(_make_connector, options=options),
        )


def _make_connector(*spaces: Any, options: dict[str, Any]) -> ColumnsToBatch:
    """RLlib passes the spaces, and the device in some places."""
    return ColumnsToBatch(*spaces[:2], **options)


def _set_training(ppo: PPOConfig, config: TrainConfig, critic: bool) -> None:
    rows = config.samples * config.draws
    minibatch = config.minibatch_size
    if config.num_learners > 1 and not minibatch:
        # Several learners must be told a size (RLlib 2.60); this is all that each of them gets.
        minibatch = rows * config.max_steps // config.num_learners
    share = max(1, rows // max(1, config.num_learners))
    ppo.training(
        lr=config.lr,
        gamma=config.gamma,
        lambda_=config.gae_lambda,
        use_critic=critic,
        use_gae=critic,
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
