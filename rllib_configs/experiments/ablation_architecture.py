"""Attention between tokens against an MLP on each (TPRL table 8)."""

from tprl_env.rllib.experiment import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_architecture",
    question="Does the policy need attention between tokens? TPRL table 8 says so.",
    arms={
        "attention": Arm(),
        "mlp": Arm({"architecture": "mlp"}),
    },
    # each run scores in its own process, so that many fit on a machine
    changes={"num_scorers": 0},
    seeds=(0, 1, 2),
    max_scores=25_000,
)
