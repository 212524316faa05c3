"""Reward per sample against the mean over a batch of episodes (TPRL eq. 4)."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_reward_batch",
    question="Should episodes share the mean reward of their batch, as in TPRL equation 4?",
    arms={
        "per-sample": Arm(),
        "batch-8": Arm({"rules.reward_batch_size": 8}),
        "batch-32": Arm({"rules.reward_batch_size": 32}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
