"""What the shipped checkpoints answer, through the path that every other LVLM takes."""

import pytest

pytest.importorskip("transformers")

from tprl_env.data.scenes import QUESTION_TYPES
from tprl_env.evaluation.tiny_lvlm import measure_tiny_lvlm
from tprl_env.lvlm.tiny import builtin_path


@pytest.mark.parametrize("task", ["crowded", "sparse"])
def test_the_shipped_weights_answer_every_type_of_question(task):
    found = measure_tiny_lvlm(
        builtin_path(task), task, 60, budgets=(14,), pruners=("oracle", "oracle_spread", "random")
    )
    full = found["full"]
    assert found["questions"] == 360 and list(full) == ["all", *QUESTION_TYPES]
    assert full["all"] >= 0.92
    assert min(full[name] for name in QUESTION_TYPES) >= 0.86  # 60 questions each: sd about .03
    assert found["oracle"]["14"]["all"] >= full["all"] - 0.03
    assert found["oracle_spread"]["14"]["all"] >= full["all"] - 0.03
    assert found["random"]["14"]["all"] <= 0.6


def test_an_unknown_pruner_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"pruners must be one of 'oracle', .* got 'magic'"):
        measure_tiny_lvlm(tmp_path, "crowded", pruners=["magic"])
