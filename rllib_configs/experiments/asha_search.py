"""Asynchronous successive halving over PPO's learning rate, clipping, entropy and group size."""

from ray import tune

from tprl_env.rllib.experiments.definition import Search

SEARCH = Search(
    name="asha_search",
    question="Which learning rate, clip range, entropy and draws per sample suit PPO?",
    space={
        "algorithm.lr": tune.loguniform(1e-4, 3e-3),
        "algorithm.clip": tune.choice([0.1, 0.2, 0.3]),
        "algorithm.entropy": tune.loguniform(3e-4, 3e-2),
        "rollout.draws": tune.choice([4, 8, 16]),
    },
    changes={"resources.num_scorers": 0},
    trials=8,
    max_scores=20_000,
    grace_scores=5_000,
    reduction=2,
    budget=7,
)
