"""TPRL to the letter (eq. 1-24): T = 3 Bernoulli steps, lambda_disc .5, joint ratio, lr 1e-5.

Kept as written, not because it works well: lambda_disc .5 with T = 3 lets a token survive with a
probability of at most 1/8, whatever the policy says, although the paper reports a third kept; and
imitating VisPruner, which does not read the question, cannot teach the policy to
(docs/method.md).
"""

from ray.rllib.algorithms.ppo import PPOConfig

from tprl_env.rllib.algorithms.ppo import ppo_config
from tprl_env.rllib.config import TrainConfig

CONFIG = TrainConfig(
    # eq. 2-6: exact score after every step, reward averaged over a mini-batch of 32 episodes
    # (the paper gives no size)
    score_kind="exact",
    max_steps=3,
    alpha=1.0,
    beta=0.1,
    score_steps="all",
    reward_batch_size=32,
    min_tokens=1,
    budget=None,
    # eq. 9-18: one attention block of the codes' own width, the mean query as an extra token
    distribution="bernoulli",
    discount=0.5,
    architecture="attention",
    query="mean",
    fusion="concat",
    width=None,
    layers=1,
    heads=4,
    budget_input=False,
    step_input=False,
    token_norm=False,
    query_norm="none",
    value_query=False,
    # eq. 7, 8: nested VisPruner masks at 75 % and 50 %, unweighted binary cross-entropy
    demonstrator="vispruner",
    imitation_steps=900,
    imitation_batch_size=48,
    imitation_lr=1e-3,
    imitation_class_weights="none",
    # 256 distinct samples per iteration
    samples=256,
    draws=1,
    # eq. 19-24
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
