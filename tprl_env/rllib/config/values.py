"""Reading a value as the type of its field, and the checks that the parts of a config share.

The command line gives strings, JSON gives lists for pairs: both are read here, by the type hints.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tprl_env.checks import check_choice, quoted

__all__ = [
    "check_at_least",
    "check_fraction",
    "check_positive",
    "read_fields",
    "read_value",
    "type_hints",
]

_hints = functools.cache(typing.get_type_hints)


def type_hints(settings: Any) -> dict[str, Any]:
    """Type of each field of a dataclass or its instance."""
    return _hints(settings if isinstance(settings, type) else settings.__class__)


def read_fields(settings: Any) -> None:
    """Read every field of a frozen dataclass as its type; call it first in ``__post_init__``.

    Raises:
        ValueError: If a value cannot be read, naming the field.
    """
    hints = type_hints(settings)
    for field in dataclasses.fields(settings):
        value = read_value(field.name, getattr(settings, field.name), hints[field.name])
        object.__setattr__(settings, field.name, value)


def read_value(name: str, value: Any, hint: Any) -> Any:
    """Read a value as a type: a number, a string, a pair, a table, a `Literal` or a dataclass.

    Raises:
        ValueError: If it cannot be read.
    """
    if typing.get_origin(hint) is typing.Literal:
        check_choice(name, value, typing.get_args(hint))
        return value
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in options:
            return None
        if str not in options:
            raise ValueError(f"{name} must not be None")
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, option):  # type: ignore[arg-type]
            return value
        read = _READERS.get(typing.get_origin(option) or option)
        result = read(value) if read else None
        if result is not None:
            return result
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise ValueError(f"{name} must be {wanted}, got {quoted(value)}")


def check_at_least(settings: object, least: float, *names: str) -> None:
    """Refuse a number below ``least``.

    Raises:
        ValueError: Naming the field.
    """
    for name in names:
        if getattr(settings, name) < least:
            raise ValueError(f"{name} must be at least {least:g}, got {getattr(settings, name)!r}")


def check_positive(settings: object, *names: str) -> None:
    """Refuse a number that is not above 0.

    Raises:
        ValueError: Naming the field.
    """
    for name in names:
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(settings, name)!r}")


def check_fraction(settings: object, *names: str) -> None:
    """Refuse a number outside (0, 1].

    Raises:
        ValueError: Naming the field.
    """
    for name in names:
        if not 0.0 < getattr(settings, name) <= 1.0:
            raise ValueError(f"{name} must lie in (0, 1], got {getattr(settings, name)!r}")


def _read_bool(value: Any) -> bool | None:
    table = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if isinstance(value, bool):
        return value
    return table.get(value.lower()) if isinstance(value, str) else None


def _read_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_int(value: Any) -> int | None:
    number = _read_number(value)
    return int(number) if number is not None and number == int(number) else None


def _read_pair(value: Any) -> tuple[int, int] | tuple[float, float] | None:
    """Two whole numbers, or two numbers of which one is none."""
    parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    low, high = (_read_number(part) for part in parts)
    if low is None or high is None:
        return None
    if low == int(low) and high == int(high):
        return int(low), int(high)
    return low, high


def _read_table(value: Any) -> dict[str, Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return None
    return dict(value) if isinstance(value, Mapping) else None


_READERS: dict[Any, Any] = {
    bool: _read_bool,
    int: _read_int,
    float: _read_number,
    tuple: _read_pair,
    dict: _read_table,
    str: lambda value: str(value) if isinstance(value, (str, Path)) else None,
}
