"""The whole machinery on the toy source, in seconds: no store, no LVLM."""

from ray.rllib.algorithms.ppo import PPOConfig

from tprl_env.rllib.algorithms.ppo import ppo_config
from tprl_env.rllib.config import TrainConfig

CONFIG = TrainConfig(
    source="toy:samples=64,tokens=16,width=8,seed=0",
    scorer="toy",
    score_kind="likelihood",
    max_steps=1,
    alpha=1.0,
    beta=0.0,
    score_steps="final",
    min_tokens=0,
    budget=(2, 6),
    distribution="exact",
    query="tokens",
    question_heads=4,
    width=32,
    layers=1,
    heads=4,
    budget_input=True,
    token_norm=True,
    query_norm="rms",
    value_query=True,
    samples=32,
    draws=8,
    lr=3e-3,
    epochs=2,
    ratio="joint",
    per_token=True,
    entropy=0.003,
    logit_l2=1e-4,
    gamma=1.0,
    num_env_runners=0,
    num_learners=0,
    num_scorers=2,
    scorer_cpus=0.5,
    scorer_batch_size=128,
    start_timeout=120.0,
    iterations=20,
    checkpoint_every=10,
    checkpoint_seconds=0.0,
)


def build(config: TrainConfig = CONFIG) -> PPOConfig:
    """RLlib configuration of this experiment."""
    return ppo_config(config)
