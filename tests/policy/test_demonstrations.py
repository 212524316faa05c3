"""Demonstrations: nesting and budgets."""

import numpy as np
import pytest
import torch

from tprl_env.data.features.toy import ToyStore
from tprl_env.policy.demonstrations import (
    Demonstrations,
    SaliencyDemonstrator,
    _trajectory,
    log_uniform,
    nested_masks,
    pruner_budgets,
    saliency_demonstrator,
)
from tprl_env.reducers import (
    DivPrune,
    OraclePruner,
    UniformPruner,
    VisPruner,
    prune_inputs,
)


class Towers(ToyStore):
    """A toy store with a tower, two questions per picture and a question-attention channel."""

    def __init__(self, **fields):
        super().__init__(**fields)
        self.pruned = 0

    def image_number(self, sample):
        return int(sample) // 2

    def _features(self, sample, width):
        rng = np.random.default_rng(self.image_number(sample))
        return rng.normal(size=(int(self.exists([sample]).sum()), width)).astype(np.float32)

    def tower(self, sample):
        self.pruned += 1
        return self._features(sample, 6)

    def tokens(self, sample):
        return self._features(sample, 8).astype(np.float16)

    def cls_attention(self, sample):
        return np.exp(self._features(sample, 1)[:, 0])

    def has_channel(self, name):
        return name in ("codes", "question_attention")

    def channel(self, name, index):
        assert name == "question_attention"
        return np.random.default_rng(index).random(int(self.exists([index]).sum()))


def test_nested_masks_restricts_to_survivors():
    store = Towers(samples=6, tokens=16)
    d = nested_masks(store)
    assert len(d) == 12 and store.pruned == 3  # once per picture
    assert d.sample.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert d.step.tolist() == [0, 1] * 6 and set(d.budget.tolist()) == {8}
    assert d.alive.sum(1).tolist() == [16, 12] * 6 and d.keep.sum(1).tolist() == [12, 8] * 6
    assert np.array_equal(d.keep[0::2], d.alive[1::2])  # the next state is what was kept
    first = VisPruner().prune(prune_inputs(store, 4), 12).numpy()
    assert np.array_equal(d.keep[8], first)


def test_nested_masks_intersects():
    store = Towers(samples=4, tokens=16)
    d = nested_masks(store, (0.5, 0.25), nest="intersect", samples=[3])
    inputs = prune_inputs(store, 3)
    half, quarter = (VisPruner().prune(inputs, k).numpy() for k in (8, 4))
    assert np.array_equal(d.keep[0], half) and np.array_equal(d.keep[1], half & quarter)


def test_nested_masks_with_padding_and_errors():
    store = Towers(samples=6, tokens=16, vary=True)
    rows = [0, 2, 4]
    d = nested_masks(store, samples=rows)
    assert np.array_equal(d.alive[0::2], store.exists(rows))
    assert d.keep[1::2].sum(1).tolist() == [
        round(0.5 * n) for n in store.exists(rows).sum(1).tolist()
    ]
    for rates in ((), (0.5, 0.75), (0.5, 0.5), (1.2, 0.5), (0.5, 0.0)):
        with pytest.raises(ValueError, match="rates must fall"):
            nested_masks(store, rates)
    with pytest.raises(
        ValueError, match="nest must be one of 'restrict', 'intersect', got 'union'"
    ):
        nested_masks(store, nest="union")
    with pytest.raises(ValueError, match="needs tower, cls_attention"):
        nested_masks(ToyStore(samples=2))


