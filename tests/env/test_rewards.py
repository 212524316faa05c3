"""Literal numbers for the equations, and what the functions refuse."""

import numpy as np
import pytest

from tprl_env.env.rewards import (
    advance,
    batch_mean_reward,
    episode_rewards,
    is_terminal,
    needs_score,
    step_budgets,
    step_reward,
)


def test_a_pruned_token_never_returns():
    alive = np.array([True, True, False, False])
    keep = np.array([True, False, True, False])
    np.testing.assert_array_equal(advance(alive, keep), [True, False, False, False])


@pytest.mark.parametrize("keep", [np.ones(4), np.ones(3, bool)])
def test_advance_refuses_other_types_and_shapes(keep):
    with pytest.raises(ValueError, match="boolean arrays of one shape"):
        advance(np.ones(4, bool), keep)


@pytest.mark.parametrize(
    ("score", "previous", "kept", "before", "alpha", "beta", "expected"),
    [
        (0.75, 0.5, 72, 144, 1.0, 0.1, 0.3),  # 0.25 + 0.1 * 0.5
        (0.5, 1.0, 36, 144, 1.0, 0.1, -0.425),  # -0.5 + 0.1 * 0.75
        (0.5, 1.0, 36, 144, 2.0, 0.4, -0.7),  # -1.0 + 0.4 * 0.75
        (1.0, 1.0, 144, 144, 1.0, 0.1, 0.0),
        (0.0, 1.0, 0, 10, 1.0, 0.1, -0.9),  # no token left is legal
    ],
)
def test_step_reward(score, previous, kept, before, alpha, beta, expected):
    value = step_reward(score, previous, kept, before, alpha, beta)
    assert value.dtype == np.float32
    assert float(value) == pytest.approx(expected, abs=1e-6)


def test_step_reward_broadcasts():
    value = step_reward([0.5, 1.0], [1.0, 1.0], [5, 2], [10, 10])
    np.testing.assert_allclose(value, [-0.45, 0.08], atol=1e-6)


def test_step_reward_refuses_impossible_counts():
    with pytest.raises(ValueError, match="kept_before must be at least 1, got 0"):
        step_reward(1.0, 1.0, 0, 0)
    with pytest.raises(ValueError, match="never returns"):
        step_reward(1.0, 1.0, 5, 4)


def test_is_terminal_by_step_or_by_count():
    kept = np.array([9, 9, 2, 1, 0])
    step = np.array([2, 3, 1, 1, 1])
    ended = is_terminal(kept, step, max_steps=3, min_tokens=1)
    np.testing.assert_array_equal(ended, [False, True, False, True, True])
    assert not is_terminal(1, 1, 3, min_tokens=0) and is_terminal(0, 1, 3, min_tokens=0)


def test_batch_mean_counts_live_episodes_only():
    rewards = np.array([[1.0, 2.0, np.nan], [np.nan, np.nan, np.nan]])
    live = np.array([[True, True, False], [False, False, False]])
    np.testing.assert_allclose(batch_mean_reward(rewards, live), [[1.5, 1.5, 0], [0, 0, 0]])
    with pytest.raises(ValueError, match="same shape"):
        batch_mean_reward(rewards, live[0])


SCORES = np.array([[0.8, 0.5], [0.6, np.nan], [0.9, np.nan]])
FULL = np.array([1.0, 0.75])
KEPT = np.array([[8, 8], [4, 1], [2, 1], [2, 1]])
LIVE = np.array([[True, True], [True, False], [True, False]])


def test_episode_rewards_all_steps():
    found = episode_rewards(SCORES, FULL, KEPT, LIVE, 1.0, 0.1, "all")
    expected = [[-0.15, -0.1625], [-0.15, 0.0], [0.3, 0.0]]
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_episode_rewards_final_ignores_earlier_scores():
    scores = SCORES.copy()
    scores[:2, 0] = np.nan
    found = episode_rewards(scores, FULL, KEPT, LIVE, 1.0, 0.1, "final")
    np.testing.assert_allclose(found, [[0.05, -0.1625], [0.05, 0.0], [-0.1, 0.0]], atol=1e-6)


def test_final_and_all_have_the_same_undiscounted_return():
    both = [episode_rewards(SCORES, FULL, KEPT, LIVE, 1.3, 0.2, mode) for mode in ("all", "final")]
    np.testing.assert_allclose(both[0].sum(0), both[1].sum(0), atol=1e-6)


def test_episode_rewards_survive_an_episode_that_kept_nothing():
    found = episode_rewards([[0.25], [np.nan]], [1.0], [[4], [0], [0]], [[True], [False]])
    np.testing.assert_allclose(found, [[-0.65], [0.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_steps": "last"}, "score_steps must be one of"),
        ({"scores": SCORES[0]}, "scores must have shape"),
        ({"full": FULL[:1]}, r"full must have shape \(2,\)"),
        ({"kept": KEPT[:3]}, r"kept must have shape \(4, 2\)"),
        ({"live": LIVE[:2]}, r"live must have shape \(3, 2\)"),
        ({"live": LIVE[::-1]}, "episode 1 continues"),
    ],
)
def test_episode_rewards_refuse_parts_that_do_not_fit(changes, message):
    arguments = {"scores": SCORES, "full": FULL, "kept": KEPT, "live": LIVE, **changes}
    with pytest.raises(ValueError, match=message):
        episode_rewards(**arguments)


@pytest.mark.parametrize(
    ("tokens", "budget", "steps", "expected"),
    [
        (1000, 1, 3, [100, 10, 1]),
        (576, 72, 3, [288, 144, 72]),
        (144, 14, 1, [14]),
        (10, 10, 2, [10, 10]),
        (3, 2, 3, [3, 2, 2]),
    ],
)
def test_step_budgets(tokens, budget, steps, expected):
    np.testing.assert_array_equal(step_budgets(tokens, budget, steps), expected)


def test_step_budgets_of_a_batch():
    found = step_budgets([576, 144], [72, 18], 3)
    np.testing.assert_array_equal(found, [[288, 144, 72], [72, 36, 18]])
    assert found.dtype == np.int64


def test_step_budgets_never_grow():
    for tokens in (5, 17, 144):
        for budget in range(1, tokens + 1):
            counts = step_budgets(tokens, budget, 4)
            assert counts[-1] == budget and counts[0] <= tokens and np.all(np.diff(counts) <= 0)


@pytest.mark.parametrize(("tokens", "budget", "steps"), [(4, 0, 3), (4, 5, 3), (4, 2, 0)])
def test_step_budgets_refuse(tokens, budget, steps):
    with pytest.raises(ValueError, match="must"):
        step_budgets(tokens, budget, steps)


def test_needs_score():
    live, ended = np.array([True, True, False]), np.array([True, False, False])
    assert needs_score(live, ended, "all").tolist() == [True, True, False]
    assert needs_score(live, ended, "final").tolist() == [True, False, False]
    with pytest.raises(ValueError, match="score_steps must be one of"):
        needs_score(live, ended, "some")
