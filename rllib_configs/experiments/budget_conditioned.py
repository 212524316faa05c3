"""One policy for every budget (GRIP mode, an interpretation) against one policy per budget."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="budget_conditioned",
    question="Does one budget-conditioned policy lose anything against specialists?",
    preset="budget_conditioned",
    arms={
        "one-for-all": Arm(),
        "only-14": Arm({"budget": 14, "budget_input": False}),
        "only-4": Arm({"budget": 4, "budget_input": False}),
    },
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"num_scorers": 0, "imitation_steps": 450},
    seeds=(0, 1, 2),
    max_scores=15_000,
)
