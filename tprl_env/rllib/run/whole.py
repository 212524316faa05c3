"""A folder that is whole or does not count: sizes and sha256 of its files in ``whole.json``."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from tprl_env.data.features.manifest import file_sha256
from tprl_env.files import write_json

__all__ = ["WHOLE", "damage", "seal", "sync_folder"]

WHOLE = "whole.json"


def seal(folder: Path) -> None:
    """Note all files of a folder, and bring them and their names to the disk.

    Call it before the folder is renamed to its final place: a rename may reach the disk before
    the contents do, and a power cut then leaves a folder of empty files.
    """
    files = {}
    for part in sorted(path for path in folder.rglob("*") if path.is_file()):
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        name = part.relative_to(folder).as_posix()
        files[name] = {"size": part.stat().st_size, "sha256": file_sha256(part)}
    write_json(folder / WHOLE, {"files": files})
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync_folder(inner)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # not every file system syncs folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def damage(folder: Path) -> str:
    """What is wrong with a sealed folder, in words; empty if it is whole."""
    try:
        files: dict[str, Any] = json.loads((folder / WHOLE).read_text("utf-8"))["files"]
        for name, entry in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
        for name, entry in files.items():
            if file_sha256(folder / name) != entry["sha256"]:
                return f"{name} has another content than was written"
    except FileNotFoundError:
        return f"{WHOLE} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{WHOLE} is damaged"
    return ""
