"""Reading cells as datasets have them."""

from __future__ import annotations

import math
from typing import Any

from tprl_env.checks import quoted


def texts(value: Any) -> tuple[str, ...]:
    """Answers as a list of texts, or of tables with the text under "answer".

    Raises:
        ValueError: It is something else, or empty.
    """
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"answers must be texts, got {quoted(value)}")
    found = [
        part["answer"] if isinstance(part, dict) and "answer" in part else part for part in parts
    ]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError(f"answers must be a list of at least one text, got {quoted(value)}")
    return tuple(found)


def is_missing(value: Any) -> bool:
    """Whether a cell says that there is nothing: null, NaN, "" or "nan"."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return isinstance(value, str) and value.strip().lower() in ("", "nan", "none")


def size_of(picture: Any) -> tuple[int, int]:
    """Width and height of a picture of the ``datasets`` library.

    Raises:
        ValueError: It is none.
    """
    size = getattr(picture, "size", None)
    if not isinstance(size, tuple) or len(size) != 2:
        raise ValueError(f"a picture must come with its size, got {quoted(type(picture).__name__)}")
    return size
