import numpy as np
import pytest

from tprl_env.evaluation.intervals import mean_interval, paired_difference, wilson_interval
from tprl_env.evaluation.measure import by_type, check_budgets, wanted_count


def test_wilson_interval_literal():
    # 8 of 10: (0.8 + z2/20 -+ z sqrt(.8*.2/10 + z2/400)) / (1 + z2/10) with z2 = 3.841459
    low, high = wilson_interval(8, 10)
    assert low == pytest.approx(0.490162, abs=1e-6)
    assert high == pytest.approx(0.943318, abs=1e-6)
    assert wilson_interval(0, 5)[0] == 0.0
    assert wilson_interval(5, 5)[1] == 1.0


def test_wilson_interval_covers_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.binomial(300, 0.9, size=2000)
    covered = [low <= 0.9 <= high for low, high in (wilson_interval(int(d), 300) for d in draws)]
    assert 0.93 <= np.mean(covered) <= 0.97


@pytest.mark.parametrize(("successes", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses(successes, total):
    with pytest.raises(ValueError, match="successes <= total"):
        wilson_interval(successes, total)


def test_mean_interval_of_graded_scores():
    scores = np.array([0.0, 0.5, 1.0, 0.5], dtype=np.float32)
    # mean .5, standard deviation sqrt(1/6), half = 1.96 * .408248 / 2
    low, high = mean_interval(scores)
    assert (low, high) == pytest.approx((0.1, 0.9), abs=1e-3)


def test_paired_difference_literal():
    first = np.array([1, 1, 0, 1], dtype=np.float32)
    second = np.array([0, 1, 0, 0], dtype=np.float32)
    mean, low, high = paired_difference(first, second)
    assert mean == 0.5
    assert high - mean == pytest.approx(1.959964 * 0.57735 / 2, abs=1e-5)
    assert mean - low == pytest.approx(high - mean)
    with pytest.raises(ValueError, match="same length"):
        paired_difference(first, second[:3])


def test_by_type():
    question_types = np.array(["b", "a", "b"])
    assert by_type(question_types, np.array([1, 0, 0], dtype=np.float32)) == {"a": 0.0, "b": 0.5}


@pytest.mark.parametrize("budgets", [[], [0], [145], [14, -1]])
def test_budgets_out_of_range(budgets):
    with pytest.raises(ValueError, match=r"budgets must be one or more counts in \[1, 144\]"):
        check_budgets(budgets, 144)


def test_shares_are_budgets_between_0_and_1():
    check_budgets([0.2, 1, 144, 1.0], 144)
    for bad in (1.5, 0.0, -0.2):
        with pytest.raises(ValueError, match=r"or shares such as 0\.2"):
            check_budgets([bad], 144)
    # .3 of 10, 5 and 1 tokens: 3, 2 (1.5 rounded up) and 1
    assert wanted_count(0.3, np.array([10, 5, 1])) == 2
    assert wanted_count(7, np.array([3])) == 7
