"""One builder of observations: keys, types and values are the same wherever they are built."""

import itertools

import numpy as np
import pytest

from tprl_env.data.features.toy import ToyStore
from tprl_env.env import TokenPruningVectorEnv
from tprl_env.env.observations import look_up, observation_space, progress

SOURCE = ToyStore(samples=6, tokens=9, seed=1, vary=True)


@pytest.mark.parametrize(
    ("query", "budget"), list(itertools.product(("mean", "tokens"), (None, np.array([4, 5]))))
)
def test_the_space_holds_what_is_built_and_nothing_else(query, budget):
    samples = np.array([2, 5])
    parts = look_up(SOURCE, samples, query, masks=np.int8)
    parts |= progress(SOURCE.exists(samples), [0, 2], budget, masks=np.int8)
    space = observation_space(SOURCE, query, max_steps=2, has_budget=budget is not None)
    assert set(parts) == set(space)
    for row in range(2):
        one = {name: part[row] for name, part in parts.items()}
        assert space.contains(one)
        assert all(part.dtype == space[name].dtype for name, part in one.items())


def test_the_environment_shows_what_the_builder_builds():
    envs = TokenPruningVectorEnv(2, SOURCE, query="tokens", budget=4)
    envs.reset(seed=0, options={"sample": [2, 5]})
    keep = np.arange(9) % 2 == 0
    found, *_ = envs.step(np.stack([keep, keep]))
    samples = np.array([2, 5])
    expected = look_up(SOURCE, samples, "tokens", masks=np.int8)
    expected |= progress(SOURCE.exists(samples) & keep, 1, 4, masks=np.int8)
    assert list(found) == list(expected)
    for name, part in expected.items():
        assert found[name].dtype == part.dtype
        np.testing.assert_array_equal(found[name], part)


def test_progress_owns_its_arrays():
    alive = np.ones((2, 3), bool)
    parts = progress(alive, 1)
    parts["alive"][:] = False
    assert alive.all() and parts["step"].tolist() == [[1.0], [1.0]] and "budget" not in parts
