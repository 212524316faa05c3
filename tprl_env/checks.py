"""Checks of user input: messages give the value, what was expected, and the nearest names.

Numpy only, so that every room can use them.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

__all__ = [
    *("NotFiniteError", "check_choice", "check_fields", "check_integer", "check_types"),
    *("did_you_mean", "quoted"),
]

_QUOTED = 200
_NEAR = 0.65  # below, half of the letters agree by chance: `top` is not `tome`


class NotFiniteError(FloatingPointError):
    """What a model computed is NaN or infinite.

    Attributes:
        rows: Which rows of the batch.
    """

    def __init__(self, message: str, rows: Iterable[int]) -> None:
        super().__init__(message)
        self.rows = tuple(rows)

    def __reduce__(self) -> tuple[type[NotFiniteError], tuple[str, tuple[int, ...]]]:
        """Travel between processes whole."""
        return NotFiniteError, (str(self), self.rows)


def quoted(value: object) -> str:
    """``repr`` of what was got, cut where it would hide the sentence around it."""
    text = repr(value)
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}... ({len(text)} characters)"


def did_you_mean(value: object, known: Iterable[str]) -> str:
    """``"; did you mean 'width'?"`` for a misspelt name, empty where nothing is near.

    Args:
        value: What was given.
        known: The names there are.
    """
    if not isinstance(value, str):
        return ""
    plain = {_plain(name): name for name in known}
    near = difflib.get_close_matches(_plain(value), plain, n=1, cutoff=_NEAR)
    near = near or [name for name in plain if len(value) > 2 and name.startswith(_plain(value))]
    return f"; did you mean {plain[near[0]]!r}?" if near else ""


def _plain(name: str) -> str:
    """A name without what is often typed otherwise; what is not a name is cut."""
    return name[:_QUOTED].lower().replace("-", "_")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse an option that is not in the list, with the nearest names.

    Raises:
        ValueError: ``value`` is not one of ``choices``.
    """
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        options = ", ".join(map(repr, known))
        raise ValueError(
            f"{name} must be one of {options}, got {quoted(value)}{did_you_mean(value, known)}"
        )


def check_integer(name: str, value: object, least: int) -> int:
    """The value as int; a bool is not an integer.

    Raises:
        ValueError: It is not an integer, or below ``least``.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least:
        return int(value)
    raise ValueError(f"{name} must be an integer of at least {least}, got {quoted(value)}")


def check_positive(name: str, value: float) -> None:
    """Refuse a number that is not above zero, NaN and infinity among them.

    Raises:
        ValueError: As said.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_fields(what: str, settings: type, given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of a dataclass of plain fields: names, types and what is missing.

    Args:
        what: What the dataclass describes, for messages, such as "pruner 'random'".
        settings: A dataclass whose fields are numbers, texts, truth values or `Literal`.
        given: Field values by name.

    Raises:
        ValueError: An unknown field, with the nearest name; a value of another type, or a number
            that is not finite; or a field without default is missing.
    """
    fields = dataclasses.fields(settings)
    hints = _hints(settings)
    known = [field.name for field in fields]
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"{what} has no field {quoted(name)}, its fields are "
                f"{', '.join(known) or 'none'}{did_you_mean(name, known)}"
            )
        _check_type(f"{name} of {what}", value, hints[name])
    for field in fields:
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and field.name not in given:
            raise ValueError(f"{what} needs {field.name}=...")


def check_types(settings: Any) -> None:
    """Refuse a dataclass whose fields hold values of other types than they say.

    Raises:
        ValueError: Naming the field.
    """
    for name, hint in _hints(settings.__class__).items():
        _check_type(name, getattr(settings, name), hint)


@functools.cache
def _hints(settings: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(settings)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if isinstance(hint, types.UnionType):
        kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
        if value is None or len(kinds) > 1:
            return
        hint = kinds[0]
    if typing.get_origin(hint) is typing.Literal:
        check_choice(name, value, typing.get_args(hint))
        return
    fits = {
        int: lambda v: isinstance(v, (int, np.integer)) and not isinstance(v, bool),
        float: lambda v: (
            isinstance(v, (int, float, np.number)) and not isinstance(v, bool) and math.isfinite(v)
        ),
        bool: lambda v: isinstance(v, bool),
        str: lambda v: isinstance(v, str),
    }.get(hint)
    if fits is not None and not fits(value):
        kind = "a finite number" if hint is float else hint.__name__
        raise ValueError(f"{name} must be {kind}, got {quoted(value)}")
