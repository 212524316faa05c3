"""MAPO on the task of ``ppo``: exact budgets, one step, likelihood score (Liang et al. 2018).

The same task, policy, imitation and batches as ``ppo``, without a critic. The best masks of a
sample stay in a memory and are learned from together with new draws; their weight is the policy's
probability of them, at least .1. Because a mask of exactly k tokens says nothing about another k,
each sample has one budget for the whole run; over all samples budgets are log-uniform as in
``ppo``. The memory has an effect from the second visit of a sample on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tprl_env.rllib.config import (
    EpisodeRules,
    ImitationSettings,
    Limits,
    MapoSettings,
    PolicySettings,
    ResourceSettings,
    RolloutSettings,
    ScoringSettings,
    TrainConfig,
)

if TYPE_CHECKING:
    from ray.rllib.algorithms.ppo import PPOConfig

CONFIG = TrainConfig(
    # the task: final-only likelihood, no price per token because the budget is exact
    rules=EpisodeRules(
        max_steps=1,
        alpha=1.0,
        beta=0.0,
        score_steps="final",
        reward_batch_size=1,
        min_tokens=0,
        budget=(3, 48),
        score_kind="likelihood",
        query="tokens",
    ),
    # the policy
    policy=PolicySettings(
        distribution="exact",
        architecture="attention",
        question_heads=8,
        width=64,
        layers=1,
        heads=4,
        budget_input=True,
        token_norm=True,
        query_norm="rms",
    ),
    # imitation first: from reward alone the policy stays blind to the question for long
    imitation=ImitationSettings(
        demonstrator="question_attention",
        steps=900,
        batch_size=48,
        lr=3e-3,
        class_weights="sqrt",
    ),
    # 256 episodes per iteration, 8 draws of 32 samples
    rollout=RolloutSettings(
        samples=32,
        draws=8,
        # a sample keeps its budget, so that what is remembered of it fits when it comes again
        fixed_budgets=True,
    ),
    # MAPO: the best masks of a sample are remembered; they weigh at least .1 of its gradient
    algorithm=MapoSettings(
        memory_weight=0.1,
        memory_size=4,
        memory_limit=100_000,
        lr=5e-4,
        epochs=2,
        minibatch_size=0,
        clip=0.2,
        ratio="joint",
        per_token=True,
        entropy=0.003,
        logit_l2=1e-4,
        gamma=1.0,
        grad_clip=1.0,
        normalize_advantages=True,
    ),
    # a two-core machine
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
