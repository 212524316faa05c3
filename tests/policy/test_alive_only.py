"""Packing changes the work, not the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tprl_env.policy.alive_only import forward_alive_only, groups_by_length
from tprl_env.policy.network import DEAD_LOGIT, PolicyConfig, PruningPolicy

CONFIGS = {
    "paper": PolicyConfig(8, 6),
    "question_aware": PolicyConfig.question_aware(8, 6, width=16),
    "gated": PolicyConfig(8, 6, fusion="gated", layers=2, step_input=True, value_query=True),
    "mlp": PolicyConfig(8, 6, architecture="mlp", token_norm=True),
    "positions": PolicyConfig(8, 6, position_slots=60),
}


def observation(config: PolicyConfig, counts: list[int], tokens: int = 60) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = len(counts)
    order = torch.rand(rows, tokens, generator=generator).argsort(1).argsort(1)
    obs = {
        "tokens": torch.randn(rows, tokens, 8, generator=generator),
        "alive": order < torch.tensor(counts)[:, None],
        "query": torch.randn(rows, 6, generator=generator),
        "step": torch.arange(rows).remainder(3)[:, None].float(),
        "budget": torch.full((rows, 1), 4.0),
    }
    if config.query == "tokens":
        obs["query"] = torch.randn(rows, 5, 6, generator=generator)
        obs["query_mask"] = torch.rand(rows, 5, generator=generator) < 0.7
    return obs


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("counts", [[60] * 3, [60, 7, 30, 60, 5, 0, 28], [9, 8, 9], [0, 0]])
def test_same_numbers_and_gradients(name: str, counts: list[int]) -> None:
    torch.manual_seed(0)
    policy = PruningPolicy(CONFIGS[name])
    obs = observation(CONFIGS[name], counts)
    found = []
    for forward in (policy, lambda o: forward_alive_only(policy, o)):
        logits, value = forward(obs)
        policy.zero_grad()
        (torch.where(obs["alive"], logits, 0.0).square().sum() + value.square().sum()).backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        found.append((logits.detach(), value.detach(), gradients))
    (dense, dense_value, dense_grad), (packed, value, gradient) = found
    assert bool((packed[~obs["alive"]] == DEAD_LOGIT).all())
    torch.testing.assert_close(packed, dense, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(value, dense_value, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradient, dense_grad, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_dead_tokens_are_not_computed() -> None:
    policy = PruningPolicy(CONFIGS["paper"])
    sizes = []
    policy.actor.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[:2]))
    forward_alive_only(policy, observation(CONFIGS["paper"], [60, 30, 5, 28, 60, 4]))
    assert [tuple(size) for size in sizes] == [(2, 60), (2, 30), (2, 5)]


def test_groups_hold_every_row_once_longest_first() -> None:
    groups = groups_by_length(torch.tensor([18, 144, 72, 20, 144, 80, 17]))
    assert [group.tolist() for group in groups] == [[1, 4], [5, 2], [3, 0, 6]]
    assert [g.tolist() for g in groups_by_length(torch.tensor([9, 1]))] == [[0, 1]]
