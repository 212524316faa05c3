"""TPRL's Bernoulli actions made to learn: one step, no discount, and a loss on the count.

Independent coins have no budget: the reward of one more token outweighs the price of keeping it.
Here the expected count is held at ``count_target`` by .3 mean(log(sum p / target))^2, the price is
zero, and group-centred returns are freed of what log K explains.
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
    min_tokens=1,
    budget=None,
    distribution="bernoulli",
    discount=1.0,
    architecture="attention",
    query="tokens",
    question_heads=8,
    width=64,
    layers=1,
    heads=4,
    budget_input=False,
    token_norm=True,
    query_norm="rms",
    value_query=True,
    initial_keep=0.1,
    demonstrator="question_attention",
    imitation_steps=900,
    imitation_batch_size=48,
    imitation_lr=3e-3,
    imitation_class_weights="sqrt",
    samples=32,
    draws=8,
    group_baseline=True,
    count_regression_baseline=True,
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
