"""Seeded ways to spoil JSON, bytes and words; the same seed spoils in the same way."""

from __future__ import annotations

import contextlib
import copy
import math
import random
import signal
from collections.abc import Callable, Iterator
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 0.5, 10**12, -(10**30), 1e308, math.nan, math.inf, -math.inf,
    "", " ", "\t", "\u2028", "\x00", "a" * 5000, "💥", "é", "</s>", "<image>", "../../secret",
    "/etc", "0", "-3", "nan", "1e9", "None", "true", [], {}, [[]], [None], ["a", 1],
    {"a": {"b": []}}, [0] * 50,
)  # fmt: skip


class Hang(BaseException):
    """Raised by the alarm; not an Exception, so that nothing can take it for a failure."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the main thread when the block takes longer."""

    def ring(*_: Any) -> None:
        raise Hang(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def generator(kind: str, seed: int) -> random.Random:
    """A generator of its own for every input."""
    return random.Random(f"{kind}/{seed}")


def spoil_json(rng: random.Random, value: Any) -> Any:
    """A copy with one or two places dropped, renamed or replaced."""
    spoilt = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(list(_places(spoilt)))
        action = rng.choice(("replace", "replace", "replace", "drop", "rename"))
        if action == "replace" or not isinstance(holder, dict):
            holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
        else:
            old = holder.pop(key)
            if action == "rename":
                holder[f"{key}s"] = old
        if not spoilt:
            break
    return spoilt


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        yield value, key
        if isinstance(value[key], (dict, list)) and value[key]:
            yield from _places(value[key])


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Cut, flip, blank, repeat or insert; never the same bytes again."""
    ways: list[Callable[[random.Random, bytearray], bytes]] = [
        _cut,
        _flip,
        _blank,
        _repeat,
        _insert,
    ]
    while True:
        spoilt = rng.choice(ways)(rng, bytearray(data))
        if spoilt != data:
            return spoilt


def _cut(rng: random.Random, data: bytearray) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _flip(rng: random.Random, data: bytearray) -> bytes:
    for _ in range(rng.choice((1, 1, 8))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _blank(rng: random.Random, data: bytearray) -> bytes:
    start = rng.randrange(len(data))
    stop = min(len(data), start + rng.choice((1, 16, 512)))
    data[start:stop] = bytes(stop - start)
    return bytes(data)


def _repeat(rng: random.Random, data: bytearray) -> bytes:
    start = rng.randrange(len(data))
    return bytes(data[:start] + data[start : start + 64] + data[start:])


def _insert(rng: random.Random, data: bytearray) -> bytes:
    start = rng.randrange(len(data) + 1)
    return bytes(data[:start]) + rng.randbytes(rng.choice((1, 7, 300))) + bytes(data[start:])
