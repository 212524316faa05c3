"""Literal tests of the action distributions against enumeration and finite differences."""

import itertools
import math

import pytest
import torch

from tprl_env.policy.distributions import (
    ConditionalBernoulli,
    MaskedBernoulli,
    _sequential_sample,
)
from tprl_env.policy.elementary_symmetric import log_partition
from tprl_env.reducers.selection import top_k_mask

TRUE = torch.ones(1, 2, dtype=torch.bool)


def rows(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def enumerate_masks(logits, alive, count):
    """All masks of that count over alive tokens and their log-probabilities, one row."""
    living = alive.nonzero().flatten().tolist()
    chosen = list(itertools.combinations(living, min(count, len(living))))
    masks = torch.zeros(len(chosen), len(logits), dtype=torch.bool)
    for row, places in enumerate(chosen):
        masks[row, list(places)] = True
    weights = torch.where(masks, logits, 0.0).sum(1)
    return masks, weights - weights.logsumexp(0)


# ------------------------------------------------------------------------- independent coins


def test_bernoulli_literal_numbers():
    # sigmoid(0) = 1/2 and sigmoid(log 3) = 3/4; at t = 1 with lambda 1/2 they are 1/4 and 3/8
    logits = rows([0.0, math.log(3.0)], [0.0, math.log(3.0)])
    alive = torch.ones(2, 2, dtype=torch.bool)
    d = MaskedBernoulli(logits, alive, torch.tensor([0.0, 1.0]), 0.5)
    assert torch.allclose(d.probs, rows([0.5, 0.75], [0.25, 0.375]), atol=1e-15)
    keep_first = torch.tensor([[1, 0], [1, 0]])
    wanted = [math.log(0.5 * 0.25), math.log(0.25 * 0.625)]
    assert torch.allclose(d.log_prob(keep_first), rows(*wanted), atol=1e-15)
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.25, 0.375)]
    assert d.entropy()[1].item() == pytest.approx(sum(entropy), abs=1e-14)
    assert d.mode().tolist() == [[False, True], [False, False]]
    assert d.mode(threshold=0.3).tolist() == [[True, True], [False, True]]
    kl = MaskedBernoulli(rows([0.0]), TRUE[:, :1]).kl(
        MaskedBernoulli(rows([math.log(3.0)]), TRUE[:, :1])
    )
    assert kl.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bernoulli_is_stable_for_extreme_logits(dtype):
    logits = rows([-200.0, -30.0, 0.0, 30.0, 200.0], dtype=dtype).requires_grad_()
    alive = torch.ones(1, 5, dtype=torch.bool)
    for power in (0.0, 1.0, 2.0):
        d = MaskedBernoulli(logits, alive, power, 0.5)
        total = d.log_prob(alive).sum() + d.log_prob(~alive).sum() + d.entropy().sum()
        (grad,) = torch.autograd.grad(total, logits)
        assert total.isfinite() and grad.isfinite().all()
    # nothing is clamped: d log(1 - p) / d logit = -p, also at a logit of 200
    (grad,) = torch.autograd.grad(MaskedBernoulli(logits, alive).log_prob(~alive).sum(), logits)
    assert torch.allclose(grad, -torch.sigmoid(logits), atol=1e-7)


def test_bernoulli_gradient_matches_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    alive = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 1]])
    power = torch.tensor([0.0, 2.0])
    keep = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]])
    other = MaskedBernoulli(torch.randn(2, 5, dtype=torch.float64), alive, power, 0.7)
    for measure in (
        lambda d: d.log_prob(keep),
        lambda d: d.entropy(),
        lambda d: d.kl(other),
    ):
        assert torch.autograd.gradcheck(
            lambda x, f=measure: f(MaskedBernoulli(x, alive, power, 0.7)), logits
        )


