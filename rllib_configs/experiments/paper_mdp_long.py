"""TPRL's three Bernoulli steps without what kept PPO from learning in ``paper_mdp``, for longer."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="paper_mdp_long",
    question="With more scores, does PPO in TPRL's three steps leave VisPruner's demonstrations?",
    preset="paper",
    tasks=("sparse",),
    arms={
        "no-discount": Arm(
            {"algorithm.lr": 5e-4, "rules.reward_batch_size": 1, "policy.discount": 1.0}
        )
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=50_000,
)
