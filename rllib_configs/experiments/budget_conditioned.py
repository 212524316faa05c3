"""One policy for every budget (GRIP mode, an interpretation) against one policy per budget."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="budget_conditioned",
    question="Does one budget-conditioned policy lose anything against specialists?",
    preset="budget_conditioned",
    arms={
        "one-for-all": Arm(),
        "only-14": Arm({"rules.budget": 14, "policy.budget_input": False}),
        "only-4": Arm({"rules.budget": 4, "policy.budget_input": False}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
