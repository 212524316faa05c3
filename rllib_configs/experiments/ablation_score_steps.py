"""Three steps scored once at the end, or after every step for thrice the scores."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_score_steps",
    question="Is a score after every step worth three times the price?",
    arms={
        "final": Arm({"rules.max_steps": 3}),
        "all": Arm({"rules.max_steps": 3, "rules.score_steps": "all"}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
