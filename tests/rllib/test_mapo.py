"""MAPO: the memory, the mixture by hand and by enumeration, checkpoints that hold the memory."""

from __future__ import annotations

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

import ray
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.algorithms.losses import ROW_WEIGHT
from tprl_env.rllib.algorithms.mapo import mapo_loss, new_memory
from tprl_env.rllib.algorithms.mapo_memory import EpisodeMemory
from tprl_env.rllib.algorithms.mapo_mixture import mix, mixture_weights
from tprl_env.rllib.config import MapoSettings, load_config
from tprl_env.rllib.rollout.distributions import ExactActions, pack_exact
from tprl_env.rllib.rollout.episodes import EPISODE, GROUP, RETURN, EpisodeColumns
from tprl_env.rllib.rollout.module import critic_parameters
from tprl_env.rllib.rollout.runner import TokenPruningRunner
from tprl_env.rllib.run.train import train

SMALL = load_config(
    "smoke",
    {
        "algorithm": "mapo",
        "rollout.fixed_budgets": True,
        "rollout.samples": 6,
        "rollout.draws": 4,
        "resources.num_scorers": 0,
        "seed": 7,
    },
)
STEPS = SMALL.replace(
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
        "rollout.fixed_budgets": False,
        "rules.beta": 0.5,
        "algorithm.ratio": "token",
        "rules.max_steps": 2,
        "policy.discount": 0.8,
    },
)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def values(memory: EpisodeMemory, key: tuple[int, int]) -> list[float]:
    return [each.value for each in memory.recall(key)]


def test_the_memory_keeps_the_best_of_a_key_once():
    memory = EpisodeMemory({}, size=2, limit=10)
    assert memory.add((3, 4), b"a", 0.5) and memory.add((3, 4), b"b", 0.7)
    assert not memory.add((3, 4), b"a", 0.5)  # the same masks
    assert not memory.add((3, 4), b"c", 0.5)  # not better than the worst
    assert memory.add((3, 4), b"d", 0.6)
    assert [(each.masks, each.value) for each in memory.recall((3, 4))] == [
        (b"b", 0.7),
        (b"d", 0.6),
    ]
    assert memory.recall((3, 5)) == () and len(memory) == 2


def test_the_memory_is_bounded_and_forgets_what_was_not_asked_for_longest():
    memory = EpisodeMemory({}, size=2, limit=5)
    for sample in range(3):
        for number in range(2):
            memory.add((sample, 0), bytes([number]), float(number))
            memory.recall((0, 0))
        assert len(memory) <= 5
    assert values(memory, (1, 0)) == [] and len(memory) == 4
    assert values(memory, (0, 0)) == values(memory, (2, 0)) == [1.0, 0.0]


def test_a_memory_from_before_the_scores_kind_had_its_name_is_taken_over():
    old = EpisodeMemory({"metric": "exact"}, size=3, limit=7)
    old.add((1, 0), b"a", 0.5)
    memory = EpisodeMemory({"score_kind": "exact"}, size=3, limit=7)
    memory.set_state(old.get_state())
    assert len(memory) == 1
    with pytest.raises(ValueError, match="score_kind exact, now likelihood"):
        EpisodeMemory({"score_kind": "likelihood"}, 3, 7).set_state(old.get_state())


def test_the_memory_survives_its_state_and_refuses_another_samples_state():
    memory = EpisodeMemory({"samples": "abc", "alpha": 1.0}, size=3, limit=7)
    for sample in range(4):
        for number in range(2):
            memory.add((sample, 5), bytes([sample, number] * (sample + 1)), sample + number / 4)
    memory.recall((1, 5))
    copy = EpisodeMemory({"samples": "abc", "alpha": 1.0}, size=3, limit=7)
    copy.set_state(memory.get_state())
    for key in [(sample, 5) for sample in range(4)]:
        assert copy.recall(key) == memory.recall(key)
    assert len(copy) == len(memory) == 6  # the key of the first sample had to go
    smaller = EpisodeMemory({"samples": "abc", "alpha": 1.0}, size=1, limit=2)
    smaller.set_state(memory.get_state())
    assert len(smaller) == 2 and values(smaller, (3, 5)) == [3.25]
    empty = EpisodeMemory({"samples": "abc", "alpha": 1.0}, 3, 7)
    copy.set_state(empty.get_state())
    assert len(copy) == 0 and copy.recall((3, 5)) == ()
    for other in (
        {"samples": "xyz", "alpha": 1.0},
        {"samples": "abc", "alpha": 2.0},
    ):
        with pytest.raises(ValueError, match=r"another run's samples or reward \((samples|alpha)"):
            EpisodeMemory(other, 3, 7).set_state(memory.get_state())


