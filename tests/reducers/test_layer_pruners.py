"""Rules inside the language model on views made by hand; schedules in numbers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from tprl_env.reducers.interfaces import Reducer
from tprl_env.reducers.layer import (
    BTP,
    LAYER_PRUNERS,
    PACT,
    AutoPrune,
    FastV,
    PyramidDrop,
    QuestionRows,
    SparseVLM,
    make_layer_pruner,
)
from tprl_env.reducers.layer.autoprune import mutual_information, spend
from tprl_env.reducers.layer.btp import fill_by_diversity, spread_on_grid
from tprl_env.reducers.layer.pact import clusters, means
from tprl_env.reducers.layer.recycle import clusters_of, kept_and_recycled, recycle
from tprl_env.reducers.layer.schedule import at_depth, average_tokens, exact_count
from tprl_env.reducers.layer.sparsevlm import raters
from tprl_env.reducers.layer_pruner import LayerPruner, LayerView, OneCut, Stage

ALL = {
    **{name: make_layer_pruner(name) for name in LAYER_PRUNERS},
    "sparsevlm v1": SparseVLM("v1"),
    "sparsevlm v2": SparseVLM("v2"),
    "last row, mean, previous": QuestionRows(2, "last", "mean", "previous"),
    "one cut": OneCut(FastV(), 2, 5),
}


def view(rows, keep, *, layer=1, stage=0, alive=None, hidden=None, **more):
    """A view of attention rows (B, H, R, M) or (H, R, M); everything else plain."""
    rows = torch.as_tensor(rows, dtype=torch.float32)
    rows = rows[None] if rows.ndim == 3 else rows
    batch, _, count, tokens = rows.shape
    alive = torch.ones(batch, tokens, dtype=torch.bool) if alive is None else alive
    keep = torch.full((batch,), keep) if isinstance(keep, int) else torch.as_tensor(keep)
    if hidden is None:
        hidden = torch.randn(batch, tokens, 6, generator=torch.Generator().manual_seed(0))
    fields = {
        "num_layers": 4,
        "plan": keep[:, None],
        "full": alive.sum(1),
        "row_valid": torch.ones(batch, count, dtype=torch.bool),
        **more,
    }
    places = torch.arange(tokens).expand(batch, -1)
    return LayerView(
        stage, layer, keep=keep, alive=alive, places=places, rows=rows, hidden=hidden, **fields
    )


def kept(choice, row=0):
    return choice.keep[row].nonzero()[:, 0].tolist()


# ---------- schedules


def test_average_tokens_of_the_published_schedules():
    assert average_tokens([Stage(2, 300), Stage(6, 200), Stage(16, 110)], 576, 32) == 191
    assert average_tokens(SparseVLM("v1").stages(576, 32), 576, 32) == 202.75  # as the code drops
    assert average_tokens(PyramidDrop().stages(576, 32), 576, 32) == 270
    assert average_tokens(FastV().stages(576, 32), 576, 32) == 306
    assert average_tokens(BTP().stages(576, 32), 576, 32) == 129
    assert average_tokens([], 576, 32) == 576
    found = [round(exact_count(576, 32, 2, average), 1) for average in (192, 128, 64)]
    assert found == [166.4, 98.1, 29.9]
    assert [FastV().stages(576, 32, a) for a in (192, 128, 64)] == [
        (Stage(2, count),) for count in (166, 98, 30)
    ]


def test_depth_share():
    assert at_depth([8, 16, 24], 32, 32) == [8, 16, 24]
    assert at_depth([8, 16, 24], 32, 4) == [1, 2, 3]
    assert at_depth([2], 32, 4, first=1) == [1]
    assert at_depth([2], 32, 40) == [3]  # 2.5 rounds up
    assert PyramidDrop().stages(144, 2) == (Stage(1, 18),)  # three on one layer: the last holds
    with pytest.raises(ValueError, match=r"lie in \[1, 3\] in a model of 4"):
        at_depth([5], None, 4, first=1)
    with pytest.raises(ValueError, match="before layer 1 or later, the model has 1"):
        FastV().stages(9, 1)


@pytest.mark.parametrize("name", [name for name in ALL if name != "one cut"])
@pytest.mark.parametrize(("tokens", "layers"), [(576, 32), (144, 4), (1, 4), (7, 3), (2880, 40)])
def test_an_average_is_met_or_refused_with_its_range(name, tokens, layers):
    reducer = ALL[name]
    with pytest.raises(ValueError, match=r"average of [\d.e+]+ to [\d.e+]+ .* got -1") as refused:
        reducer.stages(tokens, layers, -1.0)
    low, high = (float(word) for word in str(refused.value).split() if word.count(".") <= 1
                 and word.replace(".", "").isdigit())  # fmt: skip
    with pytest.raises(ValueError, match="to"):
        reducer.stages(tokens, layers, float("nan"))
    for part in (0.0, 0.1, 0.37, 0.5, 0.93, 1.0):
        wanted = low + part * (high - low)
        try:
            stages = reducer.stages(tokens, layers, wanted)
        except ValueError:
            assert part in (0.0, 1.0)  # the message rounds the ends of the range
            continue
        found = average_tokens(stages, tokens, layers)
        last = layers - stages[-1].layer
        spans = [b.layer - a.layer for a, b in pairwise(stages)]
        assert abs(found - wanted) <= min([last, *spans, layers]) / layers + 1e-3
        counts = [stage.keep for stage in stages]
        assert counts == sorted(counts, reverse=True) and 0 <= counts[-1] <= counts[0] <= tokens
        assert [s.layer for s in stages] == sorted({s.layer for s in stages})


# ---------- contract over the table


def random_view(reducer: LayerPruner, tokens=20, seed=0, constant=False, dtype=torch.float32):
    """Two samples, the second with four tokens fewer; later stages have memories of earlier."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.arange(tokens) < torch.tensor([[tokens], [max(1, tokens - 4)]])
    rows = torch.rand(2, 4, 3, tokens, generator=generator)
    hidden = torch.randn(2, tokens, 6, generator=generator)
    text = torch.randn(2, 3, 6, generator=generator)
    vectors = [torch.randn(2, 4, tokens, 5, generator=generator) for _ in range(3)]
    if constant:
        vectors = [torch.ones_like(one) for one in vectors]
        rows, hidden, text = (torch.ones_like(one) for one in (rows, hidden, text))
    rows = rows * alive[:, None, None] / tokens
    stages = reducer.stages(tokens, 4)
    return view(
        rows,
        [stages[-1].keep, stages[-1].keep],
        alive=alive,
        hidden=hidden.to(dtype),
        layer=stages[-1].layer,
        stage=len(stages) - 1,
        plan=torch.tensor([[stage.keep for stage in stages]] * 2),
        text=text.to(dtype),
        text_valid=torch.ones(2, 3, dtype=torch.bool),
        queries=vectors[0],
        keys=vectors[1][:, :2],
        turned_keys=vectors[2][:, :2],
        memory={
            "raters": torch.tensor([[True, False, True]] * 2),
            "counts": torch.tensor([[5] * 3] * 2),
        },
    )


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contract(name, constant, dtype):
    reducer = ALL[name]
    for tokens in (1, 2, 20):
        given = random_view(reducer, tokens, constant=constant, dtype=dtype)
        given.keep = torch.minimum(given.keep, given.alive.sum(1))
        before = [None if one is None else one.clone() for one in (given.rows, given.hidden)]
        choice = reducer.select(given)
        assert choice.keep.dtype == torch.bool and choice.keep.shape == given.alive.shape
        assert not (choice.keep & ~given.alive).any()
        wanted = given.keep if name != "autoprune" else given.memory["counts"][:, given.stage]
        wanted = torch.minimum(wanted, given.alive.sum(1))
        if not reducer.exact:  # its number of clusters follows from the image
            assert (choice.keep.sum(1) <= wanted).all() and (choice.keep.sum(1) >= 1).all()
        else:
            assert choice.keep.sum(1).tolist() == wanted.tolist()
        again = reducer.select(random_view(reducer, tokens, constant=constant, dtype=dtype))
        assert torch.equal(choice.keep, again.keep)
        for one, other in zip(before, (given.rows, given.hidden), strict=True):
            assert one is None or torch.equal(one, other)
        if choice.states is not None:
            assert choice.states.dtype == given.hidden.dtype
            assert torch.isfinite(choice.states.float()).all()
            assert choice.states.shape == given.hidden.shape
        if choice.behind is not None:
            assert not (choice.behind & ~choice.keep).any()


