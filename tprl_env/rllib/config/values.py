"""Reading a config value as the type of its field; the command line gives strings."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["coerce"]


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Read a value as the field's type; strings come from the command line.

    Raises:
        ValueError: if it cannot be read.
    """
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None or (isinstance(value, str) and value.lower() == "none"):
        if type(None) in options:
            return None
        if str not in options:
            raise ValueError(f"{name} must not be None")
    for option in options:
        read = _READERS.get(typing.get_origin(option) or option)
        result = read(value) if read else None
        if result is not None:
            return result
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options if o is not type(None))
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


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


def _read_pair(value: Any) -> tuple[int, int] | None:
    parts = value.strip("()[] ").split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or len(parts) != 2:
        return None
    low, high = (_read_int(part) for part in parts)
    return None if low is None or high is None else (low, high)


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
