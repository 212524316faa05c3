"""Routing of requests to scorer actors, back-pressure, and retries after an actor dies.

One `Router` belongs to one client of the pool. A request is cut into chunks; a chunk travels to one
actor. See `tprl_env.scoring.pool` for the rules in words.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from tprl_env.data.features.source import TokenSource
from tprl_env.env.scorer import ScorerStats, ScoringError, check_scores
from tprl_env.scoring.actor import ScoreReply

__all__ = ["ActorState", "Limits", "Request", "Router", "first_lines"]

logger = logging.getLogger(__name__)

_PROMPT_WORK = 32  # work of a row without visual tokens, in tokens: the question and the answer
_SPLIT = 4


@dataclass(frozen=True)
class Limits:
    """Bounds of one client.

    Attributes:
        max_outstanding: Chunks per actor under way at once; the rest waits in the client.
        max_crashes_per_row: Actor processes that a single row may kill.
        restart_timeout: Seconds without any usable actor after which waiting ends.
        cache_size: Masks that the client remembers.
    """

    max_outstanding: int = 4
    max_crashes_per_row: int = 3
    restart_timeout: float = 300.0
    cache_size: int = 200_000

    def __post_init__(self) -> None:
        """Refuse bounds that would stop everything."""
        for name in ("max_outstanding", "max_crashes_per_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.restart_timeout <= 0:
            raise ValueError(f"restart_timeout must be positive, got {self.restart_timeout}")


class Request:
    """Rows to be scored and the scores that have arrived.

    Args:
        samples: int64 (M,), sample numbers.
        keep: bool (M, N), masks.
        packed: uint8 (M, ceil(N / 8)), `numpy.packbits` of the masks, which is what travels.
        lives: uint8 (M, N), which travels instead where masks do not say it all.
    """

    def __init__(
        self,
        samples: npt.NDArray[np.int64],
        keep: npt.NDArray[np.bool_],
        packed: npt.NDArray[np.uint8],
        lives: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        self.samples, self.packed = samples, packed if lives is None else lives
        self.kind = () if lives is None else (True,)  # masks travel as they did before lives
        self.work = keep.sum(axis=1) + _PROMPT_WORK
        self.scores = np.full(len(samples), np.nan, np.float32)
        self.left = len(samples)
        self.error: ScoringError | None = None

    @property
    def done(self) -> bool:
        """Whether all scores are there, or never will be."""
        return self.left == 0 or self.error is not None


@dataclass(eq=False)
class _Chunk:
    """Rows of one request that travel together to one actor."""

    request: Request
    places: npt.NDArray[np.int64]
    preferred: int
    alone: bool = False
    kills: int = 0

    @property
    def samples(self) -> npt.NDArray[np.int64]:
        """Sample numbers of the rows."""
        return self.request.samples[self.places]

    @property
    def work(self) -> int:
        """Estimated work in tokens."""
        return int(self.request.work[self.places].sum())


@dataclass(eq=False)
class ActorState:
    """One actor as a client sees it."""

    name: str
    handle: Any
    outstanding: dict[Any, _Chunk] = field(default_factory=dict)
    work: int = 0
    ping: Any = None  # reference of a health check while the actor is down
    down_since: float = 0.0
    lost: str = ""  # why the actor will not come back
    restarts: int = 0

    @property
    def usable(self) -> bool:
        """Whether chunks may be sent to it."""
        return self.ping is None and not self.lost


class Router:
    """Sends chunks to actors and takes the answers in; one client, one thread.

    Args:
        actors: The pool's actors.
        source: Names the samples in errors.
        batch_size: Most rows of a chunk.
        limits: Bounds.

    Attributes:
        stats: What the actors report of their passes, summed.
    """

    def __init__(
        self,
        actors: list[ActorState],
        source: TokenSource,
        batch_size: int,
        limits: Limits,
    ) -> None:
        self.actors, self.stats = actors, ScorerStats()
        self._source, self._batch_size, self._limits = source, batch_size, limits
        self._waiting: deque[_Chunk] = deque()
        self.retries = 0
        self.queue_peak = 0

    def submit(self, request: Request) -> None:
        """Send a request off and return at once; chunks beyond the caps wait here."""
        self._waiting.extend(self._cut(request))
        self.poll(0.0)

    def _cut(self, request: Request) -> list[_Chunk]:
        """Share a request out: an image's rows to its preferred actor, equal work, by length.

        All draws of a group, and all questions about one image, meet where its tokens are in memory
        already, unless that actor would get more than its share.
        """
        samples, work = request.samples, request.work
        if not len(samples):
            return []
        load = np.array([float(actor.work) for actor in self.actors])
        load[[bool(actor.lost) for actor in self.actors]] = np.inf
        if not np.isfinite(load).any():
            load[:] = 0.0  # no actor is left; `poll` raises
        usable = np.isfinite(load)
        share = (load[usable].sum() + work.sum()) / usable.sum()
        distinct, inverse = np.unique(samples, return_inverse=True)
        images = np.array([self._source.image_number(int(sample)) for sample in distinct], np.int64)
        groups, inverse = np.unique(images[inverse], return_inverse=True)
        group_work = np.bincount(inverse, work)
        target = np.empty(len(groups), np.int64)
        for group in np.argsort(-group_work, kind="stable"):
            preferred = int(groups[group]) % len(load)
            if load[preferred] + group_work[group] > share * 1.05:
                preferred = int(np.argmin(load))
            target[group] = preferred
            load[preferred] += group_work[group]
        chunks = []
        for preferred in np.unique(target):
            rows = np.flatnonzero(target[inverse] == preferred)
            rows = rows[np.argsort(work[rows], kind="stable")]
            count = -(-len(rows) // self._batch_size)
            chunks += [
                _Chunk(request, part, int(preferred)) for part in np.array_split(rows, count)
            ]
        return chunks

    def poll(self, timeout: float = 0.0) -> None:
        """Take in answers, restart what died, send what waits.

        Args:
            timeout: Seconds to wait for the next event, 0 for none.
        """
        self._dispatch()
        owners = {ref: actor for actor in self.actors for ref in actor.outstanding}
        owners |= {actor.ping: actor for actor in self.actors if actor.ping is not None}
        if owners:
            refs = list(owners)
            ready, _ = ray.wait(refs, num_returns=1, timeout=timeout)
            if len(refs) > 1:
                ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            for ref in ready:
                self._receive(owners[ref], ref)
            self._dispatch()
        self._check_alive()

    def _dispatch(self) -> None:
        """Send waiting chunks, preferred actor first, then the least loaded one below its cap."""
        deferred: list[_Chunk] = []
        while self._waiting:
            chunk = self._waiting.popleft()
            if chunk.request.error is not None:
                continue
            actor = self._choose(chunk)
            if actor is None:
                deferred.append(chunk)
                if not chunk.alone:
                    break  # every actor is full
                continue
            packed = chunk.request.packed[chunk.places]
            # No retry by Ray: it would hide how often a request has killed its actor.
            ref = actor.handle.score.options(max_task_retries=0).remote(
                chunk.samples, packed, chunk.alone, *chunk.request.kind
            )
            actor.outstanding[ref] = chunk
            actor.work += chunk.work
        self._waiting.extendleft(reversed(deferred))
        self.queue_peak = max(self.queue_peak, self.queue_depth)

    def _choose(self, chunk: _Chunk) -> ActorState | None:
        """The preferred actor, else the least loaded one, that takes the chunk now."""
        preferred = self.actors[chunk.preferred]
        if self._takes(preferred, chunk):  # nearly always, so the others are not looked at
            return preferred
        free = [actor for actor in self.actors if self._takes(actor, chunk)]
        return min(free, key=lambda actor: actor.work, default=None)

    def _takes(self, actor: ActorState, chunk: _Chunk) -> bool:
        """Whether an actor is below its cap; near a crash a chunk shares it with no other."""
        most = 1 if chunk.alone else self._limits.max_outstanding
        under_way = actor.outstanding.values()
        if not actor.usable or len(under_way) >= most:
            return False
        return not any(other.alone for other in under_way)

    def _receive(self, actor: ActorState, ref: Any) -> None:
        """One event of one actor: a reply, a death, or the end of a restart."""
        if ref is actor.ping:
            try:
                ray.get(ref)
            except ray.exceptions.RayError as error:
                actor.lost = first_lines(error)
                logger.error("scorer actor %s is gone for good: %s", actor.name, actor.lost)
            else:
                actor.restarts += 1
            actor.ping = None
            return
        chunk = actor.outstanding.pop(ref)
        actor.work -= chunk.work
        try:
            reply: ScoreReply = ray.get(ref)
        except ray.exceptions.RayTaskError as error:  # a fault of ScorerActor itself
            self._fail(chunk, actor, first_lines(error), chunk.samples)
        except ray.exceptions.RayError as error:
            self._retry(chunk, actor, error)
        else:
            self._accept(chunk, actor, reply)

    def _accept(self, chunk: _Chunk, actor: ActorState, reply: ScoreReply) -> None:
        stats = self.stats
        for name, value in reply.work.items():
            kind = type(getattr(stats, name))
            setattr(stats, name, getattr(stats, name) + kind(value))
        if reply.scores is None:
            guilty = np.asarray(reply.guilty, np.int64)
            self._fail(chunk, actor, reply.error, guilty, reply.pid, reply.trace)
            return
        try:
            scores = check_scores(
                reply.scores, chunk.samples, self._source, scorer=f"scorer actor {actor.name}"
            )
        except ScoringError as error:
            self._fail(chunk, actor, str(error), chunk.samples, reply.pid)
            return
        chunk.request.scores[chunk.places] = scores
        chunk.request.left -= len(chunk.places)

    def _retry(self, chunk: _Chunk, actor: ActorState, error: ray.exceptions.RayError) -> None:
        """A request whose actor died: again, alone; smaller after a second death."""
        if actor.ping is None and not actor.lost:
            actor.ping, actor.down_since = actor.handle.ready.remote(), time.monotonic()
            logger.warning("scorer actor %s died: %s", actor.name, first_lines(error))
        if chunk.request.error is not None:
            return
        chunk.kills += 1
        self.retries += 1
        rows = len(chunk.places)
        if rows == 1 and chunk.kills >= self._limits.max_crashes_per_row:
            reason = (
                f"the request killed {chunk.kills} scorer processes, the last time with: "
                f"{first_lines(error)}"
            )
            self._fail(chunk, actor, reason, chunk.samples)
        elif chunk.alone and rows > 1:
            for part in np.array_split(chunk.places, min(_SPLIT, rows)):
                self._waiting.appendleft(_Chunk(chunk.request, part, chunk.preferred, True, 1))
        else:
            chunk.alone = True
            self._waiting.appendleft(chunk)

    def _fail(
        self,
        chunk: _Chunk,
        actor: ActorState,
        reason: str,
        samples: npt.NDArray[np.int64],
        pid: int = 0,
        trace: str = "",
    ) -> None:
        """End a request with an error that names samples and actor; tell the other processes."""
        names = ", ".join(f"{self._source.id(int(s))!r} (number {s})" for s in samples[:4])
        more = f" and {len(samples) - 4} more" if len(samples) > 4 else ""
        process = f" (process {pid})" if pid else ""
        message = f"scorer actor {actor.name}{process} failed on sample {names}{more}: {reason}"
        error = ScoringError(message)
        if trace:
            error.add_note(f"in the scorer actor:\n{trace}")
        chunk.request.error = error
        alive = [other for other in self.actors if other.usable]
        if alive:
            ray.wait([alive[0].handle.report_failure.remote(message)], timeout=5)

    def _check_alive(self) -> None:
        """Give up when chunks wait and no actor has been usable for too long."""
        if not self._waiting or any(actor.usable for actor in self.actors):
            return
        away = min(time.monotonic() - (actor.down_since or 0.0) for actor in self.actors)
        lost = all(actor.lost for actor in self.actors)
        if not lost and away < self._limits.restart_timeout:
            return
        reason = self.actors[0].lost if lost else f"none came back within {away:.0f} s"
        while self._waiting:
            chunk = self._waiting.popleft()
            self._fail(
                chunk, self.actors[chunk.preferred], f"no actor left: {reason}", chunk.samples
            )

    @property
    def queue_depth(self) -> int:
        """Pieces waiting or under way, from this client."""
        return len(self._waiting) + sum(len(actor.outstanding) for actor in self.actors)


def first_lines(error: BaseException) -> str:
    """What a Ray error says, without its pages of traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
