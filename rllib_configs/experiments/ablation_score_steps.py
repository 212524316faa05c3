"""Three steps scored once at the end, or after every step for thrice the scores."""

from tprl_env.rllib.experiment import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_score_steps",
    question="Is a score after every step worth three times the price?",
    arms={
        "final": Arm({"max_steps": 3}),
        "all": Arm({"max_steps": 3, "score_steps": "all"}),
    },
    # each run scores in its own process, so that many fit on a machine
    changes={"num_scorers": 0},
    seeds=(0, 1, 2),
    max_scores=25_000,
)
