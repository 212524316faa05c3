"""TPRL to the letter (eq. 1-24): T = 3 Bernoulli steps, lambda_disc .5, joint ratio, lr 1e-5.

Kept as written, not because it works well: lambda_disc .5 with T = 3 lets a token survive with a
probability of at most 1/8, whatever the policy says, although the paper reports a third kept; and
imitating VisPruner, which does not read the question, cannot teach the policy to
(docs/method.md).
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
    # eq. 2-6: exact score after every step, reward averaged over a mini-batch of 32 episodes
    # (the paper gives no size)
    rules=EpisodeRules(
        max_steps=3,
        alpha=1.0,
        beta=0.1,
        score_steps="all",
        reward_batch_size=32,
        min_tokens=1,
        budget=None,
        score_kind="exact",
        query="mean",
    ),
    # eq. 9-18: one attention block of the codes' own width, the mean query as an extra token
    policy=PolicySettings(
        distribution="bernoulli",
        discount=0.5,
        architecture="attention",
        fusion="concat",
        width=None,
        layers=1,
        heads=4,
        budget_input=False,
        step_input=False,
        token_norm=False,
        query_norm="none",
        value_query=False,
    ),
    # eq. 7, 8: nested VisPruner masks at 75 % and 50 %, unweighted binary cross-entropy
    imitation=ImitationSettings(
        demonstrator="vispruner",
        steps=900,
        batch_size=48,
        lr=1e-3,
        class_weights="none",
    ),
    # 256 distinct samples per iteration
    rollout=RolloutSettings(
        samples=256,
        draws=1,
    ),
    # eq. 19-24
    algorithm=PpoSettings(
        lr=1e-5,
        epochs=4,
        minibatch_size=64,
        clip=0.2,
        ratio="joint",
        per_token=False,
        entropy=0.01,
        logit_l2=0.0,
        gamma=0.99,
        gae_lambda=0.95,
        value_coefficient=0.5,
        grad_clip=0.5,
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
