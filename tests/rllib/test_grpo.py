"""GRPO: advantages by hand, the loss by enumeration, no critic, a start policy that stays."""

from __future__ import annotations

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

from tprl_env.data.features.store import open_source
from tprl_env.env.rules import EpisodeRules
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.algorithms import ALGORITHMS, algorithm_config
from tprl_env.rllib.algorithms.grpo import GRPO, grpo_loss
from tprl_env.rllib.config import GrpoSettings, load_config, policy_config
from tprl_env.rllib.config.algorithm import SETTINGS
from tprl_env.rllib.rollout.advantages import group_advantages
from tprl_env.rllib.rollout.connector import REFERENCE_LOGP, ColumnsToBatch
from tprl_env.rllib.rollout.distributions import (
    BernoulliActions,
    ExactActions,
    pack_bernoulli,
    pack_exact,
)
from tprl_env.rllib.rollout.episodes import Rollout, learner_columns
from tprl_env.rllib.rollout.module import critic_parameters
from tprl_env.rllib.rollout.runner import TokenPruningRunner
from tprl_env.rllib.run.train import train

SMALL = load_config(
    "smoke",
    {
        "algorithm": "grpo",
        "rollout.samples": 6,
        "rollout.draws": 4,
        "resources.num_scorers": 0,
        "seed": 7,
    },
)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def two_steps() -> Rollout:
    """Two groups of three episodes; the second episode ends after its first step."""
    rollout = Rollout(
        np.array([4, 4, 4, 9, 9, 9]), np.arange(6) // 3, np.zeros(6, int), np.ones(6, np.float32)
    )
    live = np.ones((2, 6), bool)
    live[1, 1] = False
    rollout.live = list(live)
    rollout.counts = [np.full(6, 8), np.array([4, 0, 4, 4, 4, 4]), np.array([2, 0, 4, 2, 2, 2])]
    rollout.values = [np.full(6, 5.0, np.float32)] * 2  # nobody may look at them
    rollout.masks = [np.zeros((6, 8), bool)] * 2
    rollout.steps = [
        {
            Columns.ACTION_LOGP: np.arange(6.0)[taken],
            Columns.OBS: {"sample": rollout.samples[taken]},
        }
        for taken in live
    ]
    return rollout


def test_advantages_by_hand():
    scores = np.array([[0.5, 0.0, 1.0, 0.5, 0.5, 0.5], [0.25, np.nan, 1.0, 1.0, 1.0, 1.0]])
    rules = EpisodeRules(max_steps=2, beta=0.0, min_tokens=0, score_steps="all")
    result = group_advantages(two_steps(), scores.astype(np.float32), rules, gamma=0.5)
    # rewards are differences of scores, the score with all tokens is 1
    returns = np.array([-0.5 + 0.5 * -0.25, -1.0, 0.0 + 0.5 * 0.0])
    gains = (returns - returns.mean()) / (returns.std() + 1e-6)
    np.testing.assert_allclose(result.advantages[0, :3], gains, rtol=1e-5)
    np.testing.assert_allclose(result.advantages[1, :3], [gains[0], 0.0, gains[2]], rtol=1e-5)
    assert (result.advantages[:, 3:] == 0).all()  # equal returns teach nothing
    assert set(result.columns) == {Postprocessing.ADVANTAGES}


def test_a_group_that_is_not_whole_is_refused():
    rollout = two_steps()
    rollout.group = np.array([0, 0, 0, 1, 1, 2])
    with pytest.raises(RuntimeError, match=r"whole groups, got groups of \[3, 2, 1\]"):
        learner_columns(rollout, {})


def test_a_runner_returns_whole_groups_with_their_advantages():
    config = SMALL.replace(**{"rollout.rounds": 3})
    runner = TokenPruningRunner(config=algorithm_config(config), worker_index=0, num_workers=0)
    asked = []
    submit = runner.scorer.submit
    runner.scorer.submit = lambda *rows: asked.append(rows) or submit(*rows)
    stores = runner.sample()
    assert [len(store) for store in stores] == [8, 8, 8]
    for store, (samples, keep) in zip(stores, asked, strict=True):
        values = runner.scorer(samples, keep).reshape(2, 4)
        gains = (values - values.mean(1, keepdims=True)) / (values.std(1, keepdims=True) + 1e-6)
        found = store.columns[Postprocessing.ADVANTAGES].reshape(2, 4)
        np.testing.assert_allclose(found, gains, atol=1e-4)
        assert Postprocessing.VALUE_TARGETS not in store.columns
        for name in ("sample", "budget", "state"):
            column = store.columns[Columns.OBS][name].reshape(2, 4)
            assert (column == column[:, :1]).all()
    assert len({int(s) for store in stores for s in store.columns[Columns.OBS]["sample"]}) > 2


