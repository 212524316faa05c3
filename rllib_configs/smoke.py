"""The whole machinery on the toy source, in seconds: no store, no LVLM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tprl_env.rllib.config import (
    EpisodeRules,
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
    source="toy:samples=64,tokens=16,width=8,seed=0",
    rules=EpisodeRules(
        max_steps=1,
        alpha=1.0,
        beta=0.0,
        score_steps="final",
        reward_batch_size=1,
        min_tokens=0,
        budget=(2, 6),
        score_kind="likelihood",
        query="tokens",
    ),
    policy=PolicySettings(
        distribution="exact",
        question_heads=4,
        width=32,
        layers=1,
        heads=4,
        budget_input=True,
        token_norm=True,
        query_norm="rms",
        value_query=True,
    ),
    rollout=RolloutSettings(
        samples=32,
        draws=8,
    ),
    algorithm=PpoSettings(
        lr=3e-3,
        epochs=2,
        ratio="joint",
        per_token=True,
        entropy=0.003,
        logit_l2=1e-4,
        gamma=1.0,
    ),
    scoring=ScoringSettings(scorer="toy", batch_size=128),
    resources=ResourceSettings(
        num_env_runners=0,
        num_learners=0,
        num_scorers=2,
        scorer_cpus=0.5,
        start_timeout=120.0,
    ),
    limits=Limits(
        iterations=20,
        checkpoint_every=10,
        checkpoint_seconds=0.0,
    ),
)


def build(config: TrainConfig = CONFIG) -> PPOConfig:
    """RLlib configuration of this experiment."""
    from tprl_env.rllib.algorithms import algorithm_config  # ray takes seconds to load

    return algorithm_config(config)
