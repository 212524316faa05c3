"""From a run's config to RLlib's: one table of the algorithms, one builder for all of them.

All use PPO's training step: roll out, pass over the batch a few times, send the weights out. What
differs is the estimate of the advantages, the loss, and what the module holds.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray import tune
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from tprl_env.data.features import shared_source
from tprl_env.env.vector import TokenPruningVectorEnv
from tprl_env.rllib.algorithms.grpo import GRPO, GrpoLearner
from tprl_env.rllib.algorithms.mapo import MAPO, MapoLearner
from tprl_env.rllib.algorithms.ppo import PpoLearner
from tprl_env.rllib.algorithms.shared import MaskLearner
from tprl_env.rllib.config import (
    AlgorithmSettings,
    GrpoSettings,
    MapoSettings,
    PpoSettings,
    TrainConfig,
    policy_config,
)
from tprl_env.rllib.rollout.callbacks import EnvironmentMetrics, StopOnScoringFailure
from tprl_env.rllib.rollout.connector import ColumnsToBatch
from tprl_env.rllib.rollout.module import TokenPruningModule
from tprl_env.rllib.rollout.runner import TokenPruningRunner
from tprl_env.rllib.rollout.scorers import open_scorer
from tprl_env.scoring.spec import PoolAddress

__all__ = ["ALGORITHMS", "AlgorithmEntry", "algorithm_config"]

ENV_NAME = "tprl_env_token_pruning"


@dataclass(frozen=True)
class AlgorithmEntry:
    """What RLlib needs to know of an algorithm.

    Attributes:
        algorithm: What `PPOConfig.build_algo` makes.
        learner: Computes the loss.
        settings: The part of `TrainConfig` that chooses it.
        critic: Compute and train values.
        reference: Keep the initial policy in the learner's module.
    """

    algorithm: type[PPO]
    learner: type[MaskLearner]
    settings: type[AlgorithmSettings]
    critic: bool = False
    reference: bool = False


ALGORITHMS: dict[str, AlgorithmEntry] = {
    "ppo": AlgorithmEntry(PPO, PpoLearner, PpoSettings, critic=True),
    "grpo": AlgorithmEntry(GRPO, GrpoLearner, GrpoSettings, reference=True),
    "mapo": AlgorithmEntry(MAPO, MapoLearner, MapoSettings),
}
"""By the name in ``TrainConfig.algorithm``."""


def algorithm_config(
    config: TrainConfig, *, pool: PoolAddress | None = None, init_policy: str | None = None
) -> PPOConfig:
    """RLlib configuration of a run.

    Args:
        config: The run.
        pool: Running scorer actors; None lets each runner score in its own process.
        init_policy: Folder of a saved policy that learner and runners start from.

    Raises:
        ValueError: If the config does not fit its source.
    """
    config.rules.check_source(shared_source(config.source))
    tune.register_env(ENV_NAME, make_vector_env)
    entry, resources = ALGORITHMS[config.algorithm.name], config.resources
    fast = config.rollout.runner == "fast"
    address = None if pool is None else pool.as_dict()
    ppo = (
        PPOConfig(algo_class=entry.algorithm)
        .environment(
            ENV_NAME,
            env_config={"train": config.as_dict(), "pool": address},
            disable_env_checking=True,
        )
        .framework("torch")
        .rl_module(rl_module_spec=_module(config, init_policy, entry))
        .callbacks(StopOnScoringFailure if fast else EnvironmentMetrics)
        .debugging(seed=config.seed, log_level="WARN")
        .learners(
            learner_class=entry.learner,
            learner_config_dict={
                "algorithm": asdict(config.algorithm),
                "max_steps": config.rules.max_steps,
            },
            num_learners=resources.num_learners,
            num_gpus_per_learner=resources.gpus_per_learner,
        )
        .fault_tolerance(
            restart_failed_env_runners=True,
            delay_between_env_runner_restarts_s=0.0,
        )
    )
    _set_runner(ppo, config, entry)
    _set_training(ppo, config, entry)
    return ppo


def make_vector_env(context: Mapping[str, Any]) -> TokenPruningVectorEnv:
    """The vector environment of a run, for RLlib's default runner."""
    config = TrainConfig.from_dict(context["train"])
    return TokenPruningVectorEnv(
        context.get("num_envs", 1),
        config.source,
        open_scorer(config, context.get("pool")),
        group_size=config.rollout.draws,
        **asdict(config.rules),
    )


