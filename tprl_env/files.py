"""Files that are whole or absent, files that really are files, logs that survive a crash, versions.

Every file that this package leaves behind goes through `write_atomically`: a draft beside the
target, synced, then renamed, so that no reader sees half a file and a crash loses nothing old.
Logs that grow while a run lasts go through `JsonLog`.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["JsonLog", "open_regular", "versions", "write_atomically", "write_json", "write_text"]

PACKAGES = ("tprl-env", "torch", "transformers", "ray", "gymnasium", "numpy", "pyarrow")


_SPECIAL = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading bytes; anything else is refused instead of waited for.

    Args:
        path: The file; symbolic links are followed.

    Raises:
        OSError: It is missing, unreadable, or a folder, FIFO, socket or device.
    """
    _check_regular(path.stat().st_mode, path)  # opening a device may already do something
    # without O_NONBLOCK a FIFO that took the file's place in between would block for ever
    stream = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    try:
        _check_regular(os.fstat(stream.fileno()).st_mode, path)
    except OSError:
        stream.close()
        raise
    return stream


def _check_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        what = next((name for test, name in _SPECIAL if test(mode)), "something else")
        raise OSError(errno.EINVAL, f"it is {what}, not a file", str(path))


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let ``write`` fill a draft beside ``path``, sync it, then rename it into place.

    Args:
        path: The file; its folder is made if needed.
        write: Gets the draft opened for writing bytes.

    Returns:
        ``path``.

    Raises:
        OSError: The disk is full or the folder cannot be written; the draft is removed and an
            older file at ``path`` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the process in the name: two writers then disturb neither each other's draft nor the result
    draft = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:  # gone already unless something failed
        draft.unlink(missing_ok=True)
    return path


def write_text(path: Path, text: str) -> Path:
    """`write_atomically` of UTF-8 text."""
    return write_atomically(path, lambda stream: stream.write(text.encode("utf-8")))


def write_json(path: Path, content: Mapping[str, Any] | list[Any], *, sort: bool = False) -> Path:
    """`write_atomically` of JSON; NaN and infinities are refused.

    Raises:
        ValueError: The content holds a number that JSON lacks.
    """
    text = json.dumps(content, indent=2, sort_keys=sort, allow_nan=False)
    return write_text(path, text + "\n")


class JsonLog:
    """One JSON object per line, appended while a run lasts.

    A crash may tear the line that was being written, which is then the last: it is dropped, never
    an error.

    Args:
        path: The file; there is none before the first `append`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def read(self) -> list[dict[str, Any]]:
        """All whole rows, oldest first; empty without a file.

        Raises:
            ValueError: A line before the last is damaged, which no crash of ours explains.
        """
        if not self.path.is_file():
            return []
        lines = self.path.read_bytes().decode("utf-8", "replace").split("\n")
        while lines and not lines[-1]:
            lines.pop()
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                if number == len(lines):
                    break  # torn
                raise ValueError(
                    f"{self.path} line {number} is damaged ({error.msg}); remove that line"
                ) from error
        return rows

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row at the end."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
            torn = bool(end) and file.read(1) != b"\n"
        if torn:  # the row would be joined to half a line, and lost with it
            self.keep(lambda row: True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Drop the rows that are not ``wanted``, and a torn last line.

        A run that resumes drops what was written after the checkpoint that it resumes from: that
        work is done again.
        """
        if self.path.is_file():
            kept = [json.dumps(row) + "\n" for row in self.read() if wanted(row)]
            write_text(self.path, "".join(kept))


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an optional extra that this machine does not have
    return found
