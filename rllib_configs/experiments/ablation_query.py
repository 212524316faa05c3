"""The question as one mean vector (TPRL sec. 3) against its token embeddings."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_query",
    question="Is one mean vector per question enough, as in TPRL?",
    arms={
        "tokens": Arm(),
        "mean": Arm({"rules.query": "mean"}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
