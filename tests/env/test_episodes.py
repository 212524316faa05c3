"""The batch of episodes below both environments."""

from unittest.mock import Mock

import numpy as np
import pytest

from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.env.episodes import Episodes, choose_episode, open_environment
from tprl_env.env.rules import EpisodeRules
from tprl_env.env.scorer import ScoringError


def begin(count=2, scorer=None, **rules):
    source = ToyStore(samples=8, tokens=8)
    episodes = Episodes(source, scorer or ToyScorer(source, "exact"), EpisodeRules(**rules), count)
    numbers = np.arange(count)
    episodes.start(numbers, numbers, numbers * 0 + 3)
    return episodes


def test_episodes_that_are_not_live_are_left_untouched():
    episodes = begin()
    episodes.advance(np.arange(8) < np.array([[0], [5]]))  # the first one ends
    rewards, ended = episodes.advance(np.arange(8) < np.array([[8], [0]]))
    assert ended.tolist() == [False, True] and rewards[0] == 0
    assert episodes.kept.tolist() == [0, 0] and episodes.step.tolist() == [1, 2]
    assert episodes.live.tolist() == [False, False]


@pytest.mark.parametrize("score_steps", ["all", "final"])
def test_a_transition_changes_nothing_before_it_is_taken_and_says_whom_to_score(score_steps):
    def refuse(samples, keep):
        raise AssertionError("a transition is not scored")

    episodes = begin(scorer=refuse, score_steps=score_steps)
    before = episodes.alive
    taken = episodes.transition(np.arange(8) < np.array([[1], [3]]))
    assert episodes.alive is before and before.all() and episodes.step.tolist() == [0, 0]
    assert taken.kept.tolist() == [1, 3] and taken.ended.tolist() == [True, False]
    assert taken.wanted.tolist() == [True, score_steps == "all"]
    episodes.take(taken)
    assert before.all() and np.isnan(episodes.score).all()
    assert episodes.kept.tolist() == [1, 3] and episodes.live.tolist() == [False, True]
    taken = episodes.transition(np.zeros((2, 8), bool))
    assert taken.kept.tolist() == [1, 0] and taken.wanted.tolist() == [False, True]


def test_who_only_needs_masks_does_not_pay_for_codes():
    source = ToyStore(samples=8, tokens=8)
    source.codes = Mock(wraps=source.codes)
    episodes = Episodes(source, ToyScorer(source, "exact"), EpisodeRules(), 2)
    episodes.start(np.arange(2), np.arange(2), np.zeros(2, int))
    episodes.advance(np.arange(8) < np.array([[1], [3]]))
    assert source.codes.call_count == 0
    for _ in range(2):
        episodes.observation()
    assert source.codes.call_count == 1
    episodes.start(np.array([0]), np.array([5]), np.zeros(1, int))
    np.testing.assert_array_equal(episodes.observation()["tokens"], source._codes[[5, 1]])
    assert source.codes.call_args.args[0].tolist() == [5]  # the other one is known already


def test_starting_one_slot_leaves_the_others():
    episodes = begin()
    episodes.advance(np.arange(16).reshape(2, 8) % 2 == 0)
    episodes.start(np.array([1]), np.array([5]), np.array([2]))
    assert episodes.samples.tolist() == [0, 5] and episodes.step.tolist() == [1, 0]
    assert episodes.alive.sum(1).tolist() == [4, 8]


def test_unscored_steps_have_no_score():
    episodes = begin(score_steps="final")
    episodes.advance(np.ones((2, 8), bool))
    assert not episodes.info()["score"][1].any()
    episodes.start(np.array([1]), np.array([1]), np.array([0]))
    values, known = episodes.info()["score"]
    assert known.tolist() == [False, True] and not np.isnan(values).any()


def test_stored_full_scores_are_checked_too():
    source = ToyStore(samples=8, tokens=8)
    source.full_scores = lambda score_kind: np.full(8, np.nan, np.float32)
    episodes = Episodes(source, ToyScorer(source, "exact"), EpisodeRules(), 1)
    with pytest.raises(ScoringError, match=r"full_scores of the source .*toy-4"):
        episodes.start(np.array([0]), np.array([4]), np.array([0]))


def test_a_scorer_of_the_wrong_length_is_refused():
    episodes = begin(scorer=lambda samples, keep: np.ones(3))
    with pytest.raises(ScoringError, match="for 2 samples"):
        episodes.advance(np.ones((2, 8), bool))


def test_choices_are_drawn_in_a_fixed_order():
    source, rules = ToyStore(samples=100), EpisodeRules(budget=(2, 9))
    expected = np.random.default_rng(0)
    sample = int(expected.integers(100))
    found = choose_episode(np.random.default_rng(0), source, rules)
    assert found == (sample, rules.draw_budget(expected))
    assert choose_episode(expected, source, EpisodeRules(), 7) == (7, 0)
    assert choose_episode(expected, source, rules, 7, 4) == (7, 4)


def test_opening_by_path_goes_to_the_feature_store(tmp_path):
    with pytest.raises((ValueError, OSError, StoreError), match="missing"):
        open_environment(tmp_path / "missing", None, EpisodeRules())


def test_a_source_object_is_used_as_it_is():
    source = ToyStore()
    opened, scorer = open_environment(source, None, EpisodeRules(score_kind="likelihood"))
    assert opened is source and isinstance(scorer, ToyScorer) and scorer.score_kind == "likelihood"