@pytest.mark.parametrize("name", ALL)
def test_all_stay_where_all_may(name):
    given = random_view(ALL[name])
    given.keep = given.alive.sum(1)
    given.memory["counts"][:] = 20
    given.average = 20.0
    choice = ALL[name].select(given)
    assert torch.equal(choice.keep, given.alive)
    assert choice.states is None or torch.equal(choice.states, given.hidden)


@pytest.mark.parametrize("name", ALL)
def test_one_sample_is_chosen_as_in_a_batch(name):
    both = random_view(ALL[name], seed=3)
    choice = ALL[name].select(both)
    for row in range(2):
        alone = random_view(ALL[name], seed=3)
        for field in ("keep", "plan", "alive", "places", "full", "rows", "row_valid", "hidden",
                      "text", "text_valid", "queries", "keys", "turned_keys"):  # fmt: skip
            setattr(alone, field, getattr(both, field)[row : row + 1])
        alone.memory = {key: value[row : row + 1] for key, value in both.memory.items()}
        assert torch.equal(ALL[name].select(alone).keep[0], choice.keep[row])


def test_make_layer_pruner():
    assert make_layer_pruner("fastv", layer=3) == FastV(layer=3)
    assert make_layer_pruner("sparsevlm", version="v2").label == "sparsevlm v2"
    assert [r.positions for r in (SparseVLM("v1"), SparseVLM("v2"), PyramidDrop(), FastV())] == [
        "contiguous", "original", "contiguous", "original",
    ]  # fmt: skip
    assert SparseVLM("v1.5").merges and not SparseVLM("v2").merges
    with pytest.raises(ValueError, match="did you mean 'fastv'"):
        make_layer_pruner("fastvv")
    with pytest.raises(ValueError, match=r"no field 'layr', its fields are layer.*mean 'layer'"):
        make_layer_pruner("fastv", layr=2)
    with pytest.raises(ValueError, match=r"version must be .* got 'v3'"):
        SparseVLM("v3")
    with pytest.raises(ValueError, match="layer 0 has no layer below"):
        QuestionRows(0, source="previous")
    for bad in ({"ratio": 1.0}, {"ratio": -0.1}):
        with pytest.raises(ValueError, match="ratio must be in"):
            FastV(**bad)
    for bad in ({"ratio": 0.0}, {"layers": (8, 4)}, {"layers": ()}):
        with pytest.raises(ValueError, match="must be"):
            PyramidDrop(**bad)
    for name, cls in LAYER_PRUNERS.items():
        assert cls.name == name and bool(cls.paper) == (name != "question_rows")
        assert isinstance(cls.larger_model, bool)
        assert issubclass(cls, Reducer) and cls.needs == ()


