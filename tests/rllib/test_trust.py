"""Reference points: PPO beside a hand-written PPO and RLlib's own; every algorithm learns.

The hand-written PPO below uses torch alone: the policy's forward pass on plain observations,
`torch.distributions`, loops over episodes. None of our distributions, estimates or losses.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("ray")

import ray
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.training_data import TrainingData
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.postprocessing.value_predictions import compute_value_targets

from tprl_env.data.features.toy import ToyScorer
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.config import TrainConfig, load_config
from tprl_env.rllib.rollout.connector import ColumnsToBatch
from tprl_env.rllib.rollout.episodes import EpisodeColumns
from tprl_env.rllib.rollout.runner import TokenPruningRunner

PLAIN = {
    "rollout.samples": 8,
    "rollout.draws": 2,
    "seed": 5,
    "resources.num_scorers": 0,
    "rules.max_steps": 3,
    "rules.score_steps": "all",
    "algorithm.gamma": 0.9,
    "algorithm.gae_lambda": 0.8,
    "rules.beta": 0.2,
    "algorithm.per_token": False,
    "algorithm.logit_l2": 0.0,
    "algorithm.ratio": "joint",
    "algorithm.entropy": 0.01,
    "policy.step_input": True,
    "algorithm.lr": 1e-3,
    "algorithm.value_coefficient": 0.5,
}
EXACT = load_config("smoke", PLAIN)
COINS = load_config(
    "smoke",
    PLAIN
    | {
        "policy.distribution": "bernoulli",
        "policy.discount": 0.9,
        "policy.initial_keep": 0.95,
        "rules.budget": None,
        "policy.budget_input": False,
    },
)
BOTH = pytest.mark.parametrize("config", [EXACT, COINS], ids=["exact", "bernoulli"])


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def rolled_out(config: TrainConfig) -> tuple[TokenPruningRunner, EpisodeColumns]:
    """A runner and its only rollout; all episodes take all steps."""
    runner = TokenPruningRunner(config=algorithm_config(config), worker_index=0, num_workers=0)
    [store] = runner.sample()
    assert len(store) == config.rollout.samples * config.rollout.draws * config.rules.max_steps
    return runner, store


def plain_observation(runner: TokenPruningRunner, store: EpisodeColumns) -> dict[str, Tensor]:
    """What the environment would show: codes and question instead of a sample number."""
    obs, source = store.columns[Columns.OBS], runner.source
    query, mask = source.query_tokens(obs["sample"])
    table = {
        "tokens": source.codes(obs["sample"]), "query": query, "query_mask": mask,
        "alive": obs["alive"], "step": obs["step"],
    } | ({"budget": obs["budget"]} if "budget" in obs else {})  # fmt: skip
    return {name: torch.from_numpy(np.array(part)) for name, part in table.items()}


def log_prob_and_entropy(
    config: TrainConfig, logits: Tensor, obs: dict[str, Tensor], masks: Tensor
) -> tuple[Tensor, Tensor]:
    """Of whole masks; exact counts by a recursion over tokens in plain probabilities."""
    alive, keep = obs["alive"], masks.bool() & obs["alive"]
    if config.policy.distribution == "bernoulli":
        discount = config.policy.discount ** obs["step"]
        coins = torch.distributions.Bernoulli(discount * torch.sigmoid(logits))
        logp = torch.where(alive, coins.log_prob(keep.float()), 0.0).sum(1)
        return logp, torch.where(alive, coins.entropy(), 0.0).sum(1)
    logits = torch.where(alive, logits, 0.0)
    results = []
    for row in range(len(logits)):
        values = logits[row][alive[row]].double()
        log_e = log_polynomial(values, int(keep[row].sum()))
        [inclusion] = torch.autograd.grad(log_e, values, create_graph=True)
        logp = values[keep[row][alive[row]]].sum() - log_e
        results.append((logp, log_e - (inclusion * values).sum()))
    logp, entropy = (torch.stack(part).float() for part in zip(*results, strict=True))
    return logp, entropy


def log_polynomial(values: Tensor, count: int) -> Tensor:
    """log of the sum over subsets of that size of the product of exp(values)."""
    sums = [torch.zeros((), dtype=values.dtype) if k == 0 else None for k in range(count + 1)]
    for value in values:
        for k in range(count, 0, -1):
            if sums[k - 1] is not None:
                more = sums[k - 1] + value
                sums[k] = more if sums[k] is None else torch.logaddexp(sums[k], more)
    return sums[count]


def hand_written_targets(
    config: TrainConfig, runner: TokenPruningRunner, store: EpisodeColumns, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and value targets of the rows, episode by episode (TPRL eq. 4, 19, 20)."""
    obs, episodes = store.columns[Columns.OBS], config.rollout.samples * config.rollout.draws
    score = ToyScorer(runner.source)
    advantages, targets = np.zeros(len(store)), np.zeros(len(store))
    for episode in range(episodes):
        rows = [step * episodes + episode for step in range(config.rules.max_steps)]
        rewards, before = [], 1.0
        for row in rows:
            alive = obs["alive"][row]
            keep = alive & store.columns[Columns.ACTIONS][row].astype(bool)
            after = float(score(obs["sample"][row : row + 1], keep[None])[0])
            rewards.append(after - before + config.rules.beta * (1 - keep.sum() / alive.sum()))
            before = after
        for step, row in enumerate(rows):
            advantage, factor = 0.0, 1.0
            for later in range(step, len(rows)):
                following = values[rows[later + 1]] if later + 1 < len(rows) else 0.0
                delta = rewards[later] + config.algorithm.gamma * following - values[rows[later]]
                advantage += factor * delta
                factor *= config.algorithm.gamma * config.algorithm.gae_lambda
            advantages[row], targets[row] = advantage, advantage + values[row]
    return advantages, targets


