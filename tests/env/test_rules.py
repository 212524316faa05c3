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


def test_a_share_is_of_each_samples_tokens():
    fixed = EpisodeRules(budget=0.3)
    generator = np.random.default_rng(0)
    state = generator.bit_generator.state
    # 4.5 is rounded up, .3 of one token is one token
    assert [fixed.draw_budget(generator, n) for n in (15, 10, 1)] == [5, 3, 1]
    assert generator.bit_generator.state == state and fixed.shares
    assert fixed.counts(15) == (5, 5) and EpisodeRules(budget=(0.1, 0.5)).counts(20) == (2, 10)
    assert EpisodeRules(budget=4).counts(20) == (4, 4) and EpisodeRules().counts(9) is None
    drawn = EpisodeRules(budget=[0.1, 0.4])
    found = np.array([drawn.draw_budget(generator, 100) for _ in range(4000)])
    assert found.min() == 10 and found.max() == 40
    assert np.mean(found < 20) == pytest.approx(0.5, abs=0.03)  # log-uniform: .2 is the middle


def test_environments_want_a_share_of_each_picture():
    source = "toy:samples=12,tokens=17,vary=1"
    env = TokenPruningEnv(source, budget=0.5)
    wanted = {}
    for sample in range(12):
        observation, _ = env.reset(seed=sample, options={"sample": sample})
        wanted[sample] = (int(observation["budget"][0]), int(observation["alive"].sum()))
    assert len(set(wanted.values())) > 3
    assert all(count == max(1, int(n / 2 + 0.5)) for count, n in wanted.values())
    vector = TokenPruningVectorEnv(4, source, budget=(0.25, 0.75))
    observation, _ = vector.reset(seed=0)
    share = observation["budget"][:, 0] / observation["alive"].sum(1)
    assert ((share > 0.2) & (share < 0.8)).all() and len(set(share)) > 1
