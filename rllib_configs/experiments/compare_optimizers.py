"""PPO, GRPO and MAPO from the same imitations at an equal number of LVLM scores (TPRL fig. 3)."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="compare_optimizers",
    question="Does the optimiser matter? TPRL figure 3 shows one run each.",
    arms={
        "ppo": Arm(),
        "grpo": Arm(preset="grpo"),
        "mapo": Arm(preset="mapo"),
    },
    tasks=("crowded", "sparse"),
    # each run scores in its own process, so that many fit on a machine
    changes={"resources.num_scorers": 0},
    seeds=(0, 1, 2, 3, 4),
    max_scores=50_000,
)
