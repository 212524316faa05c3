"""TPRL's own MDP, and what in it keeps PPO from learning: one thing after the other is changed."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

RATE = {"algorithm.lr": 5e-4}
OWN_REWARD = {**RATE, "rules.reward_batch_size": 1}
NO_DISCOUNT = {**OWN_REWARD, "policy.discount": 1.0}
GROUPS = {**NO_DISCOUNT, "rollout.samples": 32, "rollout.draws": 8, "rollout.group_baseline": True}
TOKEN_RATIO = {**GROUPS, "algorithm.ratio": "token"}

EXPERIMENT = Experiment(
    name="paper_mdp",
    question="Does PPO in TPRL's own MDP improve on VisPruner's demonstrations, and if not, why?",
    preset="paper",
    tasks=("sparse",),  # where tokens can be told apart without the question
    arms={
        "letter": Arm(),
        "lr-5e-4": Arm(RATE),
        "own-reward": Arm(OWN_REWARD),
        "no-discount": Arm(NO_DISCOUNT),
        "groups": Arm(GROUPS),
        "token-ratio": Arm(TOKEN_RATIO),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
