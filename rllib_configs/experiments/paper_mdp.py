"""TPRL's own MDP, and what in it keeps PPO from learning: one thing after the other is changed."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

RATE = {"lr": 5e-4}
OWN_REWARD = {**RATE, "reward_batch_size": 1}
NO_DISCOUNT = {**OWN_REWARD, "discount": 1.0}
GROUPS = {**NO_DISCOUNT, "samples": 32, "draws": 8, "group_baseline": True}
TOKEN_RATIO = {**GROUPS, "ratio": "token"}

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
    changes={"num_scorers": 0, "imitation_steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