@pytest.mark.parametrize("pruner", [VisPruner(), DivPrune()])
def test_any_pruner_demonstrates_at_drawn_budgets(pruner):
    store = Towers(samples=30, tokens=16, vary=True)
    d = pruner_budgets(store, pruner, 2, 12, seed=3)
    assert np.array_equal(d.keep, pruner_budgets(store, pruner, 2, 12, seed=3).keep)
    totals = store.exists(np.arange(30)).sum(1)
    assert np.array_equal(d.keep.sum(1), d.budget) and (d.budget <= totals).all()
    assert len(set(d.budget.tolist())) > 4 and set(d.step.tolist()) == {0}
    inputs = prune_inputs(store, 7)
    alone = pruner.prune(inputs, int(d.budget[7])).numpy()
    assert np.array_equal(d.keep[7, : len(alone)], alone)
    with pytest.raises(ValueError, match="1 <= low <= high <= 16, got 0, 4"):
        pruner_budgets(store, pruner, 0, 4, seed=0)


@pytest.mark.parametrize("saliency", ["question_attention", OraclePruner()])
def test_demonstrated_masks_are_the_top_k_of_the_saliency(saliency):
    store = Towers(samples=50, tokens=16, vary=True)
    demonstrator = saliency_demonstrator(store, saliency, 2, 8)
    d = demonstrator.at(np.arange(50), log_uniform(np.random.default_rng(1), (2, 8), 50))
    assert np.array_equal(d.alive, store.exists(range(50)))
    assert np.array_equal(d.keep.sum(1), d.budget) and not d.step.any()
    assert d.budget.min() == 2 and d.budget.max() == 8
    if saliency == "question_attention":
        values = store.channel(saliency, 7)
        assert set(np.flatnonzero(d.keep[7])) == set(np.argsort(-values)[: d.budget[7]])
    else:
        mask = saliency.prune(prune_inputs(store, 7), int(d.budget[7])).numpy()
        assert np.array_equal(d.keep[7][: len(mask)], mask)


def test_budgets_are_log_uniform():
    demonstrator = SaliencyDemonstrator(
        np.arange(4), np.random.default_rng(0).random((4, 16)).astype(np.float32), 1, 3
    )
    budgets = demonstrator.draw(np.random.default_rng(0), 20_000).budget
    share = [np.mean(budgets == k) for k in (1, 2, 3)]
    wanted = [np.log((k + 1) / k) / np.log(4) for k in (1, 2, 3)]  # .5, .2925, .2075
    assert np.allclose(share, wanted, atol=0.015)


def test_demonstrator_errors():
    store = ToyStore(samples=4, tokens=16)
    with pytest.raises(ValueError, match="has no channel 'question_attention'"):
        saliency_demonstrator(store, "question_attention", 1, 4)
    for low, high in ((0, 4), (5, 4), (1, 17)):
        with pytest.raises(ValueError, match="1 <= low <= high <= 16"):
            saliency_demonstrator(store, OraclePruner(), low, high)
    with pytest.raises(ValueError, match="NaN"):
        SaliencyDemonstrator(np.arange(1), np.full((1, 3), np.nan, np.float32), 1, 2)
    with pytest.raises(ValueError, match="at least one"):
        saliency_demonstrator(store, OraclePruner(), 1, 4, samples=[])


def test_rows_that_do_not_belong_together_are_refused():
    one, mask = np.zeros(2, np.int64), np.ones((2, 4), np.bool_)
    Demonstrations(one, mask, mask, one, one)
    with pytest.raises(ValueError, match=r"budget of int64\(2,\)"):
        Demonstrations(one, mask, mask, one[:1], one)
    with pytest.raises(ValueError, match="keep alive tokens only"):
        Demonstrations(one, ~mask, mask, one, one)
    assert torch.from_numpy(mask).dtype == torch.bool


def test_a_pruner_of_whole_images_cannot_be_restricted_to_survivors():
    store = ToyStore(samples=2)
    one = prune_inputs(store, 0)
    with pytest.raises(ValueError, match=r"'uniform' needs grid.*use nest='intersect'"):
        _trajectory(UniformPruner(), one, [3, 2], "restrict")
    masks = _trajectory(UniformPruner(), one, [5, 3], "intersect")
    assert masks[0].all() and masks[1].sum() == 5