# ---------- by hand


def clustered(distance, density, cutoff):
    """One sample's clusters, the same beside another that needs more rounds."""
    other = torch.stack([distance, distance.flip(0, 1)])
    densities = torch.stack([density, density.flip(0)])
    cutoffs = torch.tensor([cutoff, 0.01], dtype=torch.float64)
    both = clusters(other, densities, cutoffs)
    alone = clusters(distance[None], density[None], cutoffs[:1])
    assert torch.equal(both[:1], alone)
    return alone[0].tolist()


TWO_HEADS = [
    [[0.1, 0.5, 0.1, 0.0], [0.3, 0.0, 0.2, 0.1]],
    [[0.2, 0.0, 0.1, 0.6], [0.1, 0.0, 0.3, 0.1]],
]  # (H, R, M)


@pytest.mark.parametrize(
    ("reducer", "expected"),
    [
        # means .175 .125 .175 .2
        (FastV(), {1: [3], 2: [0, 3], 3: [0, 2, 3]}),
        (PyramidDrop(), {1: [3], 2: [0, 3], 3: [0, 2, 3]}),
        # largest .3 .5 .3 .6
        (QuestionRows(), {1: [3], 2: [1, 3], 3: [0, 1, 3]}),
        # mean over heads of the largest row: .25 .25 .25 .35
        (QuestionRows(heads="mean"), {1: [3], 2: [0, 3], 3: [0, 1, 3]}),
    ],
)
def test_rankings_by_hand(reducer, expected):
    for count, places in expected.items():
        assert kept(reducer.select(view(TWO_HEADS, count))) == places