@BOTH
def test_advantages_equal_a_hand_written_ppos_and_rllibs(config: TrainConfig):
    runner, store = rolled_out(config)
    with torch.no_grad():
        values = runner.module.pruning_policy(plain_observation(runner, store)).value.numpy()
    advantages, targets = hand_written_targets(config, runner, store, values)
    ours = store.columns
    np.testing.assert_allclose(ours[Postprocessing.ADVANTAGES], advantages, atol=1e-5)
    np.testing.assert_allclose(ours[Postprocessing.VALUE_TARGETS], targets, atol=1e-5)
    # RLlib's GAE takes episode after episode, each ended by a terminal step
    steps, episodes = config.rules.max_steps, config.rollout.samples * config.rollout.draws
    rewards = np.zeros((episodes, steps), np.float32)
    deltas = ours[Postprocessing.ADVANTAGES].reshape(steps, episodes).T
    table = values.reshape(steps, episodes).T
    for step in reversed(range(steps)):  # undo GAE to get the rewards
        last = step == steps - 1
        following = 0.0 if last else config.algorithm.gamma * table[:, step + 1]
        carried = (
            0.0
            if last
            else config.algorithm.gamma * config.algorithm.gae_lambda * deltas[:, step + 1]
        )
        rewards[:, step] = deltas[:, step] - carried - following + table[:, step]
    ends = np.tile([False] * (steps - 1) + [True], episodes)
    theirs = compute_value_targets(
        values=table.reshape(-1),
        rewards=rewards.reshape(-1),
        terminateds=ends.astype(np.float32),
        truncateds=np.zeros_like(ends, np.float32),
        gamma=config.algorithm.gamma,
        lambda_=config.algorithm.gae_lambda,
    )
    mine = ours[Postprocessing.VALUE_TARGETS].reshape(steps, episodes).T.reshape(-1)
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def hand_written_loss(
    config: TrainConfig, policy: PruningPolicy, obs: dict[str, Tensor], batch: dict[str, Tensor]
) -> Tensor:
    """TPRL eq. 21-24 on all rows."""
    out = policy(obs)
    logp, entropy = log_prob_and_entropy(config, out.logits, obs, batch[Columns.ACTIONS])
    ratio = (logp - batch[Columns.ACTION_LOGP]).exp()
    gain = batch[Postprocessing.ADVANTAGES]
    clipped = ratio.clamp(1 - config.algorithm.clip, 1 + config.algorithm.clip)
    surrogate = torch.minimum(ratio * gain, clipped * gain)
    error = (out.value - batch[Postprocessing.VALUE_TARGETS]) ** 2
    return (
        -surrogate + config.algorithm.value_coefficient * error - config.algorithm.entropy * entropy
    ).mean()


