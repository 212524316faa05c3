"""What is imitated before reinforcement (TPRL table 6): nothing, a heuristic, or the LVLM."""

from tprl_env.rllib.experiment import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_demonstrations",
    question="Which demonstrations are needed? TPRL table 6 compares VisPruner's with none.",
    arms={
        "question_attention": Arm(),
        "vispruner": Arm({"demonstrator": "vispruner"}),
        "divprune": Arm({"demonstrator": "divprune"}),
        "nothing": Arm({"demonstrator": "none"}),
    },
    # each run scores in its own process, so that many fit on a machine
    changes={"num_scorers": 0},
    seeds=(0, 1, 2),
    max_scores=25_000,
)