def test_rows_that_are_not_there_do_not_count():
    valid = torch.tensor([[True, False]])
    given = view(TWO_HEADS, 2, row_valid=valid)
    assert QuestionRows().saliency(given)[0].tolist() == pytest.approx([0.2, 0.5, 0.1, 0.6])
    assert FastV().saliency(given)[0].tolist() == pytest.approx([0.15, 0.25, 0.1, 0.3])


def test_raters_by_hand():
    """Two words; the first resembles both visual tokens."""
    hidden = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    text = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    given = view(torch.zeros(1, 1, 3, 2), 1, hidden=hidden, text=text)
    given.text_valid = torch.tensor([[True, True, False]])
    assert raters(given).tolist() == [[True, False, False]]
    given.text = torch.ones(1, 3, 2)
    assert raters(given).tolist() == [[True, True, False]]  # none above the average: all rate


def test_sparsevlm_by_hand():
    given = view(TWO_HEADS, 1, memory={"raters": torch.tensor([[False, True]])})
    # second row only: heads .3 0 .2 .1 and .1 0 .3 .1
    assert SparseVLM("v1").scores(given)[0].tolist() == pytest.approx([0.2, 0.0, 0.25, 0.1])
    # v2 takes round(14/32 * 2) = 1 head, the first by its larger sum over the raters: .6 > .5
    assert SparseVLM("v2").scores(given)[0].tolist() == pytest.approx([0.3, 0.0, 0.2, 0.1])
    assert kept(SparseVLM("v2").select(given)) == [0]


def test_recycling_by_hand():
    assert [clusters_of(m) for m in (0, 1, 29, 30, 33, 276)] == [0, 1, 1, 2, 2, 9]
    assert kept_and_recycled(576, 300) == (291, 9)
    assert kept_and_recycled(10, 4) == (3, 1)
    assert kept_and_recycled(10, 10) == (10, 0) == kept_and_recycled(10, 12)
    assert kept_and_recycled(10, 1) == (1, 0)
    # ten dropped, the best 30 % + 1 are the first four: two pairs of neighbours
    states = torch.tensor([[0.0, 0.0], [0.0, 0.2], [5.0, 0.0], [5.0, 0.4], *[[99.0, 99.0]] * 6])
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, *range(6)])
    centres, means = recycle(states[None], scores[None], 2)
    assert centres.tolist() == [[0, 2]]
    torch.testing.assert_close(means[0], torch.tensor([[0.0, 0.1], [5.0, 0.2]]))


