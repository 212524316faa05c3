"""T_max from 1 to 5 (TPRL table 7), counts falling geometrically to the same budget."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_steps",
    question="How many pruning steps per episode? TPRL table 7 finds a gain up to three.",
    arms={
        "t1": Arm(),
        "t2": Arm({"rules.max_steps": 2}),
        "t3": Arm({"rules.max_steps": 3}),
        "t4": Arm({"rules.max_steps": 4}),
        "t5": Arm({"rules.max_steps": 5}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
