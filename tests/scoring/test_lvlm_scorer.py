"""Batches, caches and refusals of the scorer that drives training."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from lvlm_fixtures import NUM_TOKENS, memory_store, save_llava

from tprl_env.checks import NotFiniteError
from tprl_env.env.scorer import ScoringError
from tprl_env.lvlm import load_lvlm
from tprl_env.scoring.cache import CachedScorer
from tprl_env.scoring.lvlm_scorer import LVLMScorer

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def word_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("word"), cls_attention_layer=-1)


@pytest.fixture(scope="module")
def word_lvlm(word_folder):
    return load_lvlm(word_folder, device="cpu")


def test_scorer_equals_the_lvlm_row_by_row(word_lvlm):
    store = memory_store(word_lvlm)
    rng = np.random.default_rng(0)
    samples = rng.integers(0, len(store), 60)
    keep = rng.random((60, NUM_TOKENS)) < rng.random((60, 1))
    scorer = LVLMScorer(word_lvlm, store, "likelihood", batch_size=8, batch_tokens=200)
    exact, likelihood = scorer.score_both(samples, keep)
    np.testing.assert_array_equal(scorer(samples, keep), likelihood)
    for row, sample in enumerate(samples):
        alone = word_lvlm.score(
            [store.prompts[sample]],
            [[tuple(a) for a in store.answers[sample]]],
            [store.tokens(sample)],
            [keep[row]],
        )
        assert exact[row] == alone.exact[0]
        assert likelihood[row] == pytest.approx(alone.likelihood[0], rel=1e-4)
    stats = scorer.stats
    assert (stats.requests, stats.scores, stats.computed) == (2, 120, 120)
    answers = sum(len(store.answers[s]) for s in samples)
    assert stats.batch_rows == 2 * answers
    assert stats.batches >= 2 * 60 / 8
    assert stats.busy_seconds > 0
    everything = scorer.score_both(np.arange(len(store)))
    full = scorer.score_both(np.arange(len(store)), store.exists(np.arange(len(store))))
    np.testing.assert_array_equal(everything, full)


def test_lives_where_a_scorer_is_asked(word_lvlm):
    """Of 0 and L they are the mask to the bit; others are what `score_inside` gives."""
    store, depth = memory_store(word_lvlm), word_lvlm.num_layers
    rng = np.random.default_rng(1)
    samples = rng.integers(0, len(store), 40)
    keep = rng.random((40, NUM_TOKENS)) < 0.5
    plain = LVLMScorer(word_lvlm, store, "likelihood")
    scorer = LVLMScorer(word_lvlm, store, "likelihood")
    lives = keep.astype(np.uint8) * depth
    np.testing.assert_array_equal(scorer(samples, lives), plain(samples, keep))
    assert scorer.stats.padded_tokens == plain.stats.padded_tokens
    lives[::2] = rng.integers(0, depth + 1, lives[::2].shape)
    mixed = scorer(samples, lives)
    inside = plain.score_inside(samples[::2], lives=lives[::2]).likelihood
    np.testing.assert_array_equal(mixed[::2], inside)
    np.testing.assert_allclose(mixed[1::2], plain(samples[1::2], keep[1::2]), rtol=1e-4)
    assert (mixed[::2] != plain(samples, keep)[::2]).any()
    cached = CachedScorer(scorer, store, "likelihood")
    partial = lives.copy()
    partial[partial.all(1), 0] = 1  # all tokens are answered from the store
    np.testing.assert_array_equal(cached(samples, partial), scorer(samples, partial))


def test_buckets_pad_less(word_lvlm):
    store = memory_store(word_lvlm)
    rng = np.random.default_rng(1)
    samples = rng.integers(0, len(store), 64)
    keep = rng.random((64, NUM_TOKENS)) < rng.random((64, 1))
    loose = LVLMScorer(word_lvlm, store, batch_size=64, batch_tokens=1 << 20, max_padding=1.0)
    tight = LVLMScorer(word_lvlm, store, batch_size=64, batch_tokens=1 << 20, max_padding=0.1)
    np.testing.assert_array_equal(loose(samples, keep), tight(samples, keep))
    assert loose.stats.batches == 1
    assert tight.stats.padded_tokens < loose.stats.padded_tokens / 2


def test_token_cache_stays_within_its_bound(word_lvlm):
    store = memory_store(word_lvlm)
    scorer = LVLMScorer(word_lvlm, store, token_cache_mb=0)
    samples = np.arange(len(store))
    keep = np.ones((len(store), NUM_TOKENS), bool)
    first = scorer(samples, keep)
    assert len(scorer._tokens) == 1
    np.testing.assert_array_equal(LVLMScorer(word_lvlm, store)(samples, keep), first)


def test_scorer_refuses_the_store_of_another_lvlm(word_lvlm):
    store = memory_store(word_lvlm)
    store.manifest.lvlm_fingerprint = "sha256:other"
    with pytest.raises(ValueError, match=r"another LVLM \(sha256:other\)"):
        LVLMScorer(word_lvlm, store)
    with pytest.raises(ValueError, match="score_kind must be one of exact, likelihood, got 'bleu'"):
        LVLMScorer(word_lvlm, memory_store(word_lvlm), "bleu")


def test_failures_inside_name_the_samples(word_lvlm):
    store = memory_store(word_lvlm)
    store.encoded[2] = store.encoded[2][:, :7]
    scorer = LVLMScorer(word_lvlm, store)
    keep = np.ones((2, NUM_TOKENS), bool)
    keep[:, 0] = False
    with pytest.raises(ScoringError, match=r"failed on \['sample-4', 'sample-5'\]: ValueError"):
        scorer(np.array([4, 5]), keep)
    store = memory_store(word_lvlm)
    store.encoded[1] = np.full_like(store.encoded[1], np.nan)
    cached = CachedScorer(LVLMScorer(word_lvlm, store, "likelihood"), store, "likelihood")
    with pytest.raises(ScoringError, match=r"'sample-3'\]: .*logits are not finite"):
        cached(np.array([0, 3]), keep)


@pytest.mark.parametrize("inside", [False, True])
def test_logits_that_are_not_finite_name_only_the_samples_that_have_them(word_lvlm, inside):
    store = memory_store(word_lvlm)
    store.encoded[1] = np.full_like(store.encoded[1], np.nan)
    guilty = [s for s in range(6) if store.image_number(s) == 1]
    assert 0 < len(guilty) < 6
    names = ", ".join(f"'sample-{s}'" for s in guilty)
    scorer = LVLMScorer(word_lvlm, store, max_padding=1.0)
    assert scorer.score_both(np.array([s for s in range(6) if s not in guilty]))[0].shape
    with pytest.raises(ScoringError, match=rf"failed on \[{names}\]: .*logits are not finite"):
        if inside:
            lives = store.exists(np.arange(6)).astype(np.uint8) * word_lvlm.num_layers
            scorer.score_inside(np.arange(6), lives=lives)
        else:
            scorer(np.arange(6), store.exists(np.arange(6)))


def test_the_error_keeps_its_rows_between_processes():
    error = pickle.loads(pickle.dumps(NotFiniteError("no", [2, 3])))
    assert str(error) == "no" and error.rows == (2, 3)
