"""The anchored arms of ``sparse_anchor`` at the size of ``compare_optimizers``."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="sparse_anchor_long",
    question="Anchored to the full imitation: what does reinforcement add on `sparse`?",
    arms={
        "kl-1": Arm({"algorithm.kl_coefficient": 1.0}),
        "kl-4": Arm({"algorithm.kl_coefficient": 4.0}),
    },
    preset="grpo",
    tasks=("sparse",),
    # each run scores in its own process, so that many fit on a machine
    changes={"resources.num_scorers": 0},
    seeds=(0, 1, 2, 3, 4),
    max_scores=50_000,
)
