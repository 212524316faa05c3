"""The ``ppo`` preset with the paper's single query vector, fused by a gate.

One mean vector says little where a question names several places; it is what the paper feeds its
policy. The gate gives the policy head the product of token and query beside the attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tprl_env.rllib.config import (
    EpisodeRules,
    ImitationSettings,
    Limits,
    PolicySettings,
    PpoSettings,
    ResourceSettings,
    RolloutSettings,
    ScoringSettings,
    TrainConfig,
)

if TYPE_CHECKING:
    from ray.rllib.algorithms.ppo import PPOConfig

CONFIG = TrainConfig(
    rules=EpisodeRules(
        max_steps=1,
        alpha=1.0,
        beta=0.0,
        score_steps="final",
        reward_batch_size=1,
        min_tokens=0,
        budget=(3, 48),
        score_kind="likelihood",
        query="mean",
    ),
    policy=PolicySettings(
        distribution="exact",
        architecture="attention",
        fusion="gated",
        width=64,
        layers=1,
        heads=4,
        budget_input=True,
        token_norm=True,
        query_norm="rms",
        value_query=True,
    ),
    imitation=ImitationSettings(
        demonstrator="question_attention",
        steps=900,
        batch_size=48,
        lr=3e-3,
        class_weights="sqrt",
    ),
    rollout=RolloutSettings(
        samples=32,
        draws=8,
    ),
    algorithm=PpoSettings(
        lr=5e-4,
        epochs=2,
        minibatch_size=0,
        clip=0.2,
        ratio="joint",
        per_token=True,
        entropy=0.003,
        logit_l2=1e-4,
        gamma=1.0,
        gae_lambda=0.95,
        value_coefficient=0.5,
        grad_clip=1.0,
        normalize_advantages=True,
    ),
    scoring=ScoringSettings(batch_size=128),
    resources=ResourceSettings(
        num_env_runners=0,
        num_learners=0,
        num_scorers=2,
        scorer_cpus=1.0,
    ),
    limits=Limits(max_scores=50_000),
)


def build(config: TrainConfig = CONFIG) -> PPOConfig:
    """RLlib configuration of this experiment."""
    from tprl_env.rllib.algorithms import algorithm_config  # ray takes seconds to load

    return algorithm_config(config)
