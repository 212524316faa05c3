"""The ``ppo`` preset with the paper's single query vector, fused by a gate.

One mean vector says little where a question names several places; it is what the paper feeds its
policy. The gate gives the policy head the product of token and query beside the attention.
"""

from ray.rllib.algorithms.ppo import PPOConfig

from tprl_env.rllib.algorithms.ppo import ppo_config
from tprl_env.rllib.config import TrainConfig

CONFIG = TrainConfig(
    score_kind="likelihood",
    max_steps=1,
    alpha=1.0,
    beta=0.0,
    score_steps="final",
    min_tokens=0,
    budget=(3, 48),
    distribution="exact",
    architecture="attention",
    query="mean",
    fusion="gated",
    width=64,
    layers=1,
    heads=4,
    budget_input=True,
    token_norm=True,
    query_norm="rms",
    value_query=True,
    demonstrator="question_attention",
    imitation_steps=900,
    imitation_batch_size=48,
    imitation_lr=3e-3,
    imitation_class_weights="sqrt",
    samples=32,
    draws=8,
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
    num_env_runners=0,
    num_learners=0,
    num_scorers=2,
    scorer_cpus=1.0,
    scorer_batch_size=128,
    max_scores=50_000,
)


def build(config: TrainConfig = CONFIG) -> PPOConfig:
    """RLlib configuration of this experiment."""
    return ppo_config(config)
