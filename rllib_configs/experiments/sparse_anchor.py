"""`sparse` at very few tokens: does a KL penalty to the imitation keep its accuracy?"""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="sparse_anchor",
    question="Reinforcement loses .02 to .04 of its imitation at 4 tokens: does an anchor help?",
    arms={
        "kl-.04": Arm(),
        "kl-.4": Arm({"algorithm.kl_coefficient": 0.4}),
        "kl-4": Arm({"algorithm.kl_coefficient": 4.0}),
        "small-step": Arm({"algorithm.lr": 5e-5}),
    },
    preset="grpo",
    tasks=("sparse",),
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
