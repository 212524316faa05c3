"""Learning from demonstrations: the loss by hand, and that the policy learns the rule."""

import math

import numpy as np
import pytest
import torch

from tprl_env.data.features.toy import ToyStore
from tprl_env.policy import PolicyPruner
from tprl_env.policy.demonstrations import Demonstrations, saliency_demonstrator
from tprl_env.policy.imitation import demonstration_loss, imitation_agreement, pretrain
from tprl_env.policy.network import PolicyConfig, PruningPolicy
from tprl_env.policy.observations import observe
from tprl_env.reducers import OraclePruner, prune_inputs


def relevant_only(store, samples):
    """Demonstrations that keep exactly the relevant tokens."""
    samples = np.asarray(samples)
    keep, zero = store.relevant(samples), np.zeros(len(samples), np.int64)
    return Demonstrations(samples, store.exists(samples), keep, keep.sum(1), zero)


def test_loss_by_hand():
    # p = 1/2, 3/4 and a dead token; kept: the first only
    logits = torch.tensor([[0.0, math.log(3.0), 50.0]], dtype=torch.float64, requires_grad=True)
    alive, keep = torch.tensor([[True, True, False]]), torch.tensor([[True, False, False]])
    loss = demonstration_loss(logits, keep, alive)
    assert loss.item() == pytest.approx((math.log(2.0) + math.log(4.0)) / 2)
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.allclose(grad, torch.tensor([[-0.25, 0.375, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize(("rule", "weight"), [("none", 1.0), ("sqrt", 3**0.5), ("balanced", 3.0)])
def test_weight_of_kept_tokens(rule, weight):
    logits, alive = torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    keep = torch.tensor([[False, True, False, False]])  # n - k = 3, k = 1
    loss = demonstration_loss(logits, keep, alive, rule).item()
    assert loss == pytest.approx(math.log(2.0) * (3 + weight) / 4)
    for everything in (torch.zeros_like(keep), torch.ones_like(keep)):
        assert demonstration_loss(logits, everything, alive, rule).item() == pytest.approx(
            math.log(2.0)
        )


@pytest.mark.parametrize(
    ("query", "fusion", "steps"),
    [("mean", "concat", 300), ("mean", "gated", 100), ("tokens", "concat", 100)],
)
def test_the_policy_learns_to_threshold(query, fusion, steps):
    store, held_out = ToyStore(samples=256, vary=True), np.arange(192, 256)
    torch.manual_seed(0)
    config = PolicyConfig(8, 8, width=32, query=query, fusion=fusion, token_norm=True)
    policy = PruningPolicy(config)
    seen: list[int] = []
    report = pretrain(
        policy,
        store,
        relevant_only(store, range(192)),
        steps=steps,
        batch_size=32,
        lr=3e-3 if fusion == "concat" and query == "mean" else 1e-2,
        pos_weight="none",
        progress=lambda step, loss: seen.append(step),
    )
    assert seen == list(range(1, steps + 1)) and len(report.losses) == steps // 50
    assert report.losses[0] > 3 * report.final_loss
    assert report.as_dict()["transitions"] == steps * 32
    with torch.no_grad():
        obs = observe(store, held_out, config)
        kept = (policy.logits(obs) > 0).numpy()  # TPRL eq. 16 with tau = 1/2
    relevant = store.relevant(held_out)
    assert (kept & relevant).sum() / relevant.sum() > 0.95
    assert (kept & relevant).sum() / kept.sum() > 0.95
    assert imitation_agreement(policy, store, relevant_only(store, held_out)) > 0.97


def test_fresh_budgets_teach_a_budget_policy():
    store = ToyStore(samples=192)
    torch.manual_seed(0)
    policy = PruningPolicy(PolicyConfig.question_aware(8, 8, width=16))
    critic = policy.critic.score.weight.detach().clone()
    demonstrator = saliency_demonstrator(store, OraclePruner(), 1, 8)
    before = imitation_agreement(policy, store, relevant_only(store, range(192)))
    report = pretrain(policy, store, demonstrator, steps=120, batch_size=32, lr=1e-2)
    after = imitation_agreement(policy, store, relevant_only(store, range(192)))
    assert before < 0.5 and after > 0.95 and report.agreement > 0.5
    assert torch.equal(critic, policy.critic.score.weight)  # the critic is left alone
    keep = PolicyPruner(policy).prune(prune_inputs(store, 0), 4).numpy()
    assert not (store.relevant([0])[0] & ~keep).any()


def test_the_same_seed_gives_the_same_weights():
    store, weights = ToyStore(samples=32), []
    for _ in range(2):
        torch.manual_seed(0)
        policy = PruningPolicy(PolicyConfig(8, 8))
        pretrain(policy, store, relevant_only(store, range(32)), steps=3, batch_size=8, seed=4)
        weights.append(torch.nn.utils.parameters_to_vector(policy.parameters()))
    assert torch.equal(*weights)


def test_agreement_by_hand():
    store = ToyStore(samples=2)
    torch.manual_seed(0)
    policy = PruningPolicy(PolicyConfig(8, 8)).eval()
    with torch.no_grad():
        order = policy.logits(observe(store, [0, 1], policy.config)).argsort(1, descending=True)
    keep = np.zeros((2, 16), np.bool_)
    keep[0, order[0, :4]] = True  # all four agree
    keep[1, order[1, [0, 5]]] = True  # one of two
    two = np.arange(2)
    d = Demonstrations(two, store.exists(two), keep, keep.sum(1), np.zeros_like(two))
    assert imitation_agreement(policy, store, d) == pytest.approx(0.75)
    empty = Demonstrations(two, store.exists(two), keep & False, two * 0, two * 0)
    with pytest.raises(ValueError, match="at least one token"):
        imitation_agreement(policy, store, empty)


def test_errors_are_named():
    store, policy = ToyStore(samples=4), PruningPolicy(PolicyConfig(8, 8))
    d = relevant_only(store, range(4))
    with pytest.raises(ValueError, match="steps and batch_size must be at least 1"):
        pretrain(policy, store, d, steps=0)
    with pytest.raises(ValueError, match="pos_weight must be one of 'sqrt', 'balanced', 'none'"):
        pretrain(policy, store, d, steps=1, pos_weight="focal")
    with pytest.raises(ValueError, match="no token is alive"):
        demonstration_loss(torch.zeros(1, 2), torch.zeros(1, 2).bool(), torch.zeros(1, 2).bool())
    with torch.no_grad():
        policy.query_in.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="became nan at step 0; lower lr"):
        pretrain(policy, store, d, steps=1)
