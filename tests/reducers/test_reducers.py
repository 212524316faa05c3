"""Contracts of every reducer in the table, on a real tiny CLIP tower."""

import copy
import dataclasses

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from tprl_env.data.features.toy import ToyStore
from tprl_env.lvlm.loading.signals import TowerSignals
from tprl_env.reducers import (
    PRUNERS,
    REDUCERS,
    Merged,
    Merger,
    Pooled,
    PruneInputs,
    Pruner,
    ToMe,
    make_pruner,
    make_reducer,
    prune_inputs,
)

FIELDS = {"cdpruner": {"relevance": "query"}, "trim": {"relevance": "query"}}
ALL = {
    name: REDUCERS[name](**FIELDS.get(name, {}))  # question_rows: the form before the LLM
    for name, cls in REDUCERS.items()
    if issubclass(cls, (Pruner, Merger))  # before the LLM
}
ALL["tome, before the LLM"] = make_reducer("tome", where="before_llm")
ALL["cdpruner, clip"] = make_reducer("cdpruner")
ALL["trim, clip"] = make_reducer("trim")
ALL["scope, coverage alone"] = make_reducer("scope", alpha=0.0)
ALL["hiprune, anchors"] = make_reducer("hiprune", alpha=1.0)
ADAPTIVE = {name: make_reducer(name, adaptive=True) for name in ("prumerge", "prumerge_plus")}
ADAPTIVE["trim"] = make_reducer("trim", adaptive=True, relevance="query")


def tower(side, seed=0, eager=False, blocks=6):
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        image_size=8 * side,
        patch_size=8,
        initializer_factor=8.0,
    )
    model = CLIPVisionModel(config).eval().requires_grad_(False)
    model.set_attn_implementation("eager" if eager else "sdpa")
    return model


def signals(side=4, seed=0, constant=False, blocks=6):
    model = tower(side, seed, blocks=blocks)
    if constant:
        embeddings = getattr(model, "vision_model", model).embeddings
        embeddings.position_embedding.weight.zero_()
    shape = (1, 3, 8 * side, 8 * side)
    pixels = torch.zeros(shape) if constant else torch.randn(shape)
    projector = torch.nn.Linear(16, 6).requires_grad_(False)
    return TowerSignals(model, projector, pixels, [-2], True, -2)


def inputs(side=4, seed=0, constant=False):
    vision = signals(side, seed, constant)
    n = side * side
    features = vision.features()[1:]
    g = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.ones(shape) if constant else torch.rand(shape, generator=g)

    return PruneInputs(
        tokens=vision.project(features),
        tower=features,
        cls_attention=vision.block(-2).cls_attention().mean(0),
        grid=(side, side),
        query_tokens=torch.randn(3, 6, generator=g),
        relevance=some(n).round(),
        question_attention=some(n),
        question_rows=some(n),
        vision=vision,
        clip_image=some(n, 5),
        clip_text=some(2, 5),
        sample=seed,
    )


def reduce(method, one, budget):
    """Tokens and places, whatever the kind."""
    if isinstance(method, Merger):
        return method.merge(one, budget)
    keep = method.prune(one, budget)
    return Merged(one.tokens[keep], keep.nonzero()[:, 0])


def same(a, b):
    return torch.equal(a.tokens, b.tokens) and torch.equal(a.places, b.places)


@pytest.mark.parametrize("name", ALL)
def test_the_budget_is_met_and_the_result_is_sound(name):
    method = ALL[name]
    for one in (inputs(), inputs(side=1), inputs(side=3, seed=1), inputs(constant=True)):
        n = one.num_tokens
        before = {k: copy.deepcopy(v) for k, v in vars(one).items() if torch.is_tensor(v)}
        for budget in range(method.smallest, n + 1):
            got = reduce(method, one, budget)
            assert len(got.tokens) == len(got.places) <= n
            assert len(got.tokens) == budget or not method.exact
            assert got.tokens.isfinite().all() and got.tokens.dtype == torch.float32
            assert got.tokens.shape[1] == 6 and got.tokens.device == one.tokens.device
            assert 0 <= got.places.min() and got.places.max() < n
            if isinstance(method, Pruner) or method.order == "raster":
                assert (got.places.diff() > 0).all()
            assert same(got, reduce(method, one, budget)), "not deterministic"
        assert all(torch.equal(getattr(one, k), v) for k, v in before.items())


@pytest.mark.parametrize("name", [k for k, v in ALL.items() if isinstance(v, Merger)])
def test_batches_of_mergers_equal_single_images(name):
    several = [inputs(seed=i) for i in range(3)]
    batch = ALL[name].merge_batch(several, 6)
    assert all(same(a, ALL[name].merge(b, 6)) for a, b in zip(batch, several, strict=True))


@pytest.mark.parametrize("name", ["tome", "tome, before the LLM", "flowcut"])
def test_keeping_all_is_the_lvlms_own_tokens(name):
    one = inputs()
    got = ALL[name].merge(one, 16)
    torch.testing.assert_close(got.tokens, one.tokens, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.places, torch.arange(16))
    assert torch.equal(Pooled(window=1).merge(one, 16).tokens, one.tokens)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_methods_leave_what_the_image_asks_for(name):
    for one in (inputs(), inputs(side=2), inputs(constant=True)):
        a, b = ADAPTIVE[name].merge(one, 2), ADAPTIVE[name].merge(one, 3)
        assert same(a, b) and 1 <= len(a.tokens) <= one.num_tokens
    assert not ADAPTIVE[name].exact


