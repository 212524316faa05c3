"""The toy source: deterministic, shaped like a store, and solvable only by reading the query."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import CATEGORIES, ToyScorer, ToyStore


def test_equal_arguments_give_equal_content_and_seeds_differ():
    numbers = np.arange(64)
    first, second, other = ToyStore(), ToyStore(), ToyStore(seed=1)
    assert first.fingerprint == second.fingerprint != other.fingerprint
    np.testing.assert_array_equal(first.codes(numbers), second.codes(numbers))
    assert not np.array_equal(first.codes(numbers), other.codes(numbers))


@pytest.mark.parametrize("vary", [False, True])
def test_shapes_and_padding(vary: bool):
    store = ToyStore(samples=20, tokens=12, width=6, seed=3, vary=vary)
    numbers = np.arange(20)
    exists, codes = store.exists(numbers), store.codes(numbers)
    tokens, exist = store.query_tokens(numbers)
    assert codes.shape == (20, 12, 6) and codes.dtype == np.float32
    assert exists.all() != vary and not codes[~exists].any()
    assert tokens.shape == (20, 3, 6) and exist.all()
    np.testing.assert_allclose(store.query(numbers), tokens.mean(1), atol=1e-6)
    for sample in range(20):
        rows, columns = store.grid(sample)
        assert rows * columns == exists[sample].sum() == len(store.tokens(sample))
        assert store.picture(sample).shape == (rows * 12, columns * 12, 3)
        assert store.question_type(sample) in store.question(sample)
        assert store.relevance(sample).sum() >= 1
    assert (store.full_scores("exact") == 1).all()


def test_spec_and_pickle_round_trip():
    store = ToyStore(samples=5, tokens=9, width=7, seed=2, vary=True)
    assert store.location == "toy:samples=5,tokens=9,width=7,seed=2,vary=1"
    for again in (open_source(store.location), pickle.loads(pickle.dumps(store))):
        assert again.fingerprint == store.fingerprint
        np.testing.assert_array_equal(again.codes([4]), store.codes([4]))
    assert len(open_source("toy")) == 64
    assert len(pickle.dumps(ToyStore(samples=5000))) < 300


@pytest.mark.parametrize("spec", ["toy:samples", "toy:size=3", "toy:samples=-3", "toys:samples=3"])
def test_unreadable_specs(spec: str):
    with pytest.raises(ValueError, match="toy source"):
        ToyStore.from_location(spec)


@pytest.mark.parametrize("field", [{"samples": 0}, {"tokens": 3}, {"width": 3}, {"seed": -1}])
def test_too_small_arguments(field: dict):
    with pytest.raises(ValueError, match="must be at least"):
        ToyStore(**field)


def test_score_is_the_kept_fraction_of_relevant_tokens():
    store = ToyStore(samples=32, vary=True)
    numbers = np.arange(32)
    scorer, relevant = ToyScorer(store), store.relevant(numbers)
    np.testing.assert_array_equal(scorer(numbers, store.exists(numbers)), np.ones(32))
    np.testing.assert_array_equal(scorer(numbers, relevant), np.ones(32))
    np.testing.assert_array_equal(scorer(numbers, ~relevant), np.zeros(32))
    sample = int(np.argmax(relevant.sum(1)))
    one = np.zeros((1, 16), bool)
    one[0, np.flatnonzero(relevant[sample])[0]] = True
    assert scorer(np.array([sample]), one)[0] == pytest.approx(1 / relevant[sample].sum())
    assert scorer.score_kind == "likelihood"


def test_scorer_refuses_other_shapes_and_metrics():
    with pytest.raises(ValueError, match=r"shape \(1, 3\), expected \(1, 16\)"):
        ToyScorer(ToyStore())(np.array([0]), np.ones((1, 3), bool))
    with pytest.raises(ValueError, match="got 'f1'"):
        ToyScorer(ToyStore(), "f1")  # type: ignore[arg-type]


def test_the_rule_needs_the_question():
    """Codes alone do not tell relevant tokens apart; codes against the query do."""
    store = ToyStore(samples=400)
    numbers = np.arange(400)
    codes, relevant = store.codes(numbers), store.relevant(numbers)
    asked = store.query(numbers)[:, : len(CATEGORIES)].argmax(1)
    found = codes[..., : len(CATEGORIES)].argmax(-1) == asked[:, None]
    assert (found == relevant).mean() > 0.99
    blind = codes.reshape(-1, codes.shape[-1])
    target = relevant.reshape(-1).astype(np.float32)
    weights = np.linalg.lstsq(np.c_[blind, np.ones(len(blind))], target, rcond=None)[0]
    explained = 1 - (target - np.c_[blind, np.ones(len(blind))] @ weights).var() / target.var()
    assert explained < 0.05


def test_channels_are_the_codes_alone():
    store = ToyStore(samples=4, tokens=9, vary=True)
    count = int(store.exists([2]).sum())
    assert store.has_channel("codes") and not store.has_channel("question_attention")
    np.testing.assert_array_equal(store.channel("codes", 2), store.codes([2])[0, :count])
    with pytest.raises(ValueError, match="no channel 'question_attention'; it holds 'codes' only"):
        store.channel("question_attention", 2)
