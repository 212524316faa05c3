"""Six times the scores of the recommended preset: what is left to gain."""

from tprl_env.rllib.experiment import Arm, Experiment

EXPERIMENT = Experiment(
    name="long_run",
    question="What do six times as many LVLM scores add?",
    arms={"recommended": Arm()},
    # each run scores in its own process, so that many fit on a machine
    changes={"num_scorers": 0},
    seeds=(0, 1, 2),
    max_scores=300_000,
)