@pytest.mark.parametrize("name", ALL)
def test_missing_fields_and_bad_budgets_are_named(name):
    method = ALL[name]
    for budget in (0, 17, 2.5, True):
        with pytest.raises(ValueError, match="budget must"):
            reduce(method, inputs(), budget)
    for need in method.required():
        bare = dataclasses.replace(inputs(), **{need: None})
        with pytest.raises(ValueError, match=f"{method.name}.* needs {need}"):
            reduce(method, bare, 3)


def test_what_needs_clips_text_tower_offers_its_substitute():
    bare = dataclasses.replace(inputs(), clip_image=None, clip_text=None)
    for name in ("cdpruner", "trim"):
        with pytest.raises(ValueError, match=r"lack CLIP's text tower; give .* relevance='query'"):
            reduce(make_reducer(name), bare, 4)
    with pytest.raises(ValueError, match="6 and 9 wide"):
        reduce(ALL["cdpruner"], dataclasses.replace(bare, query_tokens=torch.ones(2, 9)), 4)


def test_a_source_with_pictures_and_an_lvlm_fill_what_is_needed():
    asked = []

    def vision(picture):
        asked.append(picture.shape)
        return signals(side=6)

    store = ToyStore(samples=4)
    one = prune_inputs(store, 2, ALL["hiprune"].required(), vision)
    assert one.vision is not None and len(asked) == 1 and asked[0][2] == 3
    assert prune_inputs(store, 2, ("tokens",), vision).vision is None and len(asked) == 1
    with pytest.raises(ValueError, match=r"needs vision.*give prune_inputs vision=lvlm\.vision_"):
        ALL["hiprune"].prune(prune_inputs(store, 2, ALL["hiprune"].required()), 3)


def test_names_of_the_table_and_of_the_papers():
    assert all(cls.name == name for name, cls in REDUCERS.items())
    assert PRUNERS == {n: c for n, c in REDUCERS.items() if issubclass(c, Pruner)}
    with pytest.raises(ValueError, match=r"unknown reducer 'visonzip'.*did you mean 'visionzip'"):
        make_reducer("visonzip")
    with pytest.raises(ValueError, match="it is called 'cls_attention' here"):
        make_reducer("FasterVLM")
    with pytest.raises(ValueError, match=r"no field 'contextul'.*did you mean 'contextual'"):
        make_reducer("visionzip", contextul=3)
    with pytest.raises(ValueError, match=r"'tome' is no pruner.*make_reducer"):
        make_pruner("tome")
    with pytest.raises(ValueError, match="needs weights"):
        make_reducer("policy")
    for name, field, value in (
        ("tome", "where", "llm"),
        ("scope", "alpha", -1.0),
        ("hiprune", "alpha", 2.0),
        ("holov", "crops", 0),
        ("pooled", "window", 0),
        ("visionzip", "contextual", -1),
        ("prumerge", "neighbours", -1),
        ("trim", "relevance", "text"),
    ):
        with pytest.raises(ValueError, match=field):
            make_reducer(name, **{field: value})


def test_a_merger_that_breaks_the_contract_is_stopped():
    class Broken(Merger):
        name, knowledge = "broken", "heuristic"

        def merged(self, inputs, budget):
            return self.result

    method = Broken()
    tokens = torch.zeros(2, 6)
    for result, said in (
        (Merged(tokens, torch.tensor([0, 16])), "places from 0 to 16"),
        (Merged(tokens, torch.tensor([1, 0])), "out of order"),
        (Merged(tokens, torch.tensor([0.0, 1.0])), "float32"),
        (Merged(tokens[:1], torch.tensor([0])), "1 tokens for a budget of 2"),
        (Merged(tokens / 0, torch.tensor([0, 1])), "12 values that are not finite"),
    ):
        method.result = result
        with pytest.raises(ValueError, match=said):
            method.merge(inputs(), 2)


def test_permuting_the_tokens_permutes_the_choice():
    one, order = inputs(), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    moved = dataclasses.replace(
        one,
        tokens=one.tokens[order],
        tower=one.tower[order],
        cls_attention=one.cls_attention[order],
    )
    for name in ("cdpruner", "scope", "divprune", "cls_attention"):
        keep = ALL[name].prune(one, 5)
        assert torch.equal(ALL[name].prune(moved, 5), keep[order]), name


def test_scale_does_not_matter():
    one = inputs()
    louder = dataclasses.replace(
        one, tokens=4 * one.tokens, tower=4 * one.tower, cls_attention=4 * one.cls_attention
    )
    for name in ("cdpruner", "scope", "divprune", "cls_attention", "holov", "vispruner"):
        assert torch.equal(ALL[name].prune(louder, 5), ALL[name].prune(one, 5)), name


def test_zero_attention_and_ties():
    one = dataclasses.replace(inputs(), cls_attention=torch.zeros(16))
    for name in ("holov", "scope", "cls_attention"):
        assert int(ALL[name].prune(one, 7).sum()) == 7
    tied = dataclasses.replace(inputs(), cls_attention=torch.ones(16) / 16)
    assert ALL["cls_attention"].prune(tied, 3).nonzero()[:, 0].tolist() == [0, 1, 2]


def test_tome_says_what_a_shallow_tower_can_leave():
    shallow = dataclasses.replace(inputs(), vision=signals(blocks=2))  # one block is run
    assert len(ToMe().merge(shallow, 8).tokens) == 8
    with pytest.raises(ValueError, match="in 1 blocks can leave 8 to 16 of 16 tokens"):
        ToMe().merge(shallow, 7)
