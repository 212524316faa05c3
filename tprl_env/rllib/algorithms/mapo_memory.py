"""MAPO's memory: the best episodes of each sample, bounded, and saved with checkpoints.

An episode is its sequence of keep-masks, packed to bits. With exact budgets the count is part of
the probability of a mask, so episodes are kept per sample and budget.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["EpisodeMemory", "Key", "Remembered"]

Key = tuple[int, int]
"""Sample number and budget, 0 without one."""


class Remembered(NamedTuple):
    """One episode: packed masks after each of its steps, and its return."""

    masks: bytes
    value: float


class EpisodeMemory:
    """The best episodes per key, each once, at most ``size`` per key and ``limit`` in total.

    When the total is exceeded, the least recently recalled keys are evicted.

    Args:
        identity: What the returns depend on: samples and reward. State of a memory with another
            identity is refused.
        size: Episodes per key.
        limit: Episodes in total.
    """

    def __init__(self, identity: Mapping[str, Any], size: int, limit: int) -> None:
        self._identity = {name: str(value) for name, value in identity.items()}
        self._size, self._limit = size, limit
        self._table: OrderedDict[Key, tuple[Remembered, ...]] = OrderedDict()
        self._total = 0

    def __len__(self) -> int:
        """Episodes remembered."""
        return self._total

    def recall(self, key: Key) -> tuple[Remembered, ...]:
        """Episodes of a key, best first."""
        found = self._table.get(key, ())
        if found:
            self._table.move_to_end(key)
        return found

    def add(self, key: Key, masks: bytes, value: float) -> bool:
        """Remember an episode if it is among the best of its key.

        Args:
            key: Sample and budget.
            masks: Packed masks after each step.
            value: Return.

        Returns:
            Whether it is remembered now and was not before.
        """
        before = self._table.get(key, ())
        if any(masks == each.masks for each in before):
            return False
        if len(before) >= self._size and value <= before[-1].value:
            return False
        # sorted() is stable: of equally good episodes the older stays ahead
        after = sorted((*before, Remembered(masks, float(value))), key=lambda each: -each.value)
        self._table[key] = tuple(after[: self._size])
        self._table.move_to_end(key)
        self._total += len(self._table[key]) - len(before)
        while self._total > self._limit:
            self._total -= len(self._table.popitem(last=False)[1])
        return True

    def get_state(self) -> dict[str, Any]:
        """Identity and content as arrays, oldest key first."""
        rows = [(key, each) for key, several in self._table.items() for each in several]
        return {
            "identity": dict(self._identity),
            "keys": np.array([key for key, _ in rows], np.int64).reshape(-1, 2),
            "values": np.array([each.value for _, each in rows], np.float64),
            "lengths": np.array([len(each.masks) for _, each in rows], np.int64),
            "masks": np.frombuffer(b"".join(each.masks for _, each in rows), np.uint8),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Take over another memory's content; smaller bounds keep the best and the newest.

        Raises:
            ValueError: If it belongs to other samples or another reward.
        """
        # checkpoints from before the rename call the score's kind a metric
        theirs = {"score_kind" if n == "metric" else n: v for n, v in state["identity"].items()}
        if theirs != self._identity:
            table = ", ".join(
                f"{name} {theirs.get(name)}, now {self._identity.get(name)}"
                for name in sorted({*theirs, *self._identity})
                if theirs.get(name) != self._identity.get(name)
            )
            raise ValueError(
                f"this memory of episodes belongs to another run's samples or reward ({table}); "
                "resume with that run's settings, or start in a new folder"
            )
        self._table.clear()
        self._total = 0
        content = np.asarray(state["masks"], np.uint8).tobytes()
        stops = np.cumsum(state["lengths"]).tolist()
        starts = [0, *stops][: len(stops)]
        rows = zip(state["keys"], starts, stops, state["values"], strict=True)
        for (sample, budget), start, stop, value in rows:
            self.add((int(sample), int(budget)), content[start:stop], float(value))
