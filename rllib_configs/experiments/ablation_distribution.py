"""Exact-budget actions against Bernoulli actions against the paper's own MDP."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_distribution",
    question="Exact-budget or independent actions, and what does the paper's own MDP reach?",
    arms={
        "exact-budget": Arm(),
        "bernoulli-count": Arm(preset="bernoulli_count"),
        "paper": Arm(preset="paper"),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