def test_bernoulli_dead_tokens_count_for_nothing():
    logits = rows([1.0, float("nan"), -1e9, 2.0]).requires_grad_()
    alive = torch.tensor([[True, False, False, True]])
    d = MaskedBernoulli(logits, alive, 1.0, 0.5)
    small = MaskedBernoulli(rows([1.0, 2.0]), TRUE, 1.0, 0.5)
    action = torch.tensor([[1, 1, 0, 0]])
    assert d.log_prob(action).item() == small.log_prob(torch.tensor([[1, 0]])).item()
    assert d.entropy().item() == small.entropy().item()
    assert d.token_log_prob(action)[0, 1:3].tolist() == [0.0, 0.0]
    (grad,) = torch.autograd.grad((d.log_prob(action) + d.entropy()).sum(), logits)
    assert grad[0, 1:3].tolist() == [0.0, 0.0]
    assert not d.sample(torch.Generator().manual_seed(0))[0, 1:3].any()


def test_bernoulli_sampling_frequency():
    d = MaskedBernoulli(
        rows([0.0, math.log(3.0)]).expand(40_000, 2), TRUE.expand(40_000, 2), 1, 0.5
    )
    frequency = d.sample(torch.Generator().manual_seed(1)).double().mean(0)
    assert torch.allclose(frequency, rows(0.25, 0.375), atol=0.01)  # 4 standard errors


# --------------------------------------------------------------------------- exact budget


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_conditional_agrees_with_enumeration(tokens, scale):
    generator = torch.Generator().manual_seed(tokens)
    for count in range(tokens + 1):
        logits = scale * torch.randn(1, tokens, generator=generator, dtype=torch.float64)
        logits.requires_grad_()
        alive = torch.rand(1, tokens, generator=generator) > 0.2
        d = ConditionalBernoulli(logits, alive, torch.tensor([count]).minimum(alive.sum(1)))
        masks, log_p = enumerate_masks(logits[0], alive[0], count)
        p = log_p.exp()
        entropy, inclusion = -(p * log_p).sum(), (p[:, None] * masks).sum(0)
        own = torch.stack([d.log_prob(mask[None])[0] for mask in masks])
        assert torch.allclose(own, log_p, atol=1e-12, rtol=1e-14)
        assert abs(d.entropy().item() - entropy.item()) < 1e-12
        assert torch.allclose(d.inclusion_probabilities()[0], inclusion, atol=1e-12)
        picks = torch.linspace(-1, 1, len(masks), dtype=torch.float64)
        for mine, reference in ((d.entropy()[0], entropy), (own @ picks, log_p @ picks)):
            (wanted,) = torch.autograd.grad(reference, logits, retain_graph=True)
            (got,) = torch.autograd.grad(mine, logits, retain_graph=True)
            assert torch.allclose(got, wanted, atol=1e-12)
            assert (got[~alive] == 0).all()


def test_log_partition_literal_numbers():
    # e_0..e_3 of odds (1, 2, 3) are 1, 6, 11, 6
    logits = torch.log(rows([1.0, 2.0, 3.0])).expand(4, 3)
    alive = torch.ones(4, 3, dtype=torch.bool)
    value, _ = log_partition(logits, alive, torch.tensor([0, 1, 2, 3]))
    assert torch.allclose(value, torch.log(rows(1.0, 6.0, 11.0, 6.0)), atol=1e-14)


def test_conditional_gradients_match_finite_differences():
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 7, dtype=torch.float64)
    logits.requires_grad_()
    alive = torch.rand(3, 7) > 0.2
    count = torch.tensor([1, 3, 4])  # rows of different counts share one table
    other = ConditionalBernoulli(torch.randn(3, 7, dtype=torch.float64), alive, count)
    for measure in (
        lambda d: d.entropy(),
        lambda d: d.kl(other),
        lambda d: other.kl(d),
        lambda d: d.inclusion_probabilities(),
    ):
        assert torch.autograd.gradcheck(
            lambda x, f=measure: f(ConditionalBernoulli(x, alive, count)), logits
        )
    assert torch.autograd.gradgradcheck(lambda x: log_partition(x, alive, count)[0], logits)


