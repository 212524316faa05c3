"""ScorerPool: Ray actors that score masks, with routing, back-pressure and bounded retries.

The pool follows what reinforcement learning on language models settled on: requests of sample
numbers and packed masks, the least loaded actor first, a cap of outstanding requests per actor, and
all masks of one sample preferably on one actor. Own actors instead of Ray Serve or
``ray.util.ActorPool``, because the first loses calls when a replica dies and the second shrinks.

Faults: an exception of the scorer stops the caller with a `ScoringError`. When an actor dies, Ray
restarts it and the pool sends the lost chunks again, each alone on its actor; a chunk that kills
its actor again is cut in four, until one row is left, and that row may kill ``max_crashes_per_row``
actors before the run stops with its name. Scoring is a pure function, so a retry changes nothing.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from tprl_env.data.features.store import open_source
from tprl_env.env.scorer import ScoringError
from tprl_env.ray_session import requested_and_available
from tprl_env.scoring.actor import ScorerActor
from tprl_env.scoring.cache import Plan, ScoreCache
from tprl_env.scoring.routing import ActorState, Limits, Request, Router, first_lines
from tprl_env.scoring.spec import PoolAddress, ScorerSpec

__all__ = ["PendingScores", "ScorerPool"]

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5


class PendingScores:
    """Scores on their way; `result` waits for them."""

    def __init__(self, pool: ScorerPool, plan: Plan) -> None:
        self._pool, self._plan = pool, plan
        self.request = Request(plan.samples, plan.keep, plan.packed, plan.lives)
        self._scores: npt.NDArray[np.float32] | None = None

    @property
    def done(self) -> bool:
        """Whether `result` returns, or raises, at once."""
        return self.request.done

    def result(self) -> npt.NDArray[np.float32]:
        """Scores float32 (B,) in [0, 1].

        Raises:
            ScoringError: If the scorer raised, answered nonsense, or its actors cannot be kept
                alive; the message names samples and actor.
        """
        if self._scores is not None:  # a plan is finished, and counted, once
            return self._scores
        while not self.request.done:
            self._pool.poll(_POLL_SECONDS)
        if self.request.error is not None:
            raise self.request.error
        self._scores = self._pool.cache.finish(self._plan, self.request.scores)
        return self._scores


class ScorerPool:
    """Client of running scorer actors; a `tprl_env.scoring.cache.Scorer` by itself.

    Make one with `start` (the owner) or `connect` (another process of the same job). One object
    serves one thread.

    Args:
        address: Names of the actors, what they score, and the client's `Limits`.
        handles: The actors' own handles if this object starts them; it then keeps them alive
            (a handle found by name does not) until `close`.

    Attributes:
        concurrent: True, `submit` returns before anything is scored.
    """

    concurrent = True

    def __init__(self, address: PoolAddress, *, handles: Sequence[Any] = ()) -> None:
        self.address, self._handles = address, list(handles)
        self.spec = ScorerSpec(**address.spec)
        self.score_kind = self.spec.score_kind
        limits = Limits(**address.limits)
        source = open_source(self.spec.source)
        self.cache = ScoreCache(source, self.score_kind, limits.cache_size)
        actors = [
            ActorState(name, ray.get_actor(name, namespace=address.namespace))
            for name in address.names
        ]
        self._router = Router(actors, source, self.spec.batch_size, limits)
        self._started = time.monotonic()

    @classmethod
    def start(
        cls,
        spec: ScorerSpec,
        num_actors: int = 2,
        *,
        num_cpus: float = 1.0,
        num_gpus: float = 0.0,
        resources: Mapping[str, float] | None = None,
        start_timeout: float = 600.0,
        **limits: Any,
    ) -> ScorerPool:
        """Start the actors and wait until every one has built its scorer.

        Args:
            spec: What each actor builds.
            num_actors: Number of actors.
            num_cpus: CPUs reserved by each; also its number of torch threads.
            num_gpus: GPUs reserved by each; a fraction shares one (Ray does not limit memory).
            resources: Custom resources reserved by each, such as ``{"scorer": 1}``.
            start_timeout: Seconds until the start is given up.
            **limits: Fields of `Limits`.

        Raises:
            ValueError: For counts out of range or an unknown limit.
            ScoringError: If an actor cannot build its scorer, or the cluster cannot place the
                actors in time.
        """
        if num_actors < 1:
            raise ValueError(f"a scorer pool needs at least 1 actor, got {num_actors}")
        known = {field.name for field in fields(Limits)}
        if set(limits) - known:
            raise ValueError(
                f"unknown limits {sorted(set(limits) - known)}, known: {sorted(known)}"
            )
        Limits(**limits)
        each: dict[str, Any] = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "resources": dict(resources or {}),
        }
        threads = max(1, int(num_cpus))
        options = each | {
            "max_restarts": -1,
            "max_task_retries": -1,  # health checks wait for a restart; `score` turns this off
            "max_concurrency": 1000,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        }
        remote = ray.remote(ScorerActor)
        stem = f"tprl-scorer-{uuid.uuid4().hex[:8]}"
        names = tuple(f"{stem}-{number}" for number in range(num_actors))
        tokens = open_source(spec.source).max_tokens
        handles = [
            remote.options(name=name, **options).remote(spec, tokens, threads) for name in names
        ]
        try:
            _wait_until_ready(handles, each, start_timeout)
        except ScoringError:
            for handle in handles:
                ray.kill(handle)
            raise
        namespace = ray.get_runtime_context().namespace
        return cls(PoolAddress(names, namespace, asdict(spec), dict(limits)), handles=handles)

    @classmethod
    def connect(cls, address: PoolAddress | Mapping[str, Any]) -> ScorerPool:
        """Use the actors that another process of the same Ray job has started."""
        if not isinstance(address, PoolAddress):
            address = PoolAddress(**{**address, "names": tuple(address["names"])})
        return cls(address)

    def __len__(self) -> int:
        """Number of actors."""
        return len(self._router.actors)

    def __call__(
        self, samples: npt.NDArray[np.int64], keep: npt.NDArray[Any]
    ) -> npt.NDArray[np.float32]:
        """Score and wait (the Scorer protocol).

        Args:
            samples: int64 (B,), sample numbers.
            keep: bool (B, N) masks, or uint8 (B, N) lives.

        Returns:
            float32 (B,) in [0, 1].

        Raises:
            ValueError: If the request is malformed.
            ScoringError: See `PendingScores.result`.
        """
        return self.submit(samples, keep).result()

    def submit(self, samples: npt.NDArray[np.int64], keep: npt.NDArray[Any]) -> PendingScores:
        """Send a request off and return at once; chunks beyond the caps wait in this process.

        Raises:
            ValueError: If the request is malformed.
        """
        if (
            np.asarray(keep).dtype == np.uint8 and self.cache.num_layers is None
        ):  # lives: L is the actors'
            handle = self._router.actors[0].handle
            self.cache.num_layers = ray.get(handle.num_layers.remote())
        pending = PendingScores(self, self.cache.plan(samples, keep))
        self._router.submit(pending.request)
        return pending

    def poll(self, timeout: float = 0.0) -> None:
        """Take answers in and send what waits; call it now and then while doing other work."""
        self._router.poll(timeout)

    def counters(self) -> dict[str, float]:
        """Numbers since the start of this client, for metrics.

        Returns:
            The `ScorerStats` (requests, scores, computed, duplicates, cache_hits, full_hits,
            batches, batch_rows, padded_tokens, busy_seconds) and ``batch_fill`` (mean rows of a
            pass over ``batch_size``), ``queue_depth`` and ``queue_peak`` (chunks), ``retries``,
            ``restarts`` (that this client has seen), ``actors``, ``busy_share`` (busy seconds over
            actors times wall seconds).
        """
        router = self._router
        table = self.cache.stats.add(router.stats).as_dict()
        wall = max(time.monotonic() - self._started, 1e-9)
        places = max(table["batches"], 1) * self.spec.batch_size
        return table | {
            "batch_fill": table["batch_rows"] / places,
            "queue_depth": router.queue_depth,
            "queue_peak": router.queue_peak,
            "retries": router.retries,
            "restarts": sum(actor.restarts for actor in router.actors),
            "actors": len(router.actors),
            "busy_share": table["busy_seconds"] / (wall * len(router.actors)),
        }

    def failure(self, timeout: float = 10.0) -> str:
        """The first failure that any client of this pool has met, empty if none.

        An actor that is being restarted is waited for, so one that refuses is gone for good; when
        all are gone, that itself is the failure.
        """
        refs = {actor.handle.failure.remote(): actor for actor in self._router.actors}
        ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout)
        messages, gone = [], []
        for ref in ready:
            try:
                messages.append(ray.get(ref))
            except ray.exceptions.RayError as error:
                gone.append(f"scorer actor {refs[ref].name}: {first_lines(error)}")
        for reason in gone:
            logger.warning("did not answer: %s", reason)
        if len(gone) == len(refs):
            return f"no scorer actor is left; {gone[0]}"
        return next(filter(None, messages), "")

    def pids(self) -> list[int]:
        """Process ids of the actors, in their order."""
        return list(ray.get([actor.handle.ready.remote() for actor in self._router.actors]))

    def close(self) -> None:
        """End the actors if this object started them."""
        for handle in self._handles:
            ray.kill(handle)
        self._handles = []


def _wait_until_ready(handles: list[Any], each: dict[str, Any], timeout: float) -> None:
    """Wait for every actor's scorer.

    Raises:
        ScoringError: If one cannot be built, or time runs out.
    """
    refs = [handle.ready.remote() for handle in handles]
    ready, waiting = ray.wait(refs, num_returns=len(refs), timeout=timeout)
    for ref in ready:
        try:
            ray.get(ref)
        except ray.exceptions.RayError as error:
            reason = first_lines(error)
            raise ScoringError(f"a scorer actor could not build its scorer: {reason}") from error
    if waiting:
        wanted = {"CPU": each["num_cpus"], "GPU": each["num_gpus"], **each["resources"]}
        wanted = {name: amount for name, amount in wanted.items() if amount}
        table = requested_and_available([wanted] * len(handles))
        raise ScoringError(
            f"{len(ready)} of {len(handles)} scorer actors were ready after {timeout:g} s; each "
            f"asks for {wanted} ({table}); lower resources.num_scorers or its resources, add "
            "nodes, or raise the start timeout if loading the LVLM takes longer"
        )
