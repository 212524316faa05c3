"""Contracts of every pruner, and literal rules of each."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tprl_env.data.features.toy import ToyStore
from tprl_env.policy import PolicyPruner
from tprl_env.policy.network import PolicyConfig, PruningPolicy
from tprl_env.policy.pruner import choose_penalty, marginal_mask
from tprl_env.reducers import (
    PRUNERS,
    ClsAttentionPruner,
    DivPrune,
    OraclePruner,
    PruneInputs,
    QuestionAttentionPruner,
    QuestionRowsPruner,
    RandomPruner,
    UniformPruner,
    VisPruner,
    make_pruner,
    prune_inputs,
)


def policy(**fields):
    torch.manual_seed(0)
    return PruningPolicy(PolicyConfig(8, 6, **fields)).eval()


ALL = {
    "random": RandomPruner(seed=3),
    "uniform": UniformPruner(),
    "cls_attention": ClsAttentionPruner(),
    "vispruner": VisPruner(),
    "vispruner, attention only": VisPruner(important_ratio=1.0),
    "vispruner, deduplication only": VisPruner(important_ratio=0.0, drop_per_round=3),
    "divprune": DivPrune(),
    "oracle": OraclePruner(),
    "oracle, spread": OraclePruner(ties="spread"),
    "question_attention": QuestionAttentionPruner(),
    "question_rows": QuestionRowsPruner(),
    "policy": PolicyPruner(policy()),
    "policy, question": PolicyPruner(policy(query="tokens", budget=True)),
    "policy, multistep": PolicyPruner(policy(budget=True), mode="multistep"),
}


def inputs(rows=3, columns=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = rows * columns
    return PruneInputs(
        tokens=torch.randn(n, 12, generator=g),
        tower=torch.randn(n, 10, generator=g),
        cls_attention=torch.rand(n, generator=g),
        grid=(rows, columns),
        query=torch.randn(6, generator=g),
        query_tokens=torch.randn(4, 6, generator=g),
        codes=torch.randn(n, 8, generator=g),
        relevance=torch.randint(0, 2, (n,), generator=g).float(),
        question_attention=torch.rand(n, generator=g),
        question_rows=torch.rand(n, generator=g),
        sample=seed,
    )


# ------------------------------------------------------------------------------ contracts


def test_the_table_is_covered():
    assert {pruner.name for pruner in ALL.values()} <= {*PRUNERS, "policy"}
    assert all(cls.name == name for name, cls in PRUNERS.items())


@pytest.mark.parametrize("name", ALL)
def test_exactly_the_budget_is_kept(name):
    pruner = ALL[name]
    for one in (inputs(), inputs(1, 1), inputs(2, 7, seed=1)):
        n, before = one.num_tokens, copy.deepcopy(one)
        for budget in range(1, n + 1):
            keep = pruner.prune(one, budget)
            assert keep.dtype == torch.bool and keep.shape == (n,)
            assert int(keep.sum()) == budget
            assert torch.equal(keep, pruner.prune(one, budget))
        assert pruner.prune(one, n).all()
        for field, value in vars(before).items():
            same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
            assert same(getattr(one, field), value), field
    assert pruner.exact


@pytest.mark.parametrize("name", ALL)
def test_batches_equal_single_images(name):
    several = [inputs(seed=i, columns=3 + i) for i in range(4)]
    batch = ALL[name].prune_batch(several, 5)
    for one, keep in zip(several, batch, strict=True):
        assert torch.equal(keep, ALL[name].prune(one, 5))
    assert ALL[name].prune_batch([], 5) == []


@pytest.mark.parametrize("name", ALL)
def test_bad_budgets_and_missing_fields_are_named(name):
    pruner = ALL[name]
    for budget in (0, -1, 16, 2.5, True):
        with pytest.raises(ValueError, match="budget must"):
            pruner.prune(inputs(), budget)
    for need in pruner.needs:
        bare = inputs()
        setattr(bare, need, None)
        with pytest.raises(ValueError, match=f"{pruner.name}.* needs {need}"):
            pruner.prune(bare, 3)


def test_make_pruner_and_its_errors():
    assert make_pruner("vispruner", important_ratio=0.25) == VisPruner(0.25)
    with pytest.raises(ValueError, match=r"unknown pruner 'divprun'.*did you mean 'divprune'"):
        make_pruner("divprun")
    with pytest.raises(ValueError, match=r"no field 'ratio'.*important_ratio"):
        make_pruner("vispruner", ratio=0.5)
    with pytest.raises(ValueError, match=r"needs weights; use tprl_env\.policy\.PolicyPruner"):
        make_pruner("policy")  # has weights, so it is loaded
    with pytest.raises(ValueError, match="important_ratio must lie"):
        make_pruner("vispruner", important_ratio=1.5)
    with pytest.raises(ValueError, match="drop_per_round"):
        make_pruner("vispruner", drop_per_round=0)


def test_prune_inputs_of_a_store():
    store = ToyStore(samples=8, vary=True)
    one = prune_inputs(store, 2)
    n = int(store.exists([2]).sum())
    assert one.num_tokens == len(one.codes) == len(one.relevance) == n
    assert torch.equal(one.codes, torch.from_numpy(store.codes([2])[0, :n].copy()))
    assert one.tower is None and one.question_attention is None and one.query_tokens.shape == (3, 8)
    assert prune_inputs(store, 2, needs=("relevance",)).query is None
    with pytest.raises(ValueError, match="PruneInputs needs one of"):
        PruneInputs().num_tokens  # noqa: B018


def test_nan_saliency_is_refused():
    bad = inputs()
    bad.cls_attention[3] = math.nan
    with pytest.raises(ValueError, match="1 NaN"):
        ClsAttentionPruner().prune(bad, 4)


# --------------------------------------------------------------------------- single rules


def test_rankings_break_ties_by_lowest_index():
    one = PruneInputs(cls_attention=torch.tensor([0.1, 0.3, 0.3, 0.3]))
    assert ClsAttentionPruner().prune(one, 2).tolist() == [False, True, True, False]


def test_random_depends_on_seed_and_sample_only():
    masks = [RandomPruner(seed=s).prune(inputs(6, 6, seed=i), 18) for s in (0, 1) for i in (0, 1)]
    assert len({tuple(m.tolist()) for m in masks}) == 4
    nested = [RandomPruner().prune(inputs(), k) for k in (3, 9)]
    assert not (nested[0] & ~nested[1]).any()


@pytest.mark.parametrize(
    ("grid", "budget", "kept"),
    [
        ((4, 4), 4, [5, 7, 13, 15]),
        ((2, 4), 2, [5, 7]),  # round(sqrt(2 * 2 / 4)) = 1 row in the middle
        ((3, 3), 1, [4]),
        ((1, 6), 3, [1, 3, 5]),
        ((2, 2), 3, [1, 2, 3]),
    ],
)
def test_uniform_lattice(grid, budget, kept):
    keep = UniformPruner().prune(PruneInputs(grid=grid), budget)
    assert keep.nonzero().flatten().tolist() == kept


def test_uniform_covers_every_quarter():
    keep = UniformPruner().prune(PruneInputs(grid=(12, 12)), 14).view(12, 12)
    quarters = [keep[i : i + 6, j : j + 6].sum().item() for i in (0, 6) for j in (0, 6)]
    assert min(quarters) >= 3
    with pytest.raises(ValueError, match="full grid, got 2x2 for 5 tokens"):
        UniformPruner().prune(PruneInputs(codes=torch.zeros(5, 2), grid=(2, 2)), 3)


def test_oracle_keeps_what_matters_first():
    one = inputs(4, 4)
    one.relevance = torch.zeros(16)
    one.relevance[[3, 9]] = 1.0
    one.relevance[12] = 0.5
    assert OraclePruner().prune(one, 3).nonzero().flatten().tolist() == [3, 9, 12]
    rest = [tuple(OraclePruner(seed=s).prune(one, 8).tolist()) for s in range(4)]
    assert len(set(rest)) > 1 and all(m[3] and m[9] and m[12] for m in rest)


def test_spread_ties_of_the_oracle_give_every_cell_a_token_first():
    """2 x 3 cells of 2 x 2 tokens; three cells are relevant, one of them more."""
    one = inputs(4, 6)
    relevance = torch.zeros(4, 6)
    relevance[:2, 2:4], relevance[2:, :2], relevance[2:, 4:] = 2.0, 1.0, 1.0
    one.relevance = relevance.flatten()
    wanted = {6: [0, 4, 0, 1, 0, 1], 10: [0, 4, 0, 3, 0, 3], 15: [1, 4, 1, 4, 1, 4]}
    for seed in range(5):
        for budget, per_cell in wanted.items():
            kept = OraclePruner(ties="spread", seed=seed).prune(one, budget)
            assert kept.view(2, 2, 3, 2).sum((1, 3)).flatten().tolist() == per_cell
    one.grid = (5, 5)
    with pytest.raises(ValueError, match="needs a full grid, got 5x5 for 24 tokens"):
        OraclePruner(ties="spread").prune(one, 3)
    with pytest.raises(ValueError, match="did you mean 'spread'"):
        OraclePruner(ties="spred")


def test_vispruner_by_hand():
    """Attention falls with the index; 0, 1 are important; the rest 2, 3, 4, 5 lose two.

    One per round: even places hold 2, 4, odd ones 3, 5. Token 2 equals 3, so 2 goes and the list
    is 4, 3, 5. Now even places hold 4, 5 and the odd one 3; 5 is nearer to 3 and goes.
    Two per round: both even tokens 2, 4 go at once.
    """
    angle = torch.tensor([0.0, 0.0, 1.0, 1.0, 3.0, 1.5])
    one = PruneInputs(
        tower=torch.stack([angle.cos(), angle.sin()], dim=1),
        cls_attention=torch.tensor([0.6, 0.5, 0.4, 0.3, 0.2, 0.1]),
    )
    assert VisPruner(0.5, 1).prune(one, 4).nonzero().flatten().tolist() == [0, 1, 3, 4]
    assert VisPruner(0.5, 8).prune(one, 4).nonzero().flatten().tolist() == [0, 1, 3, 5]
    assert VisPruner(1.0).prune(one, 4).nonzero().flatten().tolist() == [0, 1, 2, 3]


def reference_vispruner(tower, attention, budget, ratio, step):
    """The published rule in plain loops."""
    order = sorted(range(len(attention)), key=lambda i: -attention[i])
    important, rest = order[: math.floor(budget * ratio)], order[math.floor(budget * ratio) :]
    wanted = budget - len(important)
    while wanted and len(rest) > wanted:
        even, odd = rest[::2], rest[1::2]
        drop = min(step, len(rest) - wanted, len(even))
        similar = {i: max(float(tower[i] @ tower[j]) for j in odd) for i in even}
        rest = sorted(even, key=lambda i: -similar[i])[drop:] + odd
    return sorted(important + (rest if wanted else []))


def test_vispruner_equals_the_loops():
    for seed in range(3):
        one = inputs(5, 7, seed=seed)
        tower, attention = F.normalize(one.tower, dim=1), one.cls_attention.tolist()
        for budget in range(1, 36, 3):
            for ratio, step in ((0.5, 8), (0.3, 2), (0.0, 5)):
                kept = VisPruner(ratio, step).prune(one, budget).nonzero().flatten().tolist()
                assert kept == reference_vispruner(tower, attention, budget, ratio, step)


def test_divprune_by_hand():
    """At 0, 10, 100, 200 degrees: 200 is loneliest (100), 10 farthest from it (170), then 100."""
    angle = torch.deg2rad(torch.tensor([0.0, 10.0, 100.0, 200.0]))
    one = PruneInputs(tokens=torch.stack([angle.cos(), angle.sin()], dim=1) * 3.0)
    chosen = [DivPrune().prune(one, k).nonzero().flatten().tolist() for k in (1, 2, 3)]
    assert chosen == [[3], [1, 3], [1, 2, 3]]


def test_divprune_equals_the_loops():
    for seed in range(3):
        one = inputs(4, 5, seed=seed)
        z = F.normalize(one.tokens.double(), dim=1)
        distance = (1 - z @ z.T).tolist()
        n = len(distance)
        picks = [max(range(n), key=lambda i: min(distance[i][j] for j in range(n) if j != i))]
        while len(picks) < n:
            rest = [i for i in range(n) if i not in picks]
            picks.append(max(rest, key=lambda i: min(distance[i][j] for j in picks)))
        for budget in (1, 2, 7, 19):
            kept = DivPrune().prune(one, budget).nonzero().flatten().tolist()
            assert kept == sorted(picks[:budget])


# --------------------------------------------------------------------------------- policy


def logits_of(pruner, one):
    obs = {
        "tokens": one.codes[None],
        "alive": torch.ones(1, one.num_tokens),
        "query": one.query[None],
    }
    return pruner.policy.logits(obs)[0].detach()


def test_threshold_keeps_what_passes_or_the_best():
    one, pruner = inputs(), PolicyPruner(policy(), mode="threshold", threshold=0.5)
    logits = logits_of(pruner, one)
    assert torch.equal(pruner.prune(one, 3), logits > 0)
    assert not pruner.exact
    none = PolicyPruner(policy(), mode="threshold", threshold=0.999999).prune(one, 3)
    assert none.nonzero().flatten().tolist() == [int(logits.argmax())]
    with pytest.raises(ValueError, match="needs a threshold"):
        PolicyPruner(policy(), mode="threshold").prune(one, 3)


def test_topk_keeps_the_largest():
    one, pruner = inputs(), PolicyPruner(policy())
    order = logits_of(pruner, one).argsort(descending=True)
    assert set(pruner.prune(one, 4).nonzero().flatten().tolist()) == set(order[:4].tolist())


@pytest.mark.parametrize("mode", ["topk", "threshold", "multistep"])
def test_calibration_meets_the_mean(mode):
    several = [inputs(4, 6, seed=i) for i in range(20)]
    for budget in (3, 12, 20):
        pruner = PolicyPruner(policy(), mode=mode, discount=0.9).calibrate(several, budget)
        kept = torch.stack([mask.sum() for mask in pruner.prune_batch(several, budget)]).double()
        report = pruner.calibration
        assert report.mean_kept == pytest.approx(kept.mean().item())
        assert report.std_kept == pytest.approx(kept.std(unbiased=False).item())
        assert report.threshold == pruner.threshold and report.images == 20
        if mode != "multistep" or budget < 20:
            tolerance = 0.06 if mode != "multistep" else 1.0
            assert kept.mean().item() == pytest.approx(budget, abs=tolerance)


def test_calibration_on_a_store_and_its_errors():
    store = ToyStore(samples=40, tokens=16, vary=True)
    torch.manual_seed(0)
    net = PruningPolicy(PolicyConfig.question_aware(8, 8, width=16))
    pruner = PolicyPruner(net, batch_size=16).calibrate(store, 5)
    assert pruner.calibration.images == 40
    assert pruner.calibration.mean_kept == pytest.approx(5, abs=0.03)
    masks = pruner.prune_batch([prune_inputs(store, i) for i in range(40)], 5)
    assert np.mean([int(m.sum()) for m in masks]) == pytest.approx(pruner.calibration.mean_kept)
    with pytest.raises(ValueError, match=r"budget in \[1, 16\]"):
        PolicyPruner(net).calibrate(store, 17)
    with pytest.raises(ValueError, match="nothing to calibrate"):
        PolicyPruner(net, mode="multistep").calibrate(store, 5)
    with pytest.raises(ValueError, match="slice the prune inputs"):
        PolicyPruner(net).calibrate([prune_inputs(store, 0)], 5, samples=[0])


def test_rollouts_are_nested_and_follow_their_counts():
    one, pruner = inputs(4, 6), PolicyPruner(policy(budget=True), mode="multistep", steps=3)
    masks = pruner.trajectory(one, [12, 6, 3])
    assert [int(m.sum()) for m in masks] == [12, 6, 3]
    assert not any((b & ~a).any() for a, b in itertools.pairwise(masks))
    assert torch.equal(masks[-1], pruner.prune(one, 3))  # 24 -> 12 -> 6 -> 3 is geometric
    for wrong in ([], [3, 5]):
        with pytest.raises(ValueError, match="never grow"):
            pruner.trajectory(one, wrong)


def test_thresholded_rollout_discounts_each_step():
    one = inputs(4, 6)
    plain = PolicyPruner(policy(), mode="multistep", threshold=0.4, steps=1).prune(one, 3)
    three = PolicyPruner(policy(), mode="multistep", threshold=0.4, steps=3, discount=0.6)
    keep = three.prune(one, 3)
    assert not (keep & ~plain).any() and 1 <= int(keep.sum()) < int(plain.sum())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mode": "beam"}, "mode must be one of 'topk', 'threshold', 'multistep'"),
        ({"threshold": 0.0}, r"threshold must lie in \(0, 1\), got 0.0"),
        ({"threshold": 1.0}, r"threshold must lie in \(0, 1\)"),
        ({"discount": 0.0}, "discount must lie"),
        ({"steps": 0}, "at least 1"),
    ],
)
def test_bad_policy_pruners_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        PolicyPruner(policy(), **fields)


def test_policy_pruner_from_a_folder(tmp_path):
    net = policy()
    net.save_pretrained(tmp_path)
    pruner = PolicyPruner.from_pretrained(tmp_path, mode="threshold", threshold=0.5)
    again = PolicyPruner(net, mode="threshold", threshold=0.5)
    assert torch.equal(pruner.prune(inputs(), 3), again.prune(inputs(), 3))


def test_a_redundancy_penalty_spreads_over_objects_literal():
    # tokens 0, 1, 2 are copies with log-odds 3, 2.9, 2.8; token 3 is another thing with 1
    logits = torch.tensor([[3.0, 2.9, 2.8, 1.0]])
    codes = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    alive = torch.ones(1, 4, dtype=torch.bool)
    for penalty, kept in ((0.0, [0, 1]), (1.0, [0, 1]), (2.0, [0, 3]), ("coverage", [0, 3])):
        mask = marginal_mask(logits, alive, torch.tensor([2]), codes, penalty)
        assert mask[0].nonzero()[:, 0].tolist() == kept, penalty
    # p (1 - similarity): token 3 at cosine .6 is worth .4 p(3) = .292, token 4 p(-1) = .269
    leaning = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])
    for third, kept in ((-1.0, [0, 1]), (-0.8, [0, 2])):
        mask = marginal_mask(
            torch.tensor([[3.0, 1.0, third]]), alive[:, :3], torch.tensor([2]), leaning, "coverage"
        )
        assert mask[0].nonzero()[:, 0].tolist() == kept
    # dead tokens never, and every count exactly
    alive[0, 0] = False
    mask = marginal_mask(logits, alive, torch.tensor([3]), codes, 2.0)
    assert mask[0].tolist() == [False, True, True, True]


def test_the_penalty_is_chosen_where_it_scores_best_and_small_on_ties():
    policy = PruningPolicy(PolicyConfig(token_width=8, query_width=5))
    pruner = PolicyPruner(policy)
    for wanted in (4.0, 16.0, "coverage"):
        best = choose_penalty(pruner, lambda p, w=wanted: float(p.redundancy_penalty == w))
        assert best.redundancy_penalty == wanted
    assert choose_penalty(pruner, lambda p: 0.5).redundancy_penalty == 0.0
    with pytest.raises(ValueError, match="redundancy_penalty must be 0 or positive"):
        PolicyPruner(policy, redundancy_penalty=-1.0)
    with pytest.raises(ValueError, match="or 'coverage', got 'cover'"):
        PolicyPruner(policy, redundancy_penalty="cover")
    with pytest.raises(ValueError, match="at least one candidate"):
        choose_penalty(pruner, lambda p: 0.5, [])
    with pytest.raises(ValueError, match=r"keeps exact counts, got .* mode 'threshold'"):
        choose_penalty(PolicyPruner(policy, mode="threshold", threshold=0.5), lambda p: 0.5)


def test_a_policy_of_several_steps_is_measured_in_as_many():
    blind = PruningPolicy(PolicyConfig(token_width=8, query_width=6))
    seeing = PruningPolicy(PolicyConfig(token_width=8, query_width=6, budget=True))
    assert PolicyPruner.as_trained(seeing, 1).mode == "topk"
    assert PolicyPruner.as_trained(blind, 3).mode == "topk"  # knows no count to step down to
    stepwise = PolicyPruner.as_trained(seeing, 3)
    assert (stepwise.mode, stepwise.steps, stepwise.exact) == ("multistep", 3, True)
    own = PolicyPruner.as_trained(policy(budget=True, trained_steps=3))
    assert (own.mode, own.steps) == ("multistep", 3)
    assert PolicyPruner.as_trained(own.policy, mode="threshold", threshold=0.5).mode == "threshold"
    assert PolicyPruner.as_trained(own.policy, steps=1).mode == "topk"
    rows = [inputs(seed=seed) for seed in range(8)]
    spread = dataclasses.replace(stepwise, redundancy_penalty=50.0)
    masks, plain = spread.prune_batch(rows, 4), stepwise.prune_batch(rows, 4)
    assert all(int(mask.sum()) == 4 for mask in masks + plain)
    assert any(not torch.equal(a, b) for a, b in zip(masks, plain, strict=True))


@pytest.mark.parametrize("mode", ["topk", "threshold", "multistep"])
def test_a_policy_gone_bad_prunes_nothing(mode):
    """Its NaN used to keep an arbitrary token, or all of them."""
    net = policy(budget=True)
    with torch.no_grad():
        net.actor.score.weight.fill_(math.inf)
    pruner = PolicyPruner(net, mode=mode, threshold=0.5)
    for penalty in (0.0, 2.0):
        with pytest.raises(ValueError, match="logits must be finite"):
            dataclasses.replace(pruner, redundancy_penalty=penalty).prune(inputs(), 3)
    with pytest.raises(ValueError, match=r"budget must lie in \[1, "):
        PolicyPruner(policy(budget=True), mode=mode, threshold=0.5).prune(inputs(), 1000)
