"""Lines of a JSON-lines file as checked records, with the file and line in every complaint.

A record ends at a newline and nowhere else (not at U+2028, which JSON allows inside a string); the
file is UTF-8, with or without a byte-order mark.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tprl_env.files import open_regular

MAX_LINE = 1 << 24  # bytes; more than any question needs, less than memory
MAX_ID = 1000  # characters; ids stand in messages and logs
_OTHER_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


class BadSampleError(ValueError):
    """A sample cannot be used; the message names it and the file.

    Attributes:
        sample: Its id, empty where it has none.
    """

    def __init__(self, message: str, sample: str = "") -> None:
        super().__init__(message)
        self.sample = sample


class NumberText(str):
    """A JSON number as it is written in the file."""

    __slots__ = ()


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the objects of a file, one per line; empty lines are passed over.

    Args:
        path: The file.

    Yields:
        Line number, from 1, and the object. Numbers in it are `NumberText`.

    Raises:
        ValueError: The file cannot be read, or is no regular file.
        BadSampleError: A line is not UTF-8, not JSON, not an object, or longer than `MAX_LINE`.
    """
    try:
        with open_regular(path) as stream:
            start = stream.read(len(codecs.BOM_UTF8))
            for mark, name in _OTHER_ENCODINGS.items():
                if start.startswith(mark):
                    raise BadSampleError(f"{path} line 1 is {name}; save the file as UTF-8")
            if start != codecs.BOM_UTF8:
                stream.seek(0)
            number = 0
            while line := stream.readline(MAX_LINE + 1):
                number += 1
                record = _parse(line, f"{path} line {number}")
                if record is not None:
                    yield number, record
    except OSError as error:
        raise ValueError(f"cannot read the dataset {path}: {error.strerror}") from error


def _parse(line: bytes, where: str) -> dict[str, Any] | None:
    if len(line) > MAX_LINE:
        raise BadSampleError(f"{where} is longer than {MAX_LINE} bytes; write one object per line")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"{where} is not UTF-8 (byte {error.object[error.start]:#04x} at column "
            f"{error.start + 1}); save the file as UTF-8"
        ) from error
    if not text.strip(" \t\r\n"):
        return None
    try:
        record = json.loads(
            text,
            object_pairs_hook=_no_name_twice,
            parse_int=NumberText,
            parse_float=NumberText,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise BadSampleError(
            f"{where} is not JSON ({reason}); write one object per line"
        ) from error
    if not isinstance(record, dict):
        raise BadSampleError(f"{where} is not a JSON object; write one object per line")
    return record


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice[:50]!r} is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON value")


def text_field(record: dict[str, Any], name: str, where: str) -> str:
    """A field that must be a string.

    Raises:
        BadSampleError: It is something else; file, line and field are named.
    """
    value = record[name]
    if isinstance(value, NumberText) or not isinstance(value, str):
        raise _wrong(name, value, "a string", where)
    return _encodable(value, name, where)


def id_field(record: dict[str, Any], name: str, where: str) -> str:
    """A field that names something: a string, or a whole number as its digits.

    Raises:
        BadSampleError: It is something else, empty, or longer than `MAX_ID`.
    """
    value = record[name]
    whole = isinstance(value, NumberText) and value.removeprefix("-").isdecimal()
    if not whole and (isinstance(value, NumberText) or not isinstance(value, str)):
        raise _wrong(name, value, "a string or a whole number", where)
    if not 0 < len(value) <= MAX_ID:
        raise BadSampleError(
            f"{where}: the field {name!r} must have 1 to {MAX_ID} characters, got {len(value)}"
        )
    return _encodable(str(value), name, where)


def answers_field(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """The accepted answers: one string or number, or a list of them; numbers as written.

    Raises:
        BadSampleError: It is something else.
    """
    value = record[name]
    answers = value if isinstance(value, list) else [value]
    if not all(isinstance(answer, str) for answer in answers):
        expected = "a string or a number, or a list of them"
        raise _wrong(name, value, expected, where)
    return tuple(_encodable(str(answer), name, where) for answer in answers)


def names_field(record: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """A list of one or more texts.

    Raises:
        BadSampleError: It is something else.
    """
    value = record[name]
    texts = value if isinstance(value, list) else []
    if not texts or not all(isinstance(t, str) and not isinstance(t, NumberText) for t in texts):
        raise _wrong(name, value, "a list of at least one text", where)
    return tuple(_encodable(text, name, where) for text in texts)


def _wrong(name: str, value: object, expected: str, where: str) -> BadSampleError:
    got = str(value) if isinstance(value, NumberText) else json.dumps(value)
    shown = got if len(got) <= 60 else got[:57] + "..."
    cure = f"; leave {name!r} out where there is none" if value is None else ""
    return BadSampleError(f"{where}: the field {name!r} must be {expected}, got {shown}{cure}")


def _encodable(text: str, name: str, where: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError(
            f"{where}: the field {name!r} holds half a character "
            f"(\\u{ord(text[error.start]):04x}); write both halves"
        ) from error
    return text
