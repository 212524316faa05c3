"""What is imitated before reinforcement (TPRL table 6): nothing, a heuristic, or the LVLM."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_demonstrations",
    question="Which demonstrations are needed? TPRL table 6 compares VisPruner's with none.",
    arms={
        "question_attention": Arm(),
        "vispruner": Arm({"imitation.demonstrator": "vispruner"}),
        "divprune": Arm({"imitation.demonstrator": "divprune"}),
        "nothing": Arm({"imitation.demonstrator": "none"}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