def test_mixture_weights_by_hand():
    # group 0 remembers masks of probability .3 and .1; group 1 nothing; group 2 hardly likely ones
    inside = (
        np.array([0, 0, 2, 2]),
        np.array([math.log(0.3), math.log(0.1), -400.0, -401.0]),
        np.array([0.9, 0.5, 0.8, 0.8]),
    )
    draws = (
        np.array([0, 0, 0, 1, 1, 1, 2, 2, 2]),
        np.array([True, False, False, False, False, False, False, False, False]),
        np.array([0.9, 0.2, 0.4, 0.1, 0.1, 0.4, 0.3, 0.0, 0.3]),
    )
    found = mixture_weights(3, inside, draws, least=0.1)
    np.testing.assert_allclose(found.memory, [0.4, 0.0, 0.1])
    near = 1 / (1 + math.exp(-1))
    np.testing.assert_allclose(found.inside, [0.3, 0.1, 0.1 * near, 0.1 * (1 - near)])
    np.testing.assert_allclose(found.outside, [0.0, 0.3, 0.3, 1 / 3, 1 / 3, 1 / 3, 0.3, 0.3, 0.3])
    baselines = [0.3 * 0.9 + 0.1 * 0.5 + 0.6 * 0.3, 0.2, 0.1 * 0.8 + 0.9 * 0.2]
    np.testing.assert_allclose(found.baseline, baselines)
    assert found.log_probability[2] == pytest.approx(-400 + math.log(1 + math.exp(-1)))
    assert found.log_probability[1] == -math.inf
    # with all draws remembered, only what is inside is compared
    alone = mixture_weights(
        1, (np.array([0, 0]), np.log([0.25, 0.25]), np.array([1.0, 0.0])),
        (np.array([0, 0]), np.array([True, True]), np.array([1.0, 0.0])), least=0.1,
    )  # fmt: skip
    np.testing.assert_allclose(alone.baseline, [0.5])
    np.testing.assert_allclose(alone.inside, [0.25, 0.25])


def masks_of(tokens: int, count: int) -> np.ndarray:
    chosen = list(combinations(range(tokens), count))
    return np.array([[i in few for i in range(tokens)] for few in chosen])


def exact(logits: torch.Tensor, rows: int, count: int) -> ExactActions:
    alive = torch.ones(rows, logits.shape[-1], dtype=torch.bool)
    counts = torch.full((rows,), count)
    return ExactActions.from_logits(pack_exact(logits.expand(rows, -1), alive, counts))


def enumerated(masks: np.ndarray, returns: np.ndarray, logits: torch.Tensor) -> EpisodeColumns:
    """One group that has drawn every mask once."""
    number, tokens = masks.shape
    obs = {
        "sample": np.full(number, 7),
        "alive": np.ones((number, tokens), bool),
        "step": np.zeros((number, 1), np.float32),
        "state": np.zeros(number, np.int64),
        "budget": np.full((number, 1), float(masks[0].sum()), np.float32),
    }
    columns = {
        Columns.OBS: obs,
        Columns.ACTIONS: masks.astype(np.int8),
        Columns.ACTION_LOGP: exact(logits, number, int(masks[0].sum()))
        .logp(torch.from_numpy(masks))
        .numpy(),
        EPISODE: np.arange(number),
        GROUP: np.zeros(number, np.int64),
        RETURN: returns.astype(np.float32),
    }
    return EpisodeColumns(columns, number)