def test_recycled_tokens_go_behind():
    rows = torch.tensor([0.0, 0.9, 0.8, 0.1, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0]).expand(1, 1, -1)
    hidden = torch.arange(10.0)[None, :, None].expand(1, 10, 4)
    given = view(rows, 4, hidden=hidden, memory={"raters": torch.tensor([[True]])})
    choice = SparseVLM("v1").select(given)
    # kept 1, 2, 4; of seven dropped the best int(2.1) + 1 = 3 are 3, 0, 5: one cluster
    assert choice.keep.sum() == 4 and set(kept(choice)) > {1, 2, 4}
    (place,) = choice.behind[0].nonzero()[:, 0].tolist()
    assert place in (0, 3, 5)
    torch.testing.assert_close(choice.states[0, place], torch.full((4,), (3 + 0 + 5) / 3))
    torch.testing.assert_close(choice.states[0, 1], hidden[0, 1])


def test_mutual_information_by_hand():
    independent = torch.full((1, 1, 2, 2), 0.1)
    assert mutual_information(view(independent, 1)).item() == pytest.approx(0, abs=1e-6)
    diagonal = torch.eye(2)[None, None] * 0.3
    assert mutual_information(view(diagonal, 1)).item() == pytest.approx(math.log(2))
    both = torch.cat([diagonal, diagonal], 1)  # two heads
    assert mutual_information(view(both, 1)).item() == pytest.approx(2 * math.log(2))
    assert mutual_information(view(torch.zeros(1, 1, 2, 2), 1)).item() == 0


def test_autoprune_curves_differ_but_not_the_average():
    reducer = AutoPrune()
    base = reducer.stages(576, 32, 128)
    assert [stage.layer for stage in base] == list(range(2, 32))
    assert average_tokens(base, 576, 32) == 128
    # logistic: at x0 half of the plateau
    shares = [1 / (1 + math.exp(0.4 * (layer - 14.9))) for layer in range(2, 32)]
    assert base[13].keep / base[0].keep == pytest.approx(shares[13] / shares[0], abs=0.01)
    information = torch.tensor([0.0, 1.5, 50.0])
    curves = spend(reducer._weights(information, 2, 32), torch.tensor([2944] * 3),
                   torch.tensor([576] * 3))  # fmt: skip
    assert curves[0].tolist() == [stage.keep for stage in base]
    assert curves.sum(1).tolist() == [2944] * 3
    assert curves[0, 0] > curves[1, 0] and curves[0, -1] < curves[1, -1]
    assert set(curves[2].tolist()) == {98, 99}  # k would be negative: flat
    rows = torch.stack([torch.full((2, 2, 8), 0.1), torch.eye(2).repeat(1, 4).expand(2, 2, 8)])
    given = view(rows, 4, layer=1, plan=torch.tensor([[6, 4, 2]] * 2))
    reducer.select(given)
    counts = given.memory["counts"]
    assert counts.sum(1).tolist() == [12, 12] and counts[0].tolist() != counts[1].tolist()


def test_spending_by_hand():
    weights = torch.tensor([[4.0, 2.0, 1.0, 1.0]] * 4)
    total, most = torch.tensor([8, 16, 40, 7]), torch.tensor([10, 5, 10, 10])
    assert spend(weights, total, most).tolist() == [
        [4, 2, 1, 1],
        [5, 5, 3, 3],  # the first two full, 6 left for weights 1 and 1
        [10, 10, 10, 10],
        [3, 2, 1, 1],  # 3.5, 1.75, .875, .875: the three largest remainders get the rest
    ]


