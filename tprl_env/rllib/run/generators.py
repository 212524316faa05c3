"""The states of all random generators of a run, so that a resumed run draws what it would have.

JSON and no pickles: whoever edits a checkpoint changes what is drawn next, and nothing else.
"""

from __future__ import annotations

import base64
import functools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm import Algorithm

from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.rollout.connector import ColumnsToBatch
from tprl_env.rllib.rollout.runner import TokenPruningRunner

__all__ = ["read_generators", "resumes_exactly", "write_generators"]


def resumes_exactly(config: TrainConfig) -> bool:
    """Whether a resumed run equals the undisturbed one to the bit.

    It does where one process does everything in one order: scorer actors batch what comes when,
    and remote runners and learners join a resumed run as new processes. An LVLM's scores differ in
    their last digits with their batch, which is another one when nothing is remembered yet.
    """
    resources = config.resources
    actors = resources.num_scorers + resources.num_env_runners + resources.num_learners
    scores_alone = config.scoring.scorer != "lvlm"
    return not actors and scores_alone and config.rollout.runner == "fast"


def read_generators(algorithm: Algorithm) -> dict[str, Any]:
    """The states of the samplers of all runners and of the row orders of all learners."""
    group = algorithm.env_runner_group
    runners = [] if group is None else group.foreach_env_runner(_runner_state)
    calls = algorithm.learner_group.foreach_learner(_learner_state)
    learners = [call.get() for call in calls if call.ok]
    return {
        "process": _process_state(),
        "runners": [state for state in runners if state is not None],
        "learners": [state for state in learners if state is not None],
    }


def write_generators(algorithm: Algorithm, states: Mapping[str, Any]) -> None:
    """Set the states of `read_generators`; a runner or learner that is new keeps its own."""
    by_index = {state["index"]: state for state in states["runners"]}
    if algorithm.env_runner_group is not None:
        algorithm.env_runner_group.foreach_env_runner(
            functools.partial(_set_runner, states=by_index)
        )
    if len(states["learners"]) == 1 and algorithm.learner_group.is_local:
        algorithm.learner_group.foreach_learner(
            functools.partial(_set_learner, state=states["learners"][0])
        )
    _set_process(states["process"])


def _process_state() -> dict[str, Any]:
    """Of this process's global generators: RLlib orders minibatches with numpy's."""
    name, key, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "numpy": [name, np.asarray(key).tolist(), position, has_gauss, cached],
        "python": random.getstate(),
        "torch": _text(torch.get_rng_state()),
    }


def _set_process(state: Mapping[str, Any]) -> None:
    name, key, *rest = state["numpy"]
    np.random.set_state((name, np.array(key, np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_tensor(state["torch"]))


def _runner_state(runner: Any) -> dict[str, Any] | None:
    if not isinstance(runner, TokenPruningRunner) or runner.module is None:
        return None
    return {
        "index": runner.worker_index,
        "rounds": runner.rounds_done,
        "samples": runner.np_random.bit_generator.state,
        "masks": _text(runner.module.generator.get_state()),
    }


def _set_runner(runner: Any, states: Mapping[int, Mapping[str, Any]]) -> None:
    state = states.get(getattr(runner, "worker_index", -1))
    if state is None or not isinstance(runner, TokenPruningRunner) or runner.module is None:
        return
    runner.rounds_done = state["rounds"]
    runner.np_random.bit_generator.state = state["samples"]
    runner.module.generator.set_state(_tensor(state["masks"]))


def _connector(learner: Any) -> ColumnsToBatch | None:
    pipeline = getattr(learner, "_learner_connector", None)
    found = [
        part for part in getattr(pipeline, "connectors", ()) if isinstance(part, ColumnsToBatch)
    ]
    return found[0] if found else None


def _learner_state(learner: Any) -> dict[str, Any] | None:
    connector = _connector(learner)
    return None if connector is None else {"rows": connector.generator.bit_generator.state}


def _set_learner(learner: Any, state: Mapping[str, Any]) -> None:
    connector = _connector(learner)
    if connector is not None:
        connector.generator.bit_generator.state = state["rows"]


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