def _module(config: TrainConfig, init_policy: str | None, entry: AlgorithmEntry) -> RLModuleSpec:
    """How runners and learners build their policy."""
    model_config = {
        "policy": asdict(policy_config(config, shared_source(config.source))),
        "distribution": config.policy.distribution,
        "discount": config.policy.discount,
        "max_steps": config.rules.max_steps,
        "source": config.source,
        "seed": config.seed,
        "load": init_policy,
        "critic": entry.critic,
        "reference": entry.reference,
    }
    return RLModuleSpec(module_class=TokenPruningModule, model_config=model_config)


def _set_runner(ppo: PPOConfig, config: TrainConfig, entry: AlgorithmEntry) -> None:
    """Fast path, or RLlib's own runner on the vector environment."""
    rollout, algorithm, resources = config.rollout, config.algorithm, config.resources
    share = rollout.samples // rollout.rounds // max(1, resources.num_env_runners)
    ppo.env_runners(
        num_env_runners=resources.num_env_runners,
        num_envs_per_env_runner=share * rollout.draws,
        gym_env_vectorize_mode="vector_entry_point",
        batch_mode="complete_episodes",
        sample_timeout_s=resources.sample_timeout,
        explore=True,
    )
    if rollout.runner == "fast":
        options = {
            # GRPO normalises in its groups, MAPO where it mixes draws with its memory
            "normalize": isinstance(algorithm, PpoSettings) and algorithm.normalize_advantages,
            "reference": entry.reference,
            "per_token": algorithm.ratio == "token",
            "shuffle": bool(algorithm.minibatch_size),
            "seed": config.seed,
        }
        ppo.env_runners(env_runner_cls=TokenPruningRunner)
        ppo.learners(
            add_default_connectors_to_learner_pipeline=False,
            learner_connector=functools.partial(_make_connector, options=options),
        )


def _make_connector(*spaces: Any, options: dict[str, Any]) -> ColumnsToBatch:
    """RLlib passes the spaces, and the device in some places."""
    return ColumnsToBatch(*spaces[:2], **options)


def _set_training(ppo: PPOConfig, config: TrainConfig, entry: AlgorithmEntry) -> None:
    algorithm, learners = config.algorithm, config.resources.num_learners
    rows, minibatch = config.rollout.episodes, algorithm.minibatch_size
    if learners > 1 and not minibatch:
        # Several learners must be told a size (RLlib 2.60); this is all that each of them gets.
        minibatch = rows * config.rules.max_steps // learners
    share = max(1, rows // max(1, learners))
    ppo.training(
        lr=algorithm.lr,
        gamma=algorithm.gamma,
        use_critic=entry.critic,
        use_gae=entry.critic,
        use_kl_loss=False,
        clip_param=algorithm.clip,
        entropy_coeff=algorithm.entropy,
        grad_clip=algorithm.grad_clip,
        grad_clip_by="global_norm",
        num_epochs=algorithm.epochs,
        # one pass of all runners always has at least one row per episode
        train_batch_size_per_learner=max(share, minibatch),
        minibatch_size=minibatch or None,
        shuffle_batch_per_epoch=bool(algorithm.minibatch_size),
    )
    if isinstance(algorithm, PpoSettings):
        ppo.training(
            lambda_=algorithm.gae_lambda,
            vf_loss_coeff=algorithm.value_coefficient,
            vf_clip_param=algorithm.value_clip,
        )