def test_pact_by_hand():
    # on a line; the far point makes .2 the densest. Its neighbour .1 joins it and is then no
    # rival to 0, which lies .2 away from the centre and becomes one itself
    points = torch.tensor([0.0, 0.1, 0.2, 1.0])
    distance = (points[:, None] - points[None]).abs()
    density = (-(distance / 2).square()).exp().sum(1)
    assert clustered(distance, density, 0.15) == [0, 2, 2, 3]
    assert clustered(distance, density, -1.0) == [0, 1, 2, 3]
    # 2 is denser than 0, yet not within .05 of anything: all are centres
    assert clustered(distance, density, 0.05) == [0, 1, 2, 3]
    # a chain: the middle takes both ends; what is free afterwards is clustered among itself
    chain = torch.tensor([0.0, 0.2, 0.4, 0.6, 0.8])
    far = (chain[:, None] - chain[None]).abs()
    assert clustered(far, torch.tensor([1.0, 2.0, 3.0, 2.5, 2.4]), 0.25) == [0, 2, 2, 2, 4]
    hidden = torch.tensor([[1.0], [2.0], [3.0], [10.0], [99.0]])
    apart = torch.tensor([0.0, 0.1, 0.2, 1.0, 0.3])
    all_apart = (apart[:, None] - apart[None]).abs()
    chosen = torch.tensor([0, 1, 3])  # 2 and 4 were pruned; only 2 is within .15 of a centre
    centre, found = means(
        *(hidden[None], all_apart[None], chosen[None], torch.tensor([[1, 1, 2]])),
        torch.tensor([0.15]),
    )
    assert centre.tolist() == [[False, True, False, True, False]]
    assert found[centre].tolist() == [[2.0], [10.0]]


def test_pact_meets_an_average_by_its_cutoff():
    reducer = PACT()
    given = random_view(reducer, 40, seed=1)
    own = reducer.select(given)
    given.average = 10.0
    for count in (1, 3, 7, 12, 22, 30):
        given.keep = torch.tensor([count, count])
        kept_now = reducer.select(given).keep.sum(1)
        assert (kept_now <= count).all() and (kept_now >= min(count, 22) * 0.6).all()
    assert own.keep.sum() <= 2 * 22
    with pytest.raises(ValueError, match="keep must be in"):
        PACT(keep=0)
    with pytest.raises(ValueError, match="at least 0"):
        PACT(cutoff=-1)


def test_btp_by_hand():
    # a 3 x 3 grid: the far corner (4 away), then all that is 2 away from both, lowest first
    assert spread_on_grid(9, 5) == (0, 8, 2, 4, 6)
    assert spread_on_grid(5, 2) == (0, 2)  # three to a row, the second not full
    assert spread_on_grid(1, 3) == (0,) and spread_on_grid(9, 0) == ()
    chosen = torch.tensor([True, False, False, False])
    states = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    # a second sample that lacks nothing stays as it is, and an empty one starts with token 0
    both = torch.stack([chosen, torch.tensor([False, True, True, True]), torch.zeros(4) > 0])
    fill_by_diversity(states.expand(3, -1, -1), both, 3)
    full = [True, False, True, True]
    assert both.tolist() == [full, [False, True, True, True], full]
    # all by attention (stage 3): of ceil(1.2 * 2) candidates 3, 0 the early ones come first
    rows = torch.tensor([0.2, 0.0, 0.3, 0.5]).expand(1, 1, -1)
    literal = BTP(layers=(1, 1, 2, 3), depth=None)
    assert kept(literal.select(view(rows, 2, layer=2, stage=1))) == [2, 3]
    rows = torch.tensor([0.2, 0.0, 0.5, 0.4, 0.3, 0.1]).expand(1, 1, -1)
    late = BTP(layers=(1, 2, 3, 3), depth=None)
    assert kept(late.select(view(rows, 0, layer=3, stage=2))) == []


def test_rebalancing_prefers_early_candidates():
    """Five of six candidates (1.2 times five): the four with an index below five, then the best."""
    saliency = torch.tensor([0.3, 0.31, 0.32, 0.33, 0.0, 0.5, 0.6, 0.0, 0.0, 0.0])
    (chosen,) = BTP()._choose(2, saliency[None], 5)
    assert chosen.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 6]
