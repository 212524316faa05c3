"""The paper's single query vector at full size, in the ``mean_query`` preset (fused by a gate)."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="mean_query",
    question="What does one query vector reach at full size, with a gate instead of the sum?",
    arms={"mean-query": Arm(preset="mean_query")},
    # each run scores in its own process, so that many fit on a machine
    changes={"resources.num_scorers": 0},
    seeds=(0, 1, 2),
    max_scores=50_000,
)