@pytest.mark.parametrize("least", [0.0, 0.5])
def test_the_gradient_is_the_mixtures_by_enumeration(least: float):
    """A uniform policy that draws every mask once: sampled means are exact expectations.

    Below its probability w_min changes nothing and the gradient is that of the expected return;
    above, it is w times the one inside the memory plus 1 - w times the one outside.
    """
    masks = masks_of(6, 3)
    returns = np.random.default_rng(0).random(20)
    logits = torch.zeros(6)
    memory = EpisodeMemory({}, size=4, limit=100)
    remembered = np.argsort(returns)[-3:]
    for row in remembered:
        memory.add((7, 3), np.packbits(masks[row]).tobytes(), float(returns[row]))

    def judge(obs: dict, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert obs["alive"].all() and (obs["state"] == 0).all() and (obs["budget"] == 3).all()
        distribution = exact(logits, len(actions), 3)
        return distribution.inputs, distribution.logp(actions)

    [store], report = mix([enumerated(masks, returns, logits)], memory, judge, least, False)
    assert report.rejected == pytest.approx(0.15) and report.groups == 1.0
    assert report.weight == pytest.approx(max(0.15, least))
    assert report.log_probability == pytest.approx(math.log(0.15))
    assert len(store) == 20 and len(memory) == 4  # the fourth place was taken by a new one
    columns = store.columns
    variable = logits.clone().requires_grad_()
    batch = {
        name: torch.from_numpy(columns[name])
        for name in (Columns.ACTIONS, Columns.ACTION_LOGP, Postprocessing.ADVANTAGES, ROW_WEIGHT)
    }
    assert float(batch[ROW_WEIGHT].mean()) == pytest.approx(1.0)
    settings = MapoSettings(per_token=False, logit_l2=0.0)
    mapo_loss(batch, exact(variable, 20, 3), settings, 0.0).total.backward()

    direct = logits.clone().requires_grad_()
    log_p = torch.stack([direct[torch.from_numpy(row)].sum() for row in masks]).log_softmax(0)
    inside = torch.zeros(20, dtype=torch.bool)
    inside[remembered.tolist()] = True
    weight = max(0.15, least)
    share = torch.where(inside, weight / 3, (1 - weight) / 17)
    gains = torch.from_numpy(returns) - (share * torch.from_numpy(returns)).sum()
    (-(share * gains * log_p).sum()).backward()
    torch.testing.assert_close(variable.grad, direct.grad, atol=1e-6, rtol=0)
    if least <= 0.15:  # unclipped: any baseline, none at all, gives the same
        plain = logits.clone().requires_grad_()
        log_p = torch.stack([plain[torch.from_numpy(row)].sum() for row in masks]).log_softmax(0)
        (-(log_p.exp() * torch.from_numpy(returns)).sum()).backward()
        torch.testing.assert_close(variable.grad, plain.grad.float(), atol=1e-6, rtol=0)


def test_a_memory_no_better_than_new_draws_does_not_pull():
    masks = masks_of(6, 3)
    memory = EpisodeMemory({}, size=4, limit=100)
    memory.add((7, 3), np.packbits(masks[0]).tobytes(), 0.5)
    judge = lambda obs, actions: (None, torch.full((len(actions),), math.log(1 / 20)))  # noqa: E731
    store = enumerated(masks, np.full(20, 0.5), torch.zeros(6))
    [mixed], _ = mix([store], memory, judge, 0.9, False)
    assert np.abs(mixed.columns[Postprocessing.ADVANTAGES]).max() < 1e-7
    assert len(memory) == 1  # equal returns: nothing was better than its group


def test_the_loss_needs_weights():
    with pytest.raises(ValueError, match="mapo_loss needs row_weight"):
        mapo_loss({}, exact(torch.zeros(4), 1, 2), MapoSettings(), 0.0)


def runner_of(config) -> TokenPruningRunner:
    return TokenPruningRunner(config=algorithm_config(config), worker_index=0, num_workers=0)


@pytest.mark.parametrize("config", [SMALL, STEPS, COINS], ids=["one-step", "exact", "bernoulli"])
def test_remembered_episodes_come_back_as_the_rows_they_were(config):
    runner, memory = runner_of(config), new_memory(config)
    stores = runner.sample()
    first, report = mix(stores, memory, runner.module.judge, 0.1, False)
    assert report.groups == 0.0 and report.weight is None and report.rejected == 0.0
    assert report.remembered >= len(memory) > 0  # a better one may have taken a place
    drawn = stores[0].columns
    # without a memory it is the policy gradient with the group's mean as baseline
    number = config.rollout.samples * config.rollout.draws
    returns = drawn[RETURN][:number].reshape(-1, config.rollout.draws)
    gains = returns - returns.mean(1, keepdims=True)
    steps = len(drawn[EPISODE]) // number
    np.testing.assert_allclose(
        first[0].columns[Postprocessing.ADVANTAGES], np.tile(gains.reshape(-1), steps), atol=1e-6
    )
    np.testing.assert_allclose(first[0].columns[ROW_WEIGHT], 1.0, rtol=1e-6)

    again, report = mix(stores, memory, runner.module.judge, 0.1, False)
    assert report.groups >= 0.5 and report.rejected > 0
    rows = again[0].columns
    kept = round((1 - report.rejected) * number) * steps
    for name in (Columns.ACTION_LOGP, Columns.ACTIONS, ROW_WEIGHT):
        assert len(rows[name]) == len(again[0])
    inside = slice(kept, None)

    def described(columns: dict, rows: slice) -> dict[bytes, np.ndarray]:
        """What a row shows and does -> how likely that was."""
        obs = columns[Columns.OBS]
        parts = [obs["sample"], obs["step"][:, 0], *np.packbits(obs["alive"], 1).T]
        parts += list(np.packbits(columns[Columns.ACTIONS].astype(bool) & obs["alive"], 1).T)
        parts += [obs["budget"][:, 0]] if "budget" in obs else []
        table = np.stack(parts, 1).astype(np.float32)[rows]
        return {
            row.tobytes(): logp
            for row, logp in zip(table, columns[Columns.ACTION_LOGP][rows], strict=True)
        }

    before, remembered = described(drawn, slice(None)), described(rows, inside)
    assert remembered.keys() <= before.keys() and len(remembered) >= len(memory)
    assert not remembered.keys() & described(rows, slice(0, kept)).keys() or steps > 1
    for row, logp in remembered.items():
        assert logp == pytest.approx(before[row], abs=1e-4)
    assert (Columns.ACTION_DIST_INPUTS in rows) == (config.algorithm.ratio == "token")


def test_a_sample_keeps_its_budget_and_budgets_differ():
    found: dict[int, set[float]] = {}
    for index in (0, 1):
        runner = TokenPruningRunner(
            config=algorithm_config(SMALL.replace(**{"rollout.samples": 32})),
            worker_index=index,
            num_workers=0,
        )
        for _ in range(3):
            [store] = runner.sample()
            obs = store.columns[Columns.OBS]
            for sample, budget in zip(obs["sample"], obs["budget"][:, 0], strict=True):
                found.setdefault(int(sample), set()).add(float(budget))
    assert all(len(budgets) == 1 for budgets in found.values())
    assert {budget for budgets in found.values() for budget in budgets} == {2.0, 3.0, 4.0, 5.0, 6.0}


def test_the_memory_is_in_the_checkpoint_and_the_critic_is_not_trained(tmp_path: Path):
    algorithm = algorithm_config(SMALL).build_algo()
    restored = None
    try:
        module = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID]
        start = {k: v.clone() for k, v in critic_parameters(module.pruning_policy).items()}
        for _ in range(3):
            result = algorithm.train()
        assert result["memory"]["episodes"] == len(algorithm.memory) > 6
        for name, part in critic_parameters(module.pruning_policy).items():
            assert torch.equal(part, start[name]) and part.grad is None
        algorithm.save_to_path(str(tmp_path / "saved"))
        restored = algorithm_config(SMALL).build_algo()
        assert len(restored.memory) == 0
        restored.restore_from_path(str(tmp_path / "saved"))
        ours, theirs = algorithm.memory.get_state(), restored.memory.get_state()
        for name in ("keys", "values", "lengths", "masks"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        other = algorithm_config(SMALL.replace(source="toy:samples=64,tokens=16,width=8,seed=1"))
        foreign = other.build_algo()
        try:
            with pytest.raises(ValueError, match="belongs to another run's samples"):
                foreign.restore_from_path(str(tmp_path / "saved"))
        finally:
            foreign.stop()
    finally:
        algorithm.stop()
        if restored is not None:
            restored.stop()


def test_a_resumed_run_remembers(tmp_path: Path):
    config = SMALL.replace(**{"limits.iterations": 4})
    train(config, tmp_path, progress=False)
    train(config, tmp_path, iterations=6, resume=True, progress=False)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    remembered = [row["memory_episodes"] for row in rows]
    assert remembered == sorted(remembered) and remembered[4] >= remembered[3] > remembered[0]
    assert rows[0]["memory_weight"] is None and rows[0]["memory_groups"] == 0
    assert rows[5]["memory_weight"] >= 0.1


def test_the_driver_judges_with_the_weights_that_remote_runners_draw_with():
    algorithm = algorithm_config(SMALL.replace(**{"resources.num_env_runners": 2})).build_algo()
    try:
        for _ in range(2):
            algorithm.train()
        learner = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID].pruning_policy
        remote = algorithm.env_runner_group.foreach_env_runner(
            lambda runner: runner.module.pruning_policy.state_dict(), local_env_runner=False
        )
        local = algorithm.env_runner.module.pruning_policy.state_dict()
        assert len(remote) == 2
        for name, part in learner.state_dict().items():
            assert all(torch.equal(part, each[name]) for each in (local, *remote)), name
    finally:
        algorithm.stop()
