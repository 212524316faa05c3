"""What of MAPO is its memory, and what the one budget per sample that the memory needs."""

from tprl_env.rllib.experiments.definition import Arm, Experiment

EXPERIMENT = Experiment(
    name="ablation_memory",
    question="Does MAPO gain by its memory, or by one fixed budget per sample?",
    arms={
        "mapo": Arm(),
        # the weight is then the policy's own probability of a remembered mask: all but zero
        "no-memory": Arm({"algorithm.memory_weight": 0.0}),
        "ppo-fixed-budgets": Arm({"rollout.fixed_budgets": True}, preset="ppo"),
        "ppo": Arm(preset="ppo"),
    },
    preset="mapo",
    # half the imitation of the preset; each run scores in its own process, so that many fit
    changes={"resources.num_scorers": 0, "imitation.steps": 450},
    seeds=(0, 1, 2),
    # the memory has something to say once samples come again: here each comes three times
    train_questions=1000,
    max_scores=24_000,
)
