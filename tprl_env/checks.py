"""Checks of user input: messages give the value, what was expected, and the nearest names.

Numpy only, so that every room can use them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import numpy as np

__all__ = ["check_choice", "check_integer", "did_you_mean"]


def did_you_mean(value: object, known: Iterable[str], most: int = 1) -> str:
    """``"; did you mean 'width'?"`` for a misspelt name, empty where nothing is near.

    Args:
        value: What was given.
        known: The names there are.
        most: How many to suggest.
    """
    near = difflib.get_close_matches(str(value), list(known), n=most, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse an option that is not in the list, with the nearest names.

    Raises:
        ValueError: ``value`` is not one of ``choices``.
    """
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        options = ", ".join(map(repr, known))
        raise ValueError(
            f"{name} must be one of {options}, got {value!r}{did_you_mean(value, known)}"
        )


def check_integer(name: str, value: object, least: int) -> int:
    """The value as int; a bool is not an integer.

    Raises:
        ValueError: It is not an integer, or below ``least``.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least:
        return int(value)
    raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
