"""Boxes written as four numbers: intersection over union (RefCOCO's comprehension task)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tprl_env.data.graders.text import need_references

Box = tuple[float, float, float, float]
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_ENOUGH = 0.5


def read_box(text: str) -> Box | None:
    """The first four numbers of a text as x1, y1, x2, y2; None where there are fewer."""
    numbers = [float(number) for number in _NUMBER.findall(text)[:4]]
    return None if len(numbers) < 4 else (numbers[0], numbers[1], numbers[2], numbers[3])


def intersection_over_union(first: Box, second: Box) -> float:
    """Overlap of two boxes, in [0, 1]; 0 where one is turned inside out or without area."""
    areas = [max(x2 - x1, 0.0) * max(y2 - y1, 0.0) for x1, y1, x2, y2 in (first, second)]
    if not all(areas):
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (sum(areas) - shared)


def box(answer: str, references: Sequence[str]) -> float:
    """1.0 where a box overlaps a reference by at least one half (Acc@0.5).

    Raises:
        ValueError: There is no reference, or one is no box.
    """
    need_references(references)
    given, best = read_box(answer), 0.0
    for reference in references:
        wanted = read_box(reference)
        if wanted is None:
            raise ValueError(f"a reference must be four numbers x1, y1, x2, y2, got {reference!r}")
        if given is not None:
            best = max(best, intersection_over_union(given, wanted))
    return float(best >= _ENOUGH)