def all_masks(tokens: int, count: int) -> torch.Tensor:
    rows = [[i in chosen for i in range(tokens)] for chosen in combinations(range(tokens), count)]
    return torch.tensor(rows, dtype=torch.int8)


def exact(logits: torch.Tensor, rows: int, count: int) -> ExactActions:
    alive = torch.ones(rows, logits.shape[-1], dtype=torch.bool)
    counts = torch.full((rows,), count)
    return ExactActions.from_logits(pack_exact(logits.expand(rows, -1), alive, counts))


def test_the_joint_loss_is_what_a_hand_writes():
    generator = torch.Generator().manual_seed(0)
    logits, start = (torch.randn(5, generator=generator) for _ in range(2))
    masks = all_masks(5, 2)
    gains = torch.randn(10, generator=generator)
    old = exact(logits, 10, 2).logp(masks) + 0.3 * torch.randn(10, generator=generator)
    batch = {
        Columns.ACTIONS: masks,
        Columns.ACTION_LOGP: old,
        Postprocessing.ADVANTAGES: gains,
        REFERENCE_LOGP: exact(start, 10, 2).logp(masks),
    }
    settings = GrpoSettings(clip=0.2, per_token=True, logit_l2=0.0, kl_coefficient=0.7)
    parts = grpo_loss(batch, exact(logits, 10, 2), settings, 0.0)

    def probabilities(values: torch.Tensor) -> list[float]:
        weights = [math.exp(sum(float(values[i]) for i in range(5) if row[i])) for row in masks]
        return [weight / sum(weights) for weight in weights]

    total = kl = 0.0
    for p, q, before, gain in zip(
        probabilities(logits), probabilities(start), old.tolist(), gains.tolist(), strict=True
    ):
        ratio = p / math.exp(before)
        surrogate = min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain)
        penalty = q / p - math.log(q / p) - 1
        total += (-surrogate + 0.7 * penalty) / 2 / 10  # two kept tokens, ten rows
        kl += penalty / 10
    assert float(parts.total) == pytest.approx(total, abs=1e-5)
    assert float(parts.reference_kl) == pytest.approx(kl, abs=1e-5)


def test_the_token_loss_is_what_a_hand_writes():
    generator = torch.Generator().manual_seed(1)
    logits, before, start = (torch.randn(4, 6, generator=generator) for _ in range(3))
    alive = torch.rand(4, 6, generator=generator) < 0.7
    alive[:, 0] = True
    step, gains = torch.zeros(4), torch.randn(4, generator=generator)
    now, old, reference = (
        BernoulliActions.from_logits(pack_bernoulli(part, alive, step, 1.0))
        for part in (logits, before, start)
    )
    masks = old.sample(generator=generator)
    batch = {
        Columns.ACTIONS: masks,
        Columns.ACTION_LOGP: old.logp(masks),
        Columns.ACTION_DIST_INPUTS: old.inputs,
        Postprocessing.ADVANTAGES: gains,
        REFERENCE_LOGP: reference.token_logp(masks),
    }
    settings = GrpoSettings(ratio="token", per_token=True, logit_l2=0.0, kl_coefficient=0.3)
    parts = grpo_loss(batch, now, settings, 0.0)
    total = 0.0
    for row in range(4):
        living = [i for i in range(6) if alive[row, i]]
        for i in living:
            p, o, q = (
                float(torch.sigmoid(part[row, i] if masks[row, i] else -part[row, i]))
                for part in (logits, before, start)
            )
            gain = float(gains[row])
            surrogate = min(p / o * gain, min(max(p / o, 0.8), 1.2) * gain)
            penalty = q / p - math.log(q / p) - 1
            total += (-surrogate + 0.3 * penalty) / len(living) / 4
    assert float(parts.total) == pytest.approx(total, abs=1e-5)


def test_the_expected_gradient_is_that_of_reward_and_of_kl_to_the_start():
    """Over all masks, weighted by their probability: no estimate is left, only the formula."""
    generator = torch.Generator().manual_seed(2)
    masks = all_masks(6, 3)
    logits, start = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    rewards = torch.rand(20, generator=generator, dtype=torch.float64)
    gains = rewards - rewards.mean()
    first = logits.clone().requires_grad_()
    now, reference = exact(first, 20, 3), exact(start, 20, 3)
    weight = now.logp(masks).detach().exp()
    batch = {
        Columns.ACTIONS: masks,
        Columns.ACTION_LOGP: now.logp(masks).detach(),
        Postprocessing.ADVANTAGES: gains,
        REFERENCE_LOGP: reference.logp(masks),
        "row_weight": 20 * weight,  # a mean over rows becomes an expectation
    }
    settings = GrpoSettings(per_token=False, logit_l2=0.0, kl_coefficient=0.5)
    grpo_loss(batch, now, settings, 0.0).total.backward()
    second = logits.clone().requires_grad_()
    log_p = torch.stack([second[row.bool()].sum() for row in masks]).log_softmax(0)
    log_q = torch.stack([start[row.bool()].sum() for row in masks]).log_softmax(0)
    kl = (log_q.exp() * (log_q - log_p)).sum()
    (-(log_p.exp() * rewards).sum() + 0.5 * kl).backward()
    torch.testing.assert_close(first.grad, second.grad, atol=1e-6, rtol=0)


