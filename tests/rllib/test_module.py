"""Distributions, module and loss: literal computations on small batches."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

pytest.importorskip("ray")

from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env.data.features.store import open_source
from tprl_env.env.rewards import step_budgets
from tprl_env.policy.distributions import ConditionalBernoulli, MaskedBernoulli
from tprl_env.policy.network import PolicyConfig
from tprl_env.rllib.algorithms.ppo import ppo_loss
from tprl_env.rllib.config import PpoSettings
from tprl_env.rllib.rollout.distributions import (
    BernoulliActions,
    ExactActions,
    pack_bernoulli,
    pack_exact,
)
from tprl_env.rllib.rollout.module import TokenPruningModule

SOURCE = "toy:samples=12,tokens=14,seed=1,vary=1"


def make_module(**changes: object) -> TokenPruningModule:
    policy = asdict(PolicyConfig.question_aware(8, 8, width=16, max_steps=3))
    options = {
        "policy": policy,
        "distribution": "exact",
        "discount": 1.0,
        "max_steps": 1,
        "source": SOURCE,
        "seed": 0,
        "load": None,
    }
    from gymnasium.spaces import MultiBinary

    spec = RLModuleSpec(
        module_class=TokenPruningModule,
        observation_space=MultiBinary(14),
        action_space=MultiBinary(14),
        model_config={**options, **changes},
    )
    return spec.build()


def ids(samples: list[int], budget: int = 4, state: list[int] | None = None) -> dict:
    numbers = torch.tensor(samples)
    return {
        "sample": numbers,
        "alive": torch.from_numpy(open_source(SOURCE).exists(numbers.numpy())),
        "step": torch.zeros(len(samples), 1),
        "budget": torch.full((len(samples), 1), float(budget)),
        "state": torch.arange(len(samples)) if state is None else torch.tensor(state),
    }


def rows(generator: torch.Generator, number: int = 5, tokens: int = 7):
    logits = torch.randn(number, tokens, generator=generator)
    alive = torch.rand(number, tokens, generator=generator) < 0.8
    alive[:, :3] = True
    return logits, alive


def test_packed_distributions_agree_with_the_distributions():
    generator = torch.Generator().manual_seed(0)
    logits, alive = rows(generator)
    count = torch.tensor([1, 2, 3, 2, 0])
    exact = ExactActions.from_logits(pack_exact(logits, alive, count))
    plain = ConditionalBernoulli(logits, alive, count)
    masks = exact.sample(generator=torch.Generator().manual_seed(1))
    assert masks.sum(1).tolist() == count.tolist()
    torch.testing.assert_close(exact.logp(masks), plain.log_prob(masks))
    torch.testing.assert_close(exact.entropy(), plain.entropy())
    assert torch.equal(exact.to_deterministic().sample().bool(), plain.mode())
    assert exact.logp(torch.zeros(5, 7)).tolist()[:4] == [-math.inf] * 4
    step = torch.tensor([0.0, 1.0, 2.0, 0.0, 1.0])
    coins = BernoulliActions.from_logits(pack_bernoulli(logits, alive, step, 0.5))
    theirs = MaskedBernoulli(logits, alive, step, 0.5)
    masks = coins.sample(generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(coins.logp(masks), theirs.log_prob(masks.bool()))
    torch.testing.assert_close(coins.token_logp(masks), theirs.token_log_prob(masks.bool()))
    torch.testing.assert_close(coins.entropy(), theirs.entropy())
    assert coins.kl(coins).abs().max() == 0 and not (masks.bool() & ~alive).any()


def test_gradients_pass_through_the_packed_normaliser():
    generator = torch.Generator().manual_seed(2)
    logits, alive = rows(generator)
    count = torch.tensor([1, 2, 3, 2, 1])
    first, second = (logits.clone().requires_grad_() for _ in range(2))
    packed = ExactActions.from_logits(pack_exact(first, alive, count))
    plain = ConditionalBernoulli(second, alive, count)
    masks = packed.sample(generator=generator)
    (packed.logp(masks).sum() + packed.entropy().sum()).backward()
    (plain.log_prob(masks).sum() + plain.entropy().sum()).backward()
    torch.testing.assert_close(first.grad, second.grad)


def test_draws_of_one_state_are_forwarded_once_with_the_same_result():
    module = make_module()
    calls = []
    module.pruning_policy.register_forward_hook(lambda m, a, out: calls.append(len(out.value)))
    samples, state = [3, 7, 3, 5, 7, 3], [0, 1, 0, 2, 1, 0]
    shared = module._forward_train({Columns.OBS: ids(samples, state=state)})
    apart = module._forward_train({Columns.OBS: ids(samples)})
    assert calls == [3, 6]
    torch.testing.assert_close(
        shared[Columns.ACTION_DIST_INPUTS], apart[Columns.ACTION_DIST_INPUTS]
    )
    torch.testing.assert_close(shared[Columns.EMBEDDINGS], apart[Columns.EMBEDDINGS])


def test_sample_numbers_and_plain_observations_give_the_same():
    module, source = make_module(), open_source(SOURCE)
    obs = ids([2, 9, 4])
    numbers = obs["sample"].numpy()
    query, mask = source.query_tokens(numbers)
    plain = {
        "tokens": torch.from_numpy(source.codes(numbers)),
        "query": torch.from_numpy(query),
        "query_mask": torch.from_numpy(mask).to(torch.int8),
        "alive": obs["alive"].to(torch.int8),
        "step": obs["step"],
        "budget": obs["budget"],
    }
    first, second = (module._forward_train({Columns.OBS: one}) for one in (obs, plain))
    torch.testing.assert_close(
        first[Columns.ACTION_DIST_INPUTS], second[Columns.ACTION_DIST_INPUTS]
    )
    assert not any("source" in name or "codes" in name for name in module.state_dict())


def test_counts_of_several_steps_follow_equal_ratios():
    module = make_module(max_steps=3)
    obs = ids([0, 1, 2, 3], budget=2)
    total = obs["alive"].sum(1).numpy()
    wanted = step_budgets(total, np.full(4, 2), 3)
    for step in range(3):
        obs["step"] = torch.full((4, 1), float(step))
        acted = module.act(obs)
        kept = acted.actions.sum(1).numpy()
        assert (kept == wanted[:, step]).all() if step in (0, 2) else (kept >= 2).all()
        obs["alive"] = acted.actions.bool()
    obs["step"] = torch.full((4, 1), 3.0)  # RLlib also forwards the state after the last step
    obs["alive"] = torch.zeros_like(obs["alive"])
    assert module.act(obs).actions.sum() == 0


def test_exploration_repeats_with_the_seed_and_inference_needs_none():
    module = make_module()
    draws = []
    for _ in range(2):
        module.generator.manual_seed(5)
        draws.append(module.act(ids([1, 2, 3, 4])).actions)
    assert torch.equal(*draws)
    best = module.act(ids([1, 2, 3, 4]), explore=False)
    assert torch.equal(best.actions, module.act(ids([1, 2, 3, 4]), explore=False).actions)


def hand_written_joint(batch, logits, alive, count, values, old) -> float:
    """The exact-budget loss by enumeration of all masks, one row at a time."""
    from itertools import combinations

    total = 0.0
    for row in range(len(values)):
        living = [i for i in range(logits.shape[1]) if alive[row, i]]
        k = int(count[row])
        weights = {
            c: math.exp(sum(float(logits[row, i]) for i in c)) for c in combinations(living, k)
        }
        norm = sum(weights.values())
        chosen = tuple(i for i in living if batch[Columns.ACTIONS][row, i])
        ratio = weights[chosen] / norm / math.exp(old[row])
        gain = float(batch[Postprocessing.ADVANTAGES][row])
        policy = -min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain) / k
        entropy = -sum(w / norm * math.log(w / norm) for w in weights.values()) / k
        error = (float(values[row]) - float(batch[Postprocessing.VALUE_TARGETS][row])) ** 2
        total += policy + 0.5 * error - 0.003 * entropy
    squares = [
        float(logits[r, i]) ** 2 for r in range(len(values)) for i in range(7) if alive[r, i]
    ]
    return total / len(values) + 1e-2 * sum(squares) / len(squares)


def test_the_joint_loss_is_what_a_hand_writes():
    generator = torch.Generator().manual_seed(3)
    logits, alive = rows(generator)
    count, values = torch.tensor([1, 2, 3, 2, 1]), torch.randn(5, generator=generator)
    distribution = ExactActions.from_logits(pack_exact(logits, alive, count))
    actions = distribution.sample(generator=generator)
    old = distribution.logp(actions) + 0.4 * torch.randn(5, generator=generator)
    batch = {
        Columns.ACTIONS: actions,
        Columns.ACTION_LOGP: old,
        Postprocessing.ADVANTAGES: torch.randn(5, generator=generator),
        Postprocessing.VALUE_TARGETS: torch.randn(5, generator=generator),
    }
    settings = PpoSettings(clip=0.2, ratio="joint", per_token=True, logit_l2=1e-2)
    parts = ppo_loss(batch, distribution, values, settings, 0.003)
    expected = hand_written_joint(batch, logits, alive, count, values, old.tolist())
    assert float(parts.total) == pytest.approx(expected, abs=1e-5)
    # rows that RLlib adds behind each episode do not count
    doubled = {name: torch.cat([part, part]) for name, part in batch.items()}
    doubled[Columns.LOSS_MASK] = torch.arange(10) < 5
    twice = ExactActions.from_logits(torch.cat([distribution.inputs, distribution.inputs + 1]))
    masked = ppo_loss(doubled, twice, torch.cat([values, values + 9]), settings, 0.003)
    assert float(masked.total) == pytest.approx(expected, abs=1e-5)


def test_the_token_loss_is_what_a_hand_writes():
    generator = torch.Generator().manual_seed(4)
    logits, alive = rows(generator)
    values, step = torch.randn(5, generator=generator), torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0])
    now = BernoulliActions.from_logits(pack_bernoulli(logits, alive, step, 0.5))
    shifted = logits + 0.3 * torch.randn(5, 7, generator=generator)
    before = pack_bernoulli(shifted, alive, step, 0.5)
    actions = now.sample(generator=generator)
    batch = {
        Columns.ACTIONS: actions,
        Columns.ACTION_LOGP: BernoulliActions.from_logits(before).logp(actions),
        Columns.ACTION_DIST_INPUTS: before,
        Postprocessing.ADVANTAGES: torch.randn(5, generator=generator),
        Postprocessing.VALUE_TARGETS: torch.randn(5, generator=generator),
    }
    settings = PpoSettings(
        ratio="token", per_token=False, logit_l2=0.0, count_loss=0.3, count_target=3.5
    )
    total = 0.0
    for row in range(5):
        gain, error = float(batch[Postprocessing.ADVANTAGES][row]), 0.0
        policy = entropy = expected = 0.0
        for i in range(7):
            if not alive[row, i]:
                continue
            p = 0.5 ** float(step[row]) / (1 + math.exp(-float(logits[row, i])))
            q = 0.5 ** float(step[row]) / (1 + math.exp(-float(shifted[row, i])))
            ratio = p / q if actions[row, i] else (1 - p) / (1 - q)
            policy -= min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain)
            entropy -= p * math.log(p) + (1 - p) * math.log(1 - p)
            expected += p
        wanted = max(1.0, int(alive[row].sum()) * (3.5 / 7) ** (1 / 3))
        error = (float(values[row]) - float(batch[Postprocessing.VALUE_TARGETS][row])) ** 2
        total += policy + 0.5 * error - 0.01 * entropy + 0.3 * math.log(expected / wanted) ** 2
    parts = ppo_loss(batch, now, values, settings, 0.01, max_steps=3)
    assert float(parts.total) == pytest.approx(total / 5, abs=1e-5)


class Demonstrated:
    """The toy source with its relevance as a channel to imitate."""

    def __init__(self) -> None:
        self.inner = open_source("toy:samples=40,tokens=12,seed=2")

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def has_channel(self, name: str) -> bool:
        return name == "question_attention"

    def channel(self, name: str, sample: int) -> np.ndarray:
        return self.inner.relevance(sample)


def test_imitation_saves_a_policy_that_the_module_starts_from(tmp_path):
    from tprl_env.rllib.config import load_config, policy_config
    from tprl_env.rllib.run.imitate import imitate

    config = load_config(
        "smoke",
        {
            "imitation.demonstrator": "question_attention",
            "imitation.steps": 60,
            "rules.budget": (1, 4),
        },
    )
    report = imitate(config, Demonstrated(), tmp_path)
    assert report.losses[-1] < 0.9 * report.losses[0]
    policy = asdict(policy_config(config, open_source("toy")))
    module = make_module(policy=policy, load=str(tmp_path))
    fresh = make_module(policy=policy)
    name = "pruning_policy.actor.score.weight"
    assert not torch.equal(module.state_dict()[name], fresh.state_dict()[name])
    with pytest.raises(ValueError, match="no channel 'saliency'"):
        imitate(config.replace(**{"imitation.demonstrator": "saliency"}), Demonstrated(), tmp_path)
    no_count = config.replace(
        **{"rules.budget": None, "policy.budget_input": False, "policy.distribution": "bernoulli"}
    )
    with pytest.raises(ValueError, match=r"set rules\.budget or algorithm\.count_target"):
        imitate(no_count, Demonstrated(), tmp_path)


def test_weights_of_another_policy_are_refused_where_rllib_ignores_them():
    """A resume with a part of the weights would go on with random ones for the rest."""
    module = make_module()
    whole = dict(module.get_state())
    module.set_state(whole | {"reference.query_in.bias": torch.ones(16)})  # a learner's
    name = "pruning_policy.query_in.bias"
    less = {key: value for key, value in whole.items() if key != name}
    with pytest.raises(ValueError, match=rf"1 missing \['{name}'\], 0 unknown"):
        module.set_state(less)
    with pytest.raises(ValueError, match=r"0 missing \[\], 1 unknown \['more'\]"):
        module.set_state(whole | {"more": torch.ones(1)})
    with pytest.raises(ValueError, match=rf"1 of another shape \['{name}'\]"):
        module.set_state(whole | {name: torch.ones(3)})
