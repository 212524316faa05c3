"""Attention between tokens against an MLP on each (TPRL table 8)."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_architecture",
    question="Does the policy need attention between tokens? TPRL table 8 says so.",
    arms={
        "attention": Arm(),
        "mlp": Arm({"policy.architecture": "mlp"}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