def test_the_connector_adds_the_start_policys_probabilities_in_the_rows_order():
    settings = algorithm_config(SMALL)
    runner = TokenPruningRunner(config=settings, worker_index=0, num_workers=0)
    learner = settings.build_learner(env=None, spaces=runner.get_spaces())
    stores = runner.sample()
    connector = ColumnsToBatch(normalize=False, reference=True, shuffle=True, seed=3)
    rows = connector(rl_module=learner.module, batch={}, episodes=stores)[DEFAULT_MODULE_ID]
    # before the first update the start policy is the policy
    torch.testing.assert_close(rows[REFERENCE_LOGP], rows[Columns.ACTION_LOGP])
    assert not torch.equal(
        rows[Columns.ACTION_LOGP], torch.from_numpy(stores[0].columns[Columns.ACTION_LOGP])
    )
    assert not any("reference" in name for name in runner.module.state_dict())


def test_neither_critic_nor_start_policy_are_trained_or_computed(tmp_path: Path):
    policy = PruningPolicy(policy_config(SMALL, open_source(SMALL.source)))
    policy.save_pretrained(tmp_path)
    start = {name: part.clone() for name, part in policy.state_dict().items()}
    algorithm = algorithm_config(SMALL, init_policy=str(tmp_path)).build_algo()
    try:
        assert isinstance(algorithm, GRPO)
        learner = algorithm.learner_group._learner
        module = learner.module[DEFAULT_MODULE_ID]
        calls = []
        for each in (module, algorithm.env_runner.module):
            each.pruning_policy.critic.register_forward_hook(lambda *a: calls.append("critic"))
            each.pruning_policy.value_query.register_forward_hook(lambda *a: calls.append("query"))
        for _ in range(3):
            algorithm.train()
        critic = critic_parameters(module.pruning_policy)
        assert len(critic) > 4 and not calls
        assert all(part.grad is None and not part.requires_grad for part in critic.values())
        trained = {id(part) for part in learner.get_parameters(module)}
        assert not trained & {id(part) for part in critic.values()}
        for name, part in module.pruning_policy.state_dict().items():
            assert torch.equal(part, start[name]) == (name in critic), name
        for name, part in module.reference.state_dict().items():
            assert torch.equal(part, start[name]), name
        with pytest.raises(ValueError, match="without a critic"):
            module.compute_values({Columns.OBS: {}})
    finally:
        algorithm.stop()


def test_a_resumed_run_keeps_the_start_policy_of_its_first_start(tmp_path: Path):
    config = SMALL.replace(**{"limits.iterations": 2})
    policy = PruningPolicy(policy_config(config, open_source(config.source)))
    policy.save_pretrained(tmp_path / "start")
    train(config, tmp_path / "run", init_policy=tmp_path / "start", progress=False)
    row = train(config, tmp_path / "run", iterations=4, resume=True, progress=False).metrics
    assert row["iteration"] == 4 and row["reference_kl"] > 0 and row["value_loss"] is None
    algorithm = algorithm_config(config).build_algo()
    try:
        newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
        algorithm.restore_from_path(str(newest / "rllib"))
        module = algorithm.learner_group._learner.module[DEFAULT_MODULE_ID]
        for name, part in module.reference.state_dict().items():
            assert torch.equal(part, policy.state_dict()[name]), name
    finally:
        algorithm.stop()
    with pytest.raises(ValueError, match="algorithm 'grpo', now 'ppo'"):
        train(config.replace(algorithm="ppo"), tmp_path / "run", resume=True, progress=False)


def test_the_table_and_the_configs_choices_agree():
    assert {name: entry.settings for name, entry in ALGORITHMS.items()} == SETTINGS
    assert [name for name, entry in ALGORITHMS.items() if entry.critic] == ["ppo"]
    assert [name for name, entry in ALGORITHMS.items() if entry.reference] == ["grpo"]


@pytest.mark.slow
def test_two_learners_share_the_rows_of_whole_groups(tmp_path: Path):
    config = load_config(
        "smoke",
        {
            "algorithm": "grpo",
            "resources.num_scorers": 0,
            "resources.num_learners": 2,
            "limits.iterations": 12,
        },
    )
    result = train(config, tmp_path, progress=False)
    assert result.progress.scores == 12 * 256 and result.metrics["score"] > 0.5
