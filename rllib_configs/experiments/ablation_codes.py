"""Width of the autoencoder's codes (TPRL fig. 2); the built-in tokens have 128 numbers."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_codes",
    question="How far can tokens be compressed for the policy? TPRL figure 2.",
    arms={
        "width-64": Arm(),
        "width-8": Arm(code_width=8),
        "width-128": Arm(code_width=128),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
