"""TPRL's Bernoulli actions made to learn: one step, no discount, and a loss on the count.

Independent coins have no budget: the reward of one more token outweighs the price of keeping it.
Here the expected count is held at ``count_target`` by .3 mean(log(sum p / target))^2, the price is
zero, and group-centred returns are freed of what log K explains.
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
        min_tokens=1,
        budget=None,
        score_kind="likelihood",
        query="tokens",
    ),
    policy=PolicySettings(
        distribution="bernoulli",
        discount=1.0,
        architecture="attention",
        question_heads=8,
        width=64,
        layers=1,
        heads=4,
        budget_input=False,
        token_norm=True,
        query_norm="rms",
        value_query=True,
        initial_keep=0.1,
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
        group_baseline=True,
        count_regression_baseline=True,
    ),
    algorithm=PpoSettings(
        lr=5e-4,
        epochs=2,
        minibatch_size=0,
        clip=0.2,
        ratio="token",
        per_token=True,
        entropy=0.003,
        logit_l2=0.0,
        count_loss=0.3,
        count_target=14.0,
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
