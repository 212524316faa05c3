"""Files that are whole or absent, and the versions that are written into them.

Every file that this package leaves behind goes through `write_atomically`: a draft beside the
target, synced, then renamed, so that no reader sees half a file and a crash loses nothing old.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["versions", "write_atomically", "write_json", "write_text"]

PACKAGES = ("tprl-env", "torch", "transformers", "ray", "gymnasium", "numpy", "pyarrow")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> Path:
    """Let ``write`` fill a draft beside ``path``, sync it, then rename it into place.

    Args:
        path: the file; its folder is made if needed.
        write: gets the draft opened for writing bytes.

    Returns:
        ``path``.

    Raises:
        OSError: the disk is full or the folder cannot be written; the draft is removed and an
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
        ValueError: the content holds a number that JSON lacks.
    """
    text = json.dumps(content, indent=2, sort_keys=sort, allow_nan=False)
    return write_text(path, text + "\n")


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an optional extra that this machine does not have
    return found