def test_half_precision_logits_are_computed_in_float32():
    logits, alive = torch.randn(2, 50).half(), torch.ones(2, 50, dtype=torch.bool)
    d = ConditionalBernoulli(logits, alive, torch.tensor([3, 40]))
    mask = d.sample(torch.Generator().manual_seed(0))
    wanted = ConditionalBernoulli(logits.float(), alive, torch.tensor([3, 40])).log_prob(mask)
    assert torch.equal(d.log_prob(mask), wanted)
    assert MaskedBernoulli(logits, alive, 1, 0.5).log_prob(mask).dtype == torch.float32


def test_third_derivatives_are_refused():
    logits = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    d = ConditionalBernoulli(logits, torch.ones(1, 4, dtype=torch.bool), torch.tensor([2]))
    (grad,) = torch.autograd.grad(d.entropy().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.square().sum().backward()


def test_conditional_kl_agrees_with_enumeration():
    first, second = rows([0.5, -1.0, 2.0, 0.0]), rows([0.0, 1.0, -1.0, 3.0])
    alive, count = torch.ones(1, 4, dtype=torch.bool), torch.tensor([2])
    _, p = enumerate_masks(first[0], alive[0], 2)
    _, q = enumerate_masks(second[0], alive[0], 2)
    d, e = (ConditionalBernoulli(x, alive, count) for x in (first, second))
    assert d.kl(e).item() == pytest.approx((p.exp() * (p - q)).sum().item(), abs=1e-13)
    assert abs(d.kl(d).item()) < 1e-14


def test_conditional_edge_counts_are_exact():
    logits = rows([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).requires_grad_()
    alive = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    d = ConditionalBernoulli(logits, alive, torch.tensor([0, 2, 0]))
    mask = torch.tensor([[0, 0, 0], [1, 1, 1], [0, 1, 0]])  # entries of dead tokens are ignored
    assert d.log_prob(mask).tolist() == [0.0, 0.0, 0.0]
    assert d.entropy().tolist() == [0.0, 0.0, 0.0]
    wanted = [[False] * 3, [True, True, False], [False] * 3]
    assert d.mode().tolist() == wanted
    assert d.sample(torch.Generator().manual_seed(0)).tolist() == wanted
    assert d.inclusion_probabilities().tolist() == [[0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert d.log_prob(torch.tensor([[1, 0, 0], [1, 0, 0], [0, 0, 0]])).tolist() == [
        -math.inf,
        -math.inf,
        0.0,
    ]


def test_conditional_large_float32_is_close_to_float64():
    torch.manual_seed(0)
    logits = 8 * torch.randn(4, 300)
    alive = torch.rand(4, 300) > 0.1
    count = torch.tensor([1, 40, 200, 299]).minimum(alive.sum(1))
    single, double = (ConditionalBernoulli(x, alive, count) for x in (logits, logits.double()))
    mask = double.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(
        single.log_prob(mask).double(), double.log_prob(mask), rtol=1e-5, atol=1e-3
    )
    pi, exact = single.inclusion_probabilities().double(), double.inclusion_probabilities()
    assert torch.allclose(pi, exact, atol=3e-5)
    assert torch.allclose(exact.sum(1), double.count.double(), atol=1e-10)


@pytest.mark.parametrize("sampler", ["rejection", "sequential"])
def test_conditional_sampling_frequencies(sampler):
    logits, alive = rows([0.5, -1.0, 9.0, 2.0, 0.0, 1.0]), torch.ones(1, 6, dtype=torch.bool)
    alive[0, 2] = False
    count, draws = torch.tensor([2]), 20_000
    generator = torch.Generator().manual_seed(3)
    d = ConditionalBernoulli(logits, alive, count)
    if sampler == "rejection":
        sample = d.sample(generator, draws=draws)[:, 0]
    else:
        sample = _sequential_sample(
            d.logits.expand(draws, 6), alive.expand(draws, 6), count.expand(draws), generator
        )
    masks, log_p = enumerate_masks(logits[0], alive[0], 2)
    code = 2 ** torch.arange(6)
    observed = torch.stack([((sample * code).sum(1) == (m * code).sum()).sum() for m in masks])
    assert observed.sum() == draws  # every draw is one of the possible masks
    expected = log_p.exp() * draws
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    assert chi_square < 27.9  # 9 degrees of freedom, p = .001


def test_sampling_ends_by_the_fallback(monkeypatch):
    monkeypatch.setattr("tprl_env.policy.distributions._ROUNDS", 0)
    d = ConditionalBernoulli(
        torch.randn(5, 20), torch.ones(5, 20, dtype=torch.bool), torch.tensor([0, 1, 7, 19, 20])
    )
    assert d.sample(torch.Generator().manual_seed(0)).sum(1).tolist() == [0, 1, 7, 19, 20]


def test_sampling_is_reproducible_and_draws_share_rows():
    d = ConditionalBernoulli(
        torch.randn(3, 9), torch.ones(3, 9, dtype=torch.bool), torch.tensor([2, 5, 8])
    )
    one, two = (d.sample(torch.Generator().manual_seed(5), draws=4) for _ in range(2))
    assert one.shape == (4, 3, 9) and torch.equal(one, two)
    assert one.sum(2).tolist() == [[2, 5, 8]] * 4
    with pytest.raises(ValueError, match="draws"):
        d.sample(draws=0)


# ---------------------------------------------------------------------------------- shared


def test_top_k_ties_go_to_the_lowest_index():
    values = rows([1.0, 3.0, 3.0, 3.0], [float("-inf"), 0.0, 0.0, float("-inf")])
    alive = torch.tensor([[True, True, True, True], [True, True, False, True]])
    mask = top_k_mask(values, alive, torch.tensor([2, 2]))
    assert mask.tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MaskedBernoulli(torch.zeros(2, 3), torch.ones(2, 4)), "shape of logits"),
        (lambda: MaskedBernoulli(torch.zeros(3), torch.ones(3)), "shape \\(B, N\\)"),
        (lambda: MaskedBernoulli(torch.zeros(1, 3), torch.ones(1, 3), 1.0, 0.0), "\\(0, 1\\]"),
        (lambda: MaskedBernoulli(torch.zeros(1, 3), torch.ones(1, 3), -1.0, 0.5), "negative"),
        (
            lambda: ConditionalBernoulli(torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([-1])),
            "negative",
        ),
        (
            lambda: ConditionalBernoulli(torch.zeros(1, 3), torch.ones(1, 3), torch.tensor([1.0])),
            "integers",
        ),
        (lambda: MaskedBernoulli(torch.zeros(1, 2), TRUE).log_prob(TRUE[0]), "shape of alive"),
        (
            lambda: MaskedBernoulli(torch.zeros(1, 2), TRUE).kl(
                MaskedBernoulli(torch.zeros(1, 2), ~TRUE)
            ),
            "same alive",
        ),
    ],
)
def test_bad_arguments_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_odds_that_are_not_finite_are_refused_where_they_arise(value):
    """NaN sampled "all pruned", and infinities became NaN in the log-probability."""
    logits = torch.zeros(3, 4)
    logits[1, 2] = value
    alive, count = torch.ones(3, 4, dtype=torch.bool), torch.full((3,), 2)
    message = rf"logits must be finite, got {value} for 1 of 4 tokens in row 1"
    for build in (
        lambda: MaskedBernoulli(logits, alive),
        lambda: ConditionalBernoulli(logits, alive, count),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    alive[1, 2] = False  # a dead token's content is nobody's business
    assert MaskedBernoulli(logits, alive).log_prob(alive).isfinite().all()
    assert ConditionalBernoulli(logits, alive, count).entropy().isfinite().all()


def test_more_tokens_than_alive_are_refused():
    alive = torch.tensor([[True, True, True], [True, False, False]])
    with pytest.raises(ValueError, match="alive tokens, got 2 of 1 in row 1"):
        ConditionalBernoulli(torch.zeros(2, 3), alive, torch.tensor([3, 2]))
