"""One policy for every budget, after GRIP-VLM; an interpretation, only its abstract is known.

The wanted count is drawn log-uniformly per sample, from 2 % to half of 144 tokens, and seen by the
policy. Supervised warm-up, then GRPO over masks of exactly that count; at inference the top tokens
by log-odds at any budget. Compared with one policy per budget in
``rllib_configs/experiments/budget_conditioned.py``.
"""

from ray.rllib.algorithms.ppo import PPOConfig

from tprl_env.rllib.algorithms.grpo import grpo_config
from tprl_env.rllib.config import TrainConfig

CONFIG = TrainConfig(
    # the task: final-only likelihood, no price per token because the budget is exact
    score_kind="likelihood",
    max_steps=1,
    alpha=1.0,
    beta=0.0,
    score_steps="final",
    min_tokens=0,
    budget=(3, 72),
    # the policy sees the budget
    distribution="exact",
    architecture="attention",
    query="tokens",
    question_heads=8,
    width=64,
    layers=1,
    heads=4,
    budget_input=True,
    token_norm=True,
    query_norm="rms",
    # supervised warm-up at budgets drawn in the same way
    demonstrator="question_attention",
    imitation_steps=900,
    imitation_batch_size=48,
    imitation_lr=3e-3,
    imitation_class_weights="sqrt",
    # 256 episodes per iteration, 8 draws of 32 samples
    samples=32,
    draws=8,
    # GRPO: advantages from the group, no critic; k3 penalty on leaving the warmed-up policy
    algorithm="grpo",
    kl_coefficient=0.04,
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
    # a two-core machine
    num_env_runners=0,
    num_learners=0,
    num_scorers=2,
    scorer_cpus=1.0,
    scorer_batch_size=128,
    max_scores=50_000,
)


def build(config: TrainConfig = CONFIG) -> PPOConfig:
    """RLlib configuration of this experiment."""
    return grpo_config(config)
