"""Settings and spaces that both environments share."""

import dataclasses
import inspect

import numpy as np
import pytest
from gymnasium import spaces

from tprl_env.data.features.toy import ToyStore
from tprl_env.env import TokenPruningEnv, TokenPruningVectorEnv
from tprl_env.env.observations import VALUE_LIMIT
from tprl_env.env.rules import EpisodeRules, check_choice, check_options, coerce_action


def test_rules_are_frozen_and_have_the_papers_defaults():
    rules = EpisodeRules()
    assert (rules.max_steps, rules.alpha, rules.beta, rules.min_tokens) == (3, 1.0, 0.1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rules.alpha = 2.0


@pytest.mark.parametrize("environment", [TokenPruningEnv, TokenPruningVectorEnv])
def test_the_environments_take_every_rule_with_its_default(environment):
    taken = inspect.signature(environment).parameters
    for rule in dataclasses.fields(EpisodeRules):
        assert taken[rule.name].default == rule.default
        assert taken[rule.name].annotation == rule.type


def test_a_budget_list_becomes_a_tuple():
    assert EpisodeRules(budget=[2, 8]).budget == (2, 8)


def test_observation_space():
    space = EpisodeRules(query="tokens", budget=3).observation_space(ToyStore(tokens=12, width=5))
    limit = VALUE_LIMIT
    expected = {
        "tokens": spaces.Box(-limit, limit, (12, 5), np.float32),
        "query": spaces.Box(-limit, limit, (3, 5), np.float32),
        "query_mask": spaces.Box(0, 1, (3,), np.int8),
        "alive": spaces.Box(0, 1, (12,), np.int8),
        "step": spaces.Box(0, 3, (1,), np.float32),
        "budget": spaces.Box(1, 12, (1,), np.float32),
    }
    assert dict(space) == expected


def test_draws_cover_the_range_with_log_uniform_frequencies():
    generator = np.random.default_rng(0)
    rules = EpisodeRules(budget=(1, 3))
    drawn = np.array([rules.draw_budget(generator) for _ in range(6000)])
    shares = [np.mean(drawn == k) for k in (1, 2, 3)]
    # log(2 / 1), log(3 / 2), log(4 / 3), each over log 4
    np.testing.assert_allclose(shares, [0.5, 0.2925, 0.2075], atol=0.02)
    assert EpisodeRules(budget=(7, 7)).draw_budget(generator) == 7


def test_a_fixed_budget_draws_nothing():
    generator = np.random.default_rng(0)
    before = generator.bit_generator.state
    assert EpisodeRules(budget=5).draw_budget(generator) == 5
    assert generator.bit_generator.state == before
    with pytest.raises(ValueError, match="has no budget"):
        EpisodeRules().draw_budget(generator)


def test_unknown_choices_without_a_near_name_have_no_hint():
    with pytest.raises(ValueError, match=r"score_kind must be one of 'a', 'b', got 7$"):
        check_choice("score_kind", 7, ("a", "b"))


def test_options_may_be_absent():
    assert check_options(None, EpisodeRules()) == {} == check_options({}, EpisodeRules())


def test_coerced_actions_are_boolean():
    found = coerce_action([1, 0, 1], (3,))
    assert found.dtype == bool and found.tolist() == [True, False, True]
