"""MathVista by rules: the benchmark itself lets a large language model read answers out."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tprl_env.data.graders.text import need_references, normalise

_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def last_number(text: str) -> float | None:
    """The last number of a text, commas between thousands read over; None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def number_or_text(answer: str, references: Sequence[str]) -> float:
    """1.0 where the answer says a reference.

    Of a reference that is a number, where the answer's last number equals it as precisely as it is
    written; of a text, where the normalised texts are equal or the answer ends with it.

    Raises:
        ValueError: There is no reference.
    """
    need_references(references)
    return float(any(_agrees(answer, reference) for reference in references))


def _agrees(answer: str, reference: str) -> bool:
    wanted = reference.strip()
    if _NUMBER.fullmatch(wanted):
        given = last_number(answer)
        decimals = len(wanted.partition(".")[2])
        return given is not None and round(given, decimals) == float(wanted.replace(",", ""))
    text, end = normalise(answer), normalise(wanted)
    return bool(end) and (text == end or text.endswith(f" {end}"))
