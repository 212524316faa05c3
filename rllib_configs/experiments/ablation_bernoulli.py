"""Independent keep-decisions: how ratios are clipped, and TPRL's discount over three steps."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_bernoulli",
    question="Bernoulli actions: one ratio per mask or per token? Does the discount (eq. 14) help?",
    arms={
        "token-ratio": Arm(),
        "joint-ratio": Arm({"algorithm.ratio": "joint"}),
        "t3-discount-1": Arm({"rules.max_steps": 3}),
        "t3-discount-0.5": Arm({"rules.max_steps": 3, "policy.discount": 0.5}),
    },
    preset="bernoulli_count",
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
