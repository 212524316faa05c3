"""Tensors for the policy have the keys, shapes and values of the environment's observation."""

import numpy as np
import pytest
import torch

from tprl_env.data.features.toy import ToyStore
from tprl_env.env.observations import look_up, progress
from tprl_env.policy.network import PolicyConfig
from tprl_env.policy.observations import observe, observe_inputs, to_tensors, with_progress
from tprl_env.reducers.interfaces import prune_inputs

SOURCE = ToyStore(samples=6, tokens=9, seed=1)  # no padding: both builders give equal widths


@pytest.mark.parametrize("query", ["mean", "tokens"])
def test_a_store_and_its_prune_inputs_give_one_observation(query):
    config = PolicyConfig(SOURCE.code_width, SOURCE.query_width, query=query)
    samples = [4, 1, 1]
    numbers = np.array(samples)
    wanted = to_tensors(look_up(SOURCE, numbers, query) | progress(SOURCE.exists(numbers), 0))
    found = [
        observe(SOURCE, samples, config),
        observe_inputs([prune_inputs(SOURCE, sample) for sample in samples], config),
    ]
    for one in found:
        assert set(one) == set(wanted)
        for name, part in wanted.items():
            assert one[name].dtype == part.dtype
            torch.testing.assert_close(one[name], part, msg=name)


def test_progress_in_tensors_is_progress_in_arrays():
    config = PolicyConfig(SOURCE.code_width, SOURCE.query_width)
    alive = np.random.default_rng(0).random((2, 9)) < 0.5
    budget = np.array([3, 4])
    obs = with_progress(
        observe(SOURCE, [0, 1], config),
        alive=torch.from_numpy(alive),
        step=2,
        budget=torch.from_numpy(budget),
    )
    for name, part in to_tensors(progress(alive, 2, budget)).items():
        assert obs[name].dtype == part.dtype and torch.equal(obs[name], part)


def test_read_only_arrays_are_copied():
    part = np.zeros(3, np.float32)
    part.flags.writeable = False
    tensor = to_tensors({"step": part})["step"]
    tensor += 1
    assert part.tolist() == [0, 0, 0]
