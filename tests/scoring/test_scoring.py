from __future__ import annotations

import threading

import numpy as np
import pytest

from tprl_env.env.scorer import ScorerStats, ScoringError, check_scores
from tprl_env.scoring.cache import CachedScorer, ScoreCache


class Source:
    """Five samples of up to six tokens; sample 4 has only four."""

    max_tokens = 6

    def __len__(self):
        return 5

    def exists(self, samples):
        counts = np.where(np.asarray(samples) == 4, 4, 6)
        return np.arange(6)[None] < counts[:, None]

    def id(self, sample):
        return f"s{sample}"

    def full_scores(self, score_kind):
        return np.array([0.5, 0.6, 0.7, 0.8, 0.9], np.float32)


class Counting:
    """Scores a mask by its share of kept tokens, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, samples, keep):
        self.asked += [(int(s), row.tolist()) for s, row in zip(samples, keep, strict=True)]
        return keep.mean(1).astype(np.float32)


def masks(*rows):
    return np.array([[bit == "1" for bit in row] for row in rows])


def test_counters_are_exact():
    inner = Counting()
    scorer = CachedScorer(inner, Source(), "exact")
    keep = masks("110000", "110000", "111111", "100000", "110000")
    samples = np.array([0, 0, 1, 0, 3])
    scores = scorer(samples, keep)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [1 / 3, 1 / 3, 0.6, 1 / 6, 1 / 3])
    assert len(inner.asked) == 3
    np.testing.assert_allclose(scorer(samples, keep), scores)
    assert len(inner.asked) == 3
    stats = scorer.stats
    assert (stats.requests, stats.scores, stats.computed) == (2, 10, 3)
    assert (stats.duplicates, stats.cache_hits, stats.full_hits) == (2, 3, 2)
    assert stats.scores == stats.computed + stats.duplicates + stats.cache_hits + stats.full_hits


def test_padding_is_ignored_and_full_means_all_existing_tokens():
    inner = Counting()
    scorer = CachedScorer(inner, Source(), "exact")
    scores = scorer(np.array([4, 4, 4, 4]), masks("111100", "111111", "110011", "110000"))
    np.testing.assert_allclose(scores, [0.9, 0.9, 1 / 3, 1 / 3])
    assert inner.asked == [(4, [True, True, False, False, False, False])]


def test_a_plan_leaves_what_nobody_knows_and_finish_answers_everything():
    cache = ScoreCache(Source(), "exact")
    keep = masks("110000", "111111", "110000", "111111", "100011", "111111")
    plan = cache.plan(np.array([0, 1, 0, 1, 4, 2]), keep)
    assert plan.samples.tolist() == [0, 4]
    np.testing.assert_array_equal(plan.keep, masks("110000", "100000"))  # padding cleared
    np.testing.assert_array_equal(plan.packed, np.packbits(plan.keep, axis=1))
    assert cache.stats.requests == 0  # counts once it is answered
    scores = cache.finish(plan, np.array([0.25, 0.75], np.float32))
    np.testing.assert_allclose(scores, [0.25, 0.6, 0.25, 0.6, 0.75, 0.7])
    stats = cache.stats
    assert (stats.requests, stats.scores, stats.computed) == (1, 6, 2)
    assert (stats.duplicates, stats.cache_hits, stats.full_hits) == (1, 0, 3)  # full rows: hits
    again = cache.plan(np.array([4, 0]), masks("100000", "110001"))
    assert again.samples.tolist() == [0] and again.counted.cache_hits == 1


def test_two_requests_under_way_compute_their_common_mask_twice():
    cache, one = ScoreCache(Source(), "exact"), masks("100000")
    plans = [cache.plan(np.array([0]), one) for _ in range(2)]
    found = [cache.finish(plan, np.array([0.5], np.float32)).tolist() for plan in plans]
    assert found == [[0.5], [0.5]] and cache.stats.computed == 2


def test_stored_full_scores_are_checked():
    source = Source()
    source.full_scores = lambda score_kind: np.array([0.5, np.nan, 0.7, 0.8, 0.9])
    with pytest.raises(ScoringError, match=r"full_scores\('exact'\) returned nan for sample 's1'"):
        ScoreCache(source, "exact").plan(np.array([0, 1]), masks("111111", "111111"))


def test_cache_drops_the_least_recently_used():
    inner = Counting()
    scorer = CachedScorer(inner, Source(), "exact", cache_size=2)
    one, two, three = (masks(m) for m in ("100000", "010000", "001000"))
    zero = np.array([0])
    for mask in (one, two, one, three, one, two):
        scorer(zero, mask)
    assert [sum(row) for _, row in inner.asked] == [1, 1, 1, 1]
    assert scorer.stats.cache_hits == 2
    off = CachedScorer(Counting(), Source(), "exact", cache_size=0)
    off(zero, one)
    off(zero, one)
    assert off.stats.computed == 2


def test_empty_request_and_no_token_left():
    scorer = CachedScorer(Counting(), Source(), "exact")
    assert scorer(np.zeros(0, np.int64), np.zeros((0, 6), bool)).shape == (0,)
    assert scorer(np.array([2]), masks("000000")).tolist() == [0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 1.5])
def test_a_number_that_is_no_score_names_the_sample(bad):
    def inner(samples, keep):
        return np.where(samples == 3, bad, 0.5)

    scorer = CachedScorer(inner, Source(), "exact")
    with pytest.raises(ScoringError, match=r"inner returned .* for sample 's3' \(number 3\)"):
        scorer(np.array([0, 3]), masks("100000", "100000"))
    assert scorer(np.array([0]), masks("100000")).tolist() == [0.5]


def test_wrong_length_is_refused():
    scorer = CachedScorer(lambda samples, keep: np.zeros(1), Source(), "exact")
    with pytest.raises(ScoringError, match=r"shape \(1,\) for 2 samples \['s0', 's1'\]"):
        scorer(np.array([0, 1]), masks("100000", "100000"))


class OwnError(Exception):
    """Not derived from RuntimeError."""


def test_a_raising_scorer_names_samples_and_cause():
    def broken(samples, keep):
        raise OwnError("device lost")

    scorer = CachedScorer(broken, Source(), "exact")
    with pytest.raises(ScoringError, match=r"broken failed on \['s2'\]: OwnError: device lost"):
        scorer(np.array([2]), masks("100000"))


def test_interrupts_pass_through():
    def stopped(samples, keep):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CachedScorer(stopped, Source(), "exact")(np.array([2]), masks("100000"))


@pytest.mark.parametrize(
    ("samples", "keep", "message"),
    [
        (np.array([[0]]), masks("100000"), "1-D integer array"),
        (np.array([0.0]), masks("100000"), "1-D integer array"),
        (np.array([0]), masks("10000"), r"shape \(1, 6\)"),
        (np.array([0]), masks("100000").astype(int), "must be bool"),
        (np.array([5]), masks("100000"), r"lie in \[0, 5\), got 5..5"),
        (np.array([-1]), masks("100000"), r"lie in \[0, 5\)"),
    ],
)
def test_malformed_requests(samples, keep, message):
    with pytest.raises(ValueError, match=message):
        CachedScorer(Counting(), Source(), "exact")(samples, keep)


def test_negative_cache_size():
    with pytest.raises(ValueError, match="cache_size must be 0"):
        CachedScorer(Counting(), Source(), "exact", cache_size=-1)


def test_check_scores_forgives_rounding_only():
    checked = check_scores(np.array([1.0 + 5e-7, -5e-7, 1]), np.array([0, 1, 2]), Source())
    assert checked.tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(ScoringError):
        check_scores(np.array([1.001]), np.array([0]), Source())
    with pytest.raises(ScoringError):
        check_scores(np.array(["a"]), np.array([0]), Source())


def test_stats_add():
    total = ScorerStats(requests=1, busy_seconds=0.5).add(ScorerStats(requests=2, batches=3))
    assert total.as_dict()["requests"] == 3
    assert (total.batches, total.busy_seconds) == (3, 0.5)


def test_threads_lose_no_count():
    scorer = CachedScorer(Counting(), Source(), "exact", cache_size=8)
    rng = np.random.default_rng(0)
    requests = [(rng.integers(0, 5, 16), rng.random((16, 6)) < 0.5) for _ in range(40)]

    def work(part):
        for samples, keep in part:
            np.testing.assert_array_equal(
                scorer(samples, keep),
                CachedScorer(Counting(), Source(), "exact")(samples, keep),
            )

    threads = [threading.Thread(target=work, args=(requests[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stats = scorer.stats
    assert (stats.requests, stats.scores) == (40, 640)
    assert stats.scores == stats.computed + stats.duplicates + stats.cache_hits + stats.full_hits


def test_a_copied_cache_scores_the_same_from_an_empty_cache():
    import copy
    import pickle

    from tprl_env.data.features.toy import ToyScorer, ToyStore

    store = ToyStore(samples=4, tokens=9)
    scorer = CachedScorer(ToyScorer(store), store, "likelihood")
    samples, keep = np.arange(4), np.eye(4, 9, dtype=bool)
    expected = scorer(samples, keep)
    for twin in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        assert type(twin) is CachedScorer and twin.stats.computed == 0
        np.testing.assert_array_equal(twin(samples, keep), expected)
    cache = pickle.loads(pickle.dumps(ScoreCache(store, "likelihood", 3)))
    assert len(cache.plan(samples, keep).keys) == 4


class Layered(Counting):
    """Scores lives of four layers by their mean, a mask as lives of 0 and 4."""

    num_layers = 4

    def __call__(self, samples, keep):
        lives = keep if keep.dtype == np.uint8 else keep * np.uint8(4)
        return super().__call__(samples, lives / 4)


def test_lives_are_remembered_apart_and_masks_are_their_special_case():
    inner = Layered()
    scorer = CachedScorer(inner, Source(), "exact")
    keep = masks("110000", "110000", "111111", "101010")
    samples = np.array([0, 3, 1, 4])
    lives = keep * np.uint8(4)
    first = scorer(samples, keep)
    asked = len(inner.asked)
    np.testing.assert_array_equal(scorer(samples, lives), first)
    assert len(inner.asked) == asked == 3  # the same keys, and the stored score with all tokens
    lives[0, 0] = 1
    lives[3] = [4, 0, 2, 0, 3, 3]  # sample 4 has four tokens, the rest is padding
    second = scorer(samples, lives)
    np.testing.assert_array_equal(second[1:3], first[1:3])
    np.testing.assert_allclose(second[[0, 3]], [5 / 24, 6 / 24])
    assert len(inner.asked) == asked + 2
    np.testing.assert_array_equal(scorer(samples, lives), second)
    stats = scorer.stats
    assert (stats.scores, stats.computed, stats.cache_hits, stats.full_hits) == (16, 5, 7, 4)


def test_of_one_token_a_mask_and_its_life_differ():
    class One(Source):
        max_tokens = 1

        def exists(self, samples):
            return np.ones((len(samples), 1), bool)

    scorer = CachedScorer(Layered(), One(), "exact")
    sample = np.array([2])
    packed_like = np.array([[3]], np.uint8)
    assert scorer(sample, np.array([[False]]))[0] == 0
    assert scorer(sample, packed_like)[0] == np.float32(0.75)
    assert scorer(sample, np.array([[4]], np.uint8))[0] == np.float32(0.7)  # all tokens: stored


def test_lives_that_cannot_be_are_refused():
    lives = np.full((1, 6), 5, np.uint8)
    with pytest.raises(ValueError, match=r"lie in \[0, 4\].*got 5"):
        CachedScorer(Layered(), Source(), "exact")(np.array([0]), lives)
    with pytest.raises(ValueError, match="give a bool mask"):
        CachedScorer(Counting(), Source(), "exact")(np.array([0]), lives)
