"""The actor that holds one scorer: micro-batches requests, and says which sample failed.

The event loop only queues; the scorer runs in one thread of its own, so health checks are answered
while a forward pass is under way. Requests that arrive meanwhile are merged into the next pass.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.scoring.spec import ScorerSpec

__all__ = ["ScoreReply", "ScorerActor"]

_COUNTED = ("batches", "batch_rows", "padded_tokens")


@dataclass(frozen=True)
class ScoreReply:
    """Answer to one request.

    Attributes:
        scores: float32 (b,), None if the scorer failed.
        pid: Process of the actor; changes with a restart.
        work: Seconds busy and counters of the forward passes, to be summed.
        error: ``"Type: message"`` of the scorer's exception, else empty.
        guilty: Sample numbers of the smallest part of the request that fails on its own.
        trace: Traceback of the exception.
    """

    scores: npt.NDArray[np.float32] | None
    pid: int
    work: dict[str, float] = field(default_factory=dict)
    error: str = ""
    guilty: tuple[int, ...] = ()
    trace: str = ""


@dataclass
class _Request:
    samples: npt.NDArray[np.int64]
    keep: npt.NDArray[Any]  # bool masks or uint8 lives
    alone: bool
    reply: asyncio.Future[ScoreReply]


class ScorerActor:
    """Ray actor class (made remote by `ScorerPool`): builds a scorer and answers requests.

    Args:
        spec: What to build.
        max_tokens: N, needed to unpack the masks.
        threads: torch threads of the scorer.
    """

    def __init__(self, spec: ScorerSpec, max_tokens: int, threads: int) -> None:
        self._spec, self._max_tokens, self._threads = spec, max_tokens, threads
        self._executor = ThreadPoolExecutor(max_workers=1)
        # Built in the scoring thread: OpenMP keeps the number of threads per thread.
        self._scorer = self._executor.submit(self._build).result()
        self._queue: asyncio.Queue[_Request] | None = None
        self._worker: asyncio.Task[None] | None = None
        self._failure = ""

    def _build(self) -> Callable[..., Any]:
        scorer = self._spec.build()
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(self._threads)
        return scorer

    async def ready(self) -> int:
        """Process id, once the scorer is built."""
        return os.getpid()

    async def num_layers(self) -> int | None:
        """Decoder layers of the scorer's LVLM, None where it has none and takes no lives."""
        return getattr(self._scorer, "num_layers", None)

    async def report_failure(self, message: str) -> None:
        """Remember why scoring failed, for the driver; the first message wins."""
        self._failure = self._failure or message

    async def failure(self) -> str:
        """What `report_failure` was told, or an empty string."""
        return self._failure

    async def score(
        self,
        samples: npt.NDArray[np.int64],
        packed: npt.NDArray[np.uint8],
        alone: bool = False,
        lives: bool = False,
    ) -> ScoreReply:
        """Score masks or lives.

        Args:
            samples: int64 (b,), sample numbers.
            packed: uint8 (b, ceil(N / 8)), `numpy.packbits` of the masks.
            alone: Never merge this request with others (after it was near a crash).
            lives: ``packed`` is uint8 (b, N), decoder layers that each token enters.

        Returns:
            The scores, or what went wrong; an exception of the scorer never escapes as such, so
            that Ray's own errors always mean that the actor died.
        """
        if self._queue is None:
            self._queue = asyncio.Queue()
            self._worker = asyncio.get_running_loop().create_task(self._serve(self._queue))
        keep: npt.NDArray[Any] = packed
        if not lives:
            keep = np.unpackbits(packed, axis=1, count=self._max_tokens).astype(bool)
        reply: asyncio.Future[ScoreReply] = asyncio.get_running_loop().create_future()
        await self._queue.put(_Request(samples, keep, alone, reply))
        return await reply

    async def _serve(self, queue: asyncio.Queue[_Request]) -> None:
        """Serving loop: merge waiting requests, score them, answer."""
        held: _Request | None = None
        while True:
            first = held or await queue.get()
            held, group, rows = None, [first], len(first.samples)
            while not first.alone and rows < self._spec.batch_size and not queue.empty():
                following = queue.get_nowait()
                # masks and lives must not meet in one array, where True would read as one layer
                apart = following.alone or following.keep.dtype != first.keep.dtype
                if apart or rows + len(following.samples) > self._spec.batch_size:
                    held = following
                    break
                group.append(following)
                rows += len(following.samples)
            for request, reply in zip(group, await self._answer(group), strict=True):
                if not request.reply.done():  # the caller may have been cancelled
                    request.reply.set_result(reply)

    async def _answer(self, group: list[_Request]) -> list[ScoreReply]:
        samples = np.concatenate([request.samples for request in group])
        keep = np.concatenate([request.keep for request in group])
        result, work = await self._run(samples, keep)
        if isinstance(result, BaseException):
            if len(group) > 1:  # only the guilty request may fail
                return [(await self._answer([request]))[0] for request in group]
            guilty = await self._find_guilty(samples, keep)
            trace = "".join(traceback.format_exception(result))
            text = f"{type(result).__name__}: {result}"
            return [ScoreReply(None, os.getpid(), work, text, guilty, trace)]
        ends = np.cumsum([len(request.samples) for request in group])[:-1]
        parts = np.split(result, ends)
        # The first request carries the counters, so that sums over requests are exact.
        return [
            ScoreReply(part, os.getpid(), work if place == 0 else {})
            for place, part in enumerate(parts)
        ]

    async def _run(
        self, samples: npt.NDArray[np.int64], keep: npt.NDArray[Any]
    ) -> tuple[npt.NDArray[np.float32] | BaseException, dict[str, float]]:
        """One call of the scorer in its thread; an exception is returned, not raised."""
        before, start = self._counters(), time.perf_counter()
        loop = asyncio.get_running_loop()
        answers: Any = await asyncio.gather(
            loop.run_in_executor(self._executor, self._scorer, samples, keep),
            return_exceptions=True,
        )
        result = answers[0]
        work: dict[str, float] = {"busy_seconds": time.perf_counter() - start}
        after = self._counters()
        if after:
            work |= {name: after[name] - before[name] for name in _COUNTED}
        else:
            work |= {"batches": 1, "batch_rows": len(samples)}
        if isinstance(result, BaseException):
            return result, work
        scores = np.asarray(result, np.float32)
        if scores.shape != (len(samples),):
            wrong = f"the scorer returned shape {scores.shape} for {len(samples)} rows"
            return ValueError(wrong), work
        return scores, work

    def _counters(self) -> dict[str, float]:
        stats: Any = getattr(self._scorer, "stats", None)
        table = stats.as_dict() if hasattr(stats, "as_dict") else {}
        return {name: table[name] for name in _COUNTED} if set(_COUNTED) <= set(table) else {}

    async def _find_guilty(
        self, samples: npt.NDArray[np.int64], keep: npt.NDArray[Any]
    ) -> tuple[int, ...]:
        """Halve the request as long as one half fails on its own."""
        while len(samples) > 1:
            half = len(samples) // 2
            for part in (slice(None, half), slice(half, None)):
                result, _ = await self._run(samples[part], keep[part])
                if isinstance(result, BaseException):
                    samples, keep = samples[part], keep[part]
                    break
            else:
                break
        return tuple(int(sample) for sample in np.unique(samples))
