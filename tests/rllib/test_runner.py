"""The fast path gives the batch of RLlib's default path; advantages are literal."""

from __future__ import annotations

from unittest.mock import Mock

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.env.single_agent_env_runner import SingleAgentEnvRunner
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env.env.rules import EpisodeRules
from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.config import TrainConfig, load_config
from tprl_env.rllib.rollout.advantages import advantages, generalised_advantages
from tprl_env.rllib.rollout.connector import ColumnsToBatch
from tprl_env.rllib.rollout.episodes import EpisodeColumns, Rollout
from tprl_env.rllib.rollout.runner import TokenPruningRunner

SMALL = load_config(
    "smoke",
    {
        "rollout.samples": 6,
        "rollout.draws": 2,
        "seed": 7,
        "algorithm.gamma": 0.9,
        "algorithm.gae_lambda": 0.8,
    },
)
EXACT = SMALL.replace(
    **{
        "rules.max_steps": 3,
        "rules.score_steps": "all",
        "rules.beta": 0.1,
        "policy.step_input": True,
    }
)
COINS = SMALL.replace(
    **{
        "policy.distribution": "bernoulli",
        "rules.budget": None,
        "policy.budget_input": False,
        "policy.discount": 0.9,
        "policy.initial_keep": 0.95,
        "rules.max_steps": 3,
        "rules.score_steps": "final",
        "rules.beta": 0.2,
        "rules.reward_batch_size": 4,
        "rules.min_tokens": 0,
    },
)


def default_batch(config: TrainConfig) -> dict:
    """One iteration through RLlib's runner and default learner connectors, real rows only."""
    settings = algorithm_config(config.replace(**{"rollout.runner": "default"}))
    runner = SingleAgentEnvRunner(config=settings, worker_index=0, num_workers=0)
    episodes = runner.sample(num_episodes=config.rollout.samples * config.rollout.draws)
    learner = settings.build_learner(env=None, spaces=runner.get_spaces())
    batch = learner._make_batch_if_necessary(TrainingData(episodes=episodes))
    rows = batch[DEFAULT_MODULE_ID]
    mask = rows[Columns.LOSS_MASK].numpy()
    flat = {name: rows[name].numpy()[mask] for name in COLUMNS}
    # RLlib normalises over its artificial rows too: an affine map of the advantages
    gain = flat[Postprocessing.ADVANTAGES]
    flat[Postprocessing.ADVANTAGES] = (gain - gain.mean()) / gain.std()
    flat |= {name: rows[Columns.OBS][name].numpy()[mask] for name in ("alive", "step")}
    if config.rules.budget is not None:
        flat["budget"] = rows[Columns.OBS]["budget"].numpy()[mask]
    return flat


def fast_batch(config: TrainConfig) -> tuple[dict, TokenPruningRunner]:
    """The same through the fast path, in the default path's order: episode by episode."""
    settings = algorithm_config(config)
    runner = TokenPruningRunner(config=settings, worker_index=0, num_workers=0)
    connector = ColumnsToBatch(normalize=config.algorithm.normalize_advantages)
    learner_module = {DEFAULT_MODULE_ID: runner.module}
    batch = connector(rl_module=learner_module, batch={}, episodes=runner.sample())
    rows = batch[DEFAULT_MODULE_ID]
    number = config.rollout.samples * config.rollout.draws
    steps = len(rows[Columns.ACTION_LOGP]) // number
    order = np.arange(number * steps).reshape(steps, number).T.reshape(-1)
    flat = {name: rows[name].numpy()[order] for name in COLUMNS}
    flat |= {
        name: part.numpy()[order] for name, part in rows[Columns.OBS].items() if name != "state"
    }
    return flat, runner


COLUMNS = (
    Columns.ACTIONS,
    Columns.ACTION_LOGP,
    Postprocessing.ADVANTAGES,
    Postprocessing.VALUE_TARGETS,
)


@pytest.mark.parametrize("config", [SMALL, EXACT, COINS], ids=["one-step", "exact", "bernoulli"])
def test_fast_and_default_path_give_the_same_batch(config):
    ours, runner = fast_batch(config)
    theirs = default_batch(config)
    np.testing.assert_array_equal(ours[Columns.ACTIONS], theirs[Columns.ACTIONS])
    np.testing.assert_array_equal(ours["alive"], theirs["alive"].astype(bool))
    np.testing.assert_array_equal(ours["step"], theirs["step"])
    if config.rules.budget is not None:
        np.testing.assert_array_equal(ours["budget"], theirs["budget"])
    for name in COLUMNS[1:]:
        np.testing.assert_allclose(ours[name], theirs[name], atol=2e-5, err_msg=name)
    assert len(ours[Columns.ACTION_LOGP]) == 12 * config.rules.max_steps
    metrics = runner.metrics.peek(("scorer", "scores"))
    assert metrics == (36 if config is EXACT else 12)  # one request for the whole rollout


def test_rounds_are_pipelined_and_groups_share_sample_and_budget():
    config = SMALL.replace(**{"rollout.rounds": 3, "rollout.draws": 4})
    runner = TokenPruningRunner(config=algorithm_config(config), worker_index=0, num_workers=0)
    events = []
    submit, finish = runner.scorer.submit, runner._finish
    runner.scorer.submit = lambda *a: events.append("submit") or submit(*a)
    runner._finish = lambda *a: events.append("finish") or finish(*a)
    stores = runner.sample()
    assert events == ["submit", "submit", "finish", "submit", "finish", "finish"]
    assert [len(store) for store in stores] == [8, 8, 8]
    for store in stores:
        obs = store.columns[Columns.OBS]
        for name in ("sample", "budget", "state"):
            assert (obs[name].reshape(2, 4) == obs[name].reshape(2, 4)[:, :1]).all()


