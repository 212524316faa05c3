"""The pool of scorer actors: same scores as a local scorer, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import ToyScorer
from tprl_env.env.scorer import ScoringError
from tprl_env.scoring.cache import CachedScorer

pytest.importorskip("ray")

import ray

from tprl_env.scoring.pool import ScorerPool
from tprl_env.scoring.routing import ActorState, Limits, Request, Router
from tprl_env.scoring.spec import ScorerSpec

SOURCE = "toy:samples=32,tokens=20,seed=3,vary=1"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    environment = {
        "env_vars": {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers")}
    }  # for rllib_fakes
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=environment,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool():
    started = ScorerPool.start(ScorerSpec(SOURCE, kind="toy", batch_size=16), 2, num_cpus=1)
    yield started
    started.close()


def fake(name: str, **options: object) -> ScorerSpec:
    return ScorerSpec(
        SOURCE, kind="import", factory=f"rllib_fakes:{name}", options=options, batch_size=8
    )


def request(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 32, rows), generator.random((rows, 20)) < 0.5


def local_scores(samples: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return ToyScorer(open_source(SOURCE))(samples, keep & open_source(SOURCE).exists(samples))


def test_pool_gives_the_scores_and_counters_of_a_local_cached_scorer(pool):
    source = open_source(SOURCE)
    local = CachedScorer(ToyScorer(source), source, "likelihood")
    client = ScorerPool.connect(pool.address.as_dict())
    samples, keep = request(100, 0)
    keep[:3] = True  # all tokens: answered from the source
    samples[10:14], keep[10:14] = samples[9], keep[9]  # five equal rows
    for _ in range(2):  # the second time everything is remembered
        np.testing.assert_array_equal(client(samples, keep), local(samples, keep))
    names = ("requests", "scores", "computed", "duplicates", "cache_hits", "full_hits")
    ours, theirs = client.counters(), local.stats.as_dict()
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert ours["batch_rows"] == ours["computed"] == 93
    assert ours["queue_depth"] == 0 and 0 < ours["batch_fill"] <= 1


def test_lives_travel_as_they_are_and_never_mix_with_masks(pool):
    """Scores and counters of a local scorer; masks under way at the same time stay masks."""
    from rllib_fakes import Layered

    started = ScorerPool.start(fake("layered"), 1, max_outstanding=12)
    try:
        source = open_source(SOURCE)
        local = CachedScorer(Layered(), source, "likelihood")
        samples, keep = request(6, 7)
        lives = np.random.default_rng(8).integers(0, 5, keep.shape).astype(np.uint8)
        # small requests wait while the first is scored, and are merged where they may be
        order = [
            (i, one) for first in (0, 3) for one in (keep, lives) for i in range(first, first + 3)
        ]
        asked = [(samples[i : i + 1], one[i : i + 1]) for i, one in order]
        asked.append((samples, keep.astype(np.uint8) * 4))  # a mask, known by then
        for pending, (numbers, wanted) in [(started.submit(*one), one) for one in asked[:-1]]:
            np.testing.assert_array_equal(pending.result(), local(numbers, wanted))
        np.testing.assert_array_equal(started(*asked[-1]), local(*asked[-1]))
        names = ("requests", "scores", "computed", "duplicates", "cache_hits", "full_hits")
        ours, theirs = started.counters(), local.stats.as_dict()
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
        assert ours["cache_hits"] == 6 and ours["computed"] == 12
        assert ours["batches"] < 12  # some were merged
    finally:
        started.close()
    with pytest.raises(ValueError, match="give a bool mask"):
        ScorerPool.connect(pool.address.as_dict()).submit(samples, lives)


def test_cache_forgets_the_oldest_mask(pool):
    client = ScorerPool.connect({**pool.address.as_dict(), "limits": {"cache_size": 2}})
    keep = np.eye(20, dtype=bool)[:3]
    samples = np.zeros(3, int)
    client(samples, keep)
    client(samples[:1], keep[:1])
    assert client.counters()["computed"] == 4
    client(samples[2:], keep[2:])
    assert client.counters()["cache_hits"] == 1


def test_a_malformed_request_is_refused(pool):
    with pytest.raises(ValueError, match=r"\(2, 20\)"):
        pool(np.zeros(2, int), np.ones((2, 19), bool))
    with pytest.raises(ValueError, match=r"\[0, 32\)"):
        pool(np.array([32]), np.ones((1, 20), bool))


def test_back_pressure_keeps_the_surplus_in_the_client():
    pool = ScorerPool.start(fake("slow", seconds=0.2), 2, num_cpus=1, max_outstanding=1)
    try:
        samples, keep = request(64, 1)
        start = time.monotonic()
        pending = pool.submit(samples, keep)
        assert time.monotonic() - start < 0.15  # submitting does not wait for scores
        router = pool._router
        assert [len(actor.outstanding) for actor in router.actors] == [1, 1]
        assert router.queue_depth > 2
        for _ in range(2):
            np.testing.assert_array_equal(pending.result(), local_scores(samples, keep))
        counters = pool.counters()
        assert counters["queue_depth"] == 0 and counters["requests"] == 1
    finally:
        pool.close()


def test_work_is_shared_equally_and_samples_stay_together(pool):
    samples, keep = np.repeat(np.arange(32), 4), request(128, 2)[1]
    client = ScorerPool.connect(pool.address.as_dict())
    request_ = client.cache.plan(samples, keep)
    chunks = client._router._cut(Request(request_.samples, request_.keep, request_.packed))
    work = [
        sum(chunk.work for chunk in chunks if chunk.preferred == preferred) for preferred in (0, 1)
    ]
    assert max(work) / sum(work) < 0.55
    preferred_actors = {}
    for chunk in chunks:
        for sample in chunk.samples:
            assert preferred_actors.setdefault(int(sample), chunk.preferred) == chunk.preferred


def test_all_questions_about_an_image_go_to_one_scorer():
    class Pictures:
        """Three questions about each image."""

        def image_number(self, sample: int) -> int:
            return sample // 3

    actors = [ActorState(f"scorer {n}", None) for n in range(4)]
    router = Router(actors, Pictures(), 16, Limits())
    samples = np.repeat(np.arange(48), 4)
    keep = np.ones((len(samples), 20), bool)
    chunks = router._cut(Request(samples, keep, np.packbits(keep, axis=1)))
    preferred_actors = {}
    for chunk in chunks:
        for sample in chunk.samples:
            assert preferred_actors.setdefault(int(sample) // 3, chunk.preferred) == chunk.preferred
    assert len(preferred_actors) == 16
    assert (
        sorted(preferred_actors[image] == image % 4 for image in preferred_actors) == [True] * 16
    )  # equal shares
    assert sum(len(chunk.samples) for chunk in chunks) == len(samples)


def test_too_few_resources_are_compared_with_the_cluster():
    spec = ScorerSpec(SOURCE, kind="toy")
    with pytest.raises(ScoringError, match=r"CPU: 60 requested, 4 in the cluster") as error:
        ScorerPool.start(spec, 2, num_cpus=30, start_timeout=3)
    assert "0 of 2" in str(error.value)


def test_a_scorer_that_cannot_be_built_says_why():
    with pytest.raises(ScoringError, match="FileNotFoundError: the weights are missing"):
        ScorerPool.start(fake("unbuildable"), 1, num_cpus=1)


def test_an_exception_names_sample_and_actor():
    pool = ScorerPool.start(fake("failing", sample=17), 1, num_cpus=1)
    try:
        keep = np.eye(32, 20, dtype=bool)
        with pytest.raises(ScoringError, match=r"tprl-scorer-.*'toy-17' \(number 17\): Arithm"):
            pool(np.arange(32), keep)
        assert "number 17" in pool.failure()  # the driver learns of it too
    finally:
        pool.close()


def test_a_score_outside_its_range_is_refused():
    pool = ScorerPool.start(fake("nonsense"), 1, num_cpus=1)
    try:
        with pytest.raises(ScoringError, match="nan"):
            pool(np.arange(4), np.eye(4, 20, dtype=bool))
    finally:
        pool.close()


def test_killing_an_actor_changes_no_score():
    pool = ScorerPool.start(fake("slow", seconds=0.05), 2, num_cpus=1)
    try:
        samples, keep = request(256, 5)
        pending = pool.submit(samples, keep)
        victim = pool.pids()[0]
        os.kill(victim, signal.SIGKILL)
        np.testing.assert_array_equal(pending.result(), local_scores(samples, keep))
        assert pool.counters()["retries"] >= 1
        assert pool.pids()[0] != victim
    finally:
        pool.close()


def test_a_request_that_kills_its_actors_ends_with_its_name(tmp_path: Path):
    log = tmp_path / "deaths"
    pool = ScorerPool.start(
        fake("poisonous", sample=6, log=str(log)), 1, num_cpus=1, max_crashes_per_row=2
    )
    try:
        with pytest.raises(ScoringError, match=r"'toy-6' \(number 6\): the request killed 2"):
            pool(np.arange(8), np.eye(8, 20, dtype=bool))
        assert [int(line) for line in log.read_text().split()] == [8, 8, 2, 1]
    finally:
        pool.close()