@BOTH
def test_the_loss_equals_a_hand_written_ppos_and_rllibs(config: TrainConfig):
    runner, store = rolled_out(config)
    settings = algorithm_config(config)
    losses = {}
    for name, kind in (("ours", None), ("theirs", PPOTorchLearner)):
        chosen = settings.copy(copy_frozen=False)
        if kind is not None:
            chosen.learners(learner_class=kind)
        learner = chosen.build_learner(env=None, spaces=runner.get_spaces())
        connector = ColumnsToBatch(normalize=True)
        batch = connector(rl_module=learner.module, batch={}, episodes=[store])[DEFAULT_MODULE_ID]
        noise = torch.randn(len(store), generator=torch.Generator().manual_seed(1))
        batch[Columns.ACTION_LOGP] = (
            batch[Columns.ACTION_LOGP] + 0.3 * noise
        )  # ratios of both kinds
        module = learner.module[DEFAULT_MODULE_ID]
        out = module.forward_train(batch)
        batch[Columns.ACTION_DIST_INPUTS] = out[Columns.ACTION_DIST_INPUTS].detach()
        losses[name] = learner.compute_loss_for_module(
            module_id=DEFAULT_MODULE_ID,
            config=learner.config.get_config_for_module(DEFAULT_MODULE_ID),
            batch=batch,
            fwd_out=out,
        )
        losses[name].backward()
        losses[name + " gradient"] = module.pruning_policy.query_in.weight.grad
    policy = runner.module.pruning_policy.requires_grad_()
    by_hand = hand_written_loss(config, policy, plain_observation(runner, store), batch)
    by_hand.backward()
    shown = (-noise * 0.3).exp()
    outside = ((shown < 0.8) | (shown > 1.2)).float().mean()
    assert 0.2 < float(outside) < 0.8  # both sides of the clip range are reached
    assert losses["ours"].item() == pytest.approx(losses["theirs"].item(), abs=1e-5)
    assert losses["ours"].item() == pytest.approx(by_hand.item(), abs=1e-5)
    for name in ("ours gradient", "theirs gradient"):
        torch.testing.assert_close(losses[name], policy.query_in.weight.grad, atol=1e-5, rtol=0)


@BOTH
def test_an_iteration_of_updates_equals_a_hand_written_loop(config: TrainConfig):
    runner, store = rolled_out(config)
    settings = algorithm_config(config)
    learner = settings.build_learner(env=None, spaces=runner.get_spaces())
    obs = plain_observation(runner, store)
    policy = runner.module.pruning_policy.requires_grad_()
    before = policy(obs).logits
    with torch.no_grad():
        values = policy(obs).value.numpy()
    advantages, targets = hand_written_targets(config, runner, store, values)
    gains = (advantages - advantages.mean()) / advantages.std()
    batch = {
        Columns.ACTIONS: torch.from_numpy(store.columns[Columns.ACTIONS]),
        Columns.ACTION_LOGP: torch.from_numpy(store.columns[Columns.ACTION_LOGP]),
        Postprocessing.ADVANTAGES: torch.from_numpy(gains).float(),
        Postprocessing.VALUE_TARGETS: torch.from_numpy(targets).float(),
    }
    learner.update(training_data=TrainingData(episodes=[store]), num_epochs=config.algorithm.epochs)
    adam = torch.optim.Adam(policy.parameters(), lr=config.algorithm.lr)
    for _ in range(config.algorithm.epochs):
        adam.zero_grad()
        hand_written_loss(config, policy, obs, batch).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), config.algorithm.grad_clip)
        adam.step()
    theirs = learner.module[DEFAULT_MODULE_ID].pruning_policy
    first, second = theirs(obs), policy(obs)
    torch.testing.assert_close(first.value, second.value, atol=1e-4, rtol=0)
    # of whole masks: exact budgets do not care about a shift of all logits, Adam drifts along it
    mine, hand, start = (
        log_prob_and_entropy(config, logits, obs, batch[Columns.ACTIONS])[0].detach()
        for logits in (first.logits, second.logits, before)
    )
    torch.testing.assert_close(mine, hand, atol=1e-4, rtol=0)
    assert (hand - start).abs().max() > 1e-2


LEARNS = {
    "exact": ({"rollout.fixed_budgets": True}, "score", 0.4, 0.6),
    "bernoulli": (
        {
            "policy.distribution": "bernoulli",
            "rules.budget": None,
            "policy.budget_input": False,
            "rules.beta": 1.0,
        },
        "episode_return_mean",
        0.1,
        0.3,
    ),
}


@pytest.mark.parametrize("distribution", LEARNS)
@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "mapo"])
def test_it_learns(algorithm: str, distribution: str):
    """From random masks to most of what can be had, in as many iterations.

    Exact: a random mask scores .24, the best 1. Coins at one reward per token saved: random masks
    return 0, the best .88.
    """
    changes, name, at_most, at_least = LEARNS[distribution]
    config = load_config("smoke", {"algorithm": algorithm, "resources.num_scorers": 0, **changes})
    built = algorithm_config(config).build_algo()
    try:
        history = [built.train()["env_runners"][name] for _ in range(28)]
    finally:
        built.stop()
    assert np.mean(history[:2]) < at_most, history
    assert np.mean(history[-3:]) > at_least and math.isfinite(history[-1]), history