@pytest.mark.parametrize("config", [EXACT, COINS], ids=["every step", "last step"])
def test_scorers_elsewhere_are_asked_after_every_step_and_answer_the_same(config):
    stores, requests = [], []
    for concurrent in (False, True):
        runner = TokenPruningRunner(config=algorithm_config(config), worker_index=0, num_workers=0)
        runner.scorer.concurrent = concurrent
        runner.scorer.submit = submit = Mock(wraps=runner.scorer.submit)
        stores += runner.sample()
        requests.append([len(call.args[0]) for call in submit.call_args_list])
    assert requests[0] == [36 if config is EXACT else 12]
    assert requests[1] == ([12, 12, 12] if config is EXACT else [12])  # nothing to ask in between
    for name, column in stores[0].columns.items():
        if name != Columns.OBS:
            np.testing.assert_array_equal(stores[1].columns[name], column, err_msg=name)


def test_one_budget_per_round():
    runner = TokenPruningRunner(
        config=algorithm_config(SMALL.replace(**{"rollout.shared_budget": True})),
        worker_index=0,
        num_workers=0,
    )
    for _ in range(3):
        [store] = runner.sample()
        assert len(np.unique(store.columns[Columns.OBS]["budget"])) == 1


def test_runners_of_other_seeds_and_restarted_runners_draw_other_samples():
    settings = algorithm_config(SMALL)
    runners = [
        TokenPruningRunner(config=settings, worker_index=index, num_workers=0)
        for index in (0, 0, 1, 0)
    ]
    state = runners[0].get_state()
    runners[3].set_state({**state, "weights_seq_no": 9})
    samples = [r.sample()[0].columns[Columns.OBS]["sample"].tolist() for r in runners]
    assert samples[0] == samples[1]
    assert len({tuple(s) for s in samples}) == 3


def test_gae_by_hand():
    rewards = np.array([[1.0, 0.5], [0.0, 2.0], [3.0, 0.0]], np.float32)
    values = np.array([[0.5, 1.0], [0.25, 0.5], [1.0, 0.0]], np.float32)
    live = np.array([[True, True], [True, True], [True, False]])
    result = generalised_advantages(rewards, values, live, 0.5, 0.5)
    third = 3.0 - 1.0
    second = 0.0 + 0.5 * 1.0 - 0.25 + 0.25 * third
    first = 1.0 + 0.5 * 0.25 - 0.5 + 0.25 * second
    other_second = 2.0 - 0.5
    other_first = 0.5 + 0.5 * 0.5 - 1.0 + 0.25 * other_second
    expected = [[first, other_first], [second, other_second], [third, 0.0]]
    np.testing.assert_allclose(result, expected, atol=1e-6)


def one_step(counts: list[int]) -> Rollout:
    number = len(counts)
    rollout = Rollout(
        np.zeros(number, int), np.arange(number) // 2, np.zeros(number, int), np.ones(number)
    )
    rollout.counts = [np.full(number, 10), np.array(counts)]
    rollout.live = [np.ones(number, bool)]
    rollout.values = [np.zeros(number, np.float32)]
    return rollout


def test_group_baseline_and_count_regression():
    rules = EpisodeRules(max_steps=1, beta=0.0, min_tokens=0)
    settings = {"gamma": 1.0, "gae_lambda": 1.0}
    rollout = one_step([2, 8, 3, 3])
    scores = np.array([[0.2, 0.8, 0.5, 0.9]], np.float32)
    plain = advantages(rollout, scores, rules, **settings)
    np.testing.assert_allclose(plain.advantages, [[-0.8, -0.2, -0.5, -0.1]], atol=1e-6)
    grouped = advantages(rollout, scores, rules, group_baseline=True, **settings)
    np.testing.assert_allclose(grouped.advantages, [[-0.3, 0.3, -0.2, 0.2]], atol=1e-6)
    np.testing.assert_allclose(grouped.targets, plain.targets)
    free = advantages(
        rollout, scores, rules, group_baseline=True, count_regression_baseline=True, **settings
    )  # all that the first group knows is "more is better"
    np.testing.assert_allclose(free.advantages, [[0.0, 0.0, -0.2, 0.2]], atol=1e-5)


def test_connector_normalises_shuffles_and_keeps_states_apart():
    def store(start: int) -> EpisodeColumns:
        rows = np.arange(start, start + 4)
        return EpisodeColumns(
            {
                Columns.OBS: {"sample": rows, "state": np.array([0, 0, 1, 1])},
                Columns.ACTION_LOGP: rows.astype(np.float32),
                Postprocessing.ADVANTAGES: rows.astype(np.float32),
            },
            4,
        )

    connector = ColumnsToBatch(normalize=True, shuffle=True, seed=1)
    module = {DEFAULT_MODULE_ID: torch.nn.Linear(1, 1)}
    batch = connector(rl_module=module, batch={}, episodes=[store(0), store(4)])
    rows = batch[DEFAULT_MODULE_ID]
    values = rows[Postprocessing.ADVANTAGES]
    assert abs(float(values.mean())) < 1e-6 and float(values.std(correction=0)) == pytest.approx(1)
    assert rows[Columns.OBS]["sample"].tolist() != list(range(8))
    torch.testing.assert_close(rows[Columns.OBS]["sample"].float(), rows[Columns.ACTION_LOGP])
    assert len(rows[Columns.OBS]["state"].unique()) == 4
    part = store(0)[1:3]
    assert len(part) == 2 and part.columns[Columns.OBS]["sample"].tolist() == [1, 2]
