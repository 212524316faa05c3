"""Files that are whole or absent, files that really are files, logs that survive a crash, versions.

Every file that this package leaves behind goes through `write_atomically`: a draft beside the
target, synced, then renamed and the folder synced, so that no reader sees half a file and neither
a crash nor a power cut loses anything old.
Logs that grow while a run lasts go through `JsonLog`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = [
    *("LOCK_NAME", "FolderInUseError", "JsonLog", "folder_lock", "open_regular", "sync_folder"),
    *("versions", "write_atomically", "write_json", "write_text"),
]

logger = logging.getLogger(__name__)

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


LOCK_NAME = ".tprl.lock"
"""The file in a folder that its writer holds locked; it is there only while somebody writes."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_held: set[int] = set()


class FolderInUseError(ValueError):
    """Another process writes into the folder.

    Attributes:
        holder: What it said about itself: ``host``, ``pid``, ``started``, ``purpose``; empty
            where that could not be read.
    """

    def __init__(self, folder: Path, holder: Mapping[str, Any]) -> None:
        self.holder = dict(holder)
        who = "another process"
        if holder:
            who = (
                f"process {holder.get('pid')} on {holder.get('host')} "
                f"({holder.get('purpose')}, since {holder.get('started')})"
            )
        super().__init__(
            f"{folder} is in use by {who}; wait until it ends, stop it, or choose another folder"
        )


@contextlib.contextmanager
def folder_lock(folder: str | Path, purpose: str) -> Iterator[None]:
    """Be the only writer of a folder, or be refused with the name of the one that is.

    The lock is the operating system's (``flock`` on `LOCK_NAME` in the folder), so it ends with
    its process however that ends, and a file left over by a killed process blocks nobody. It
    works between the processes of a machine, and between machines where the file system carries
    locks (NFS from version 4 does). Where it has none, a warning says so and nothing is locked.

    A folder that did not exist is made, and removed again if nothing was put into it.

    Args:
        folder: A local folder.
        purpose: What it is used for, such as "tprl encode"; others read it when refused.

    Raises:
        FolderInUseError: Another process, or another call in this one, holds the lock.
        OSError: The folder cannot be made or written.
    """
    place = Path(folder)
    made = not place.exists()
    lock = _take_lock(place, purpose)
    try:
        yield
    finally:
        if lock is not None and lock in _held:  # not in a forked child, whose lock it is not
            # unlinked while locked: whoever opened the file before finds that it is gone, and
            # starts again
            (place / LOCK_NAME).unlink(missing_ok=True)
            _held.remove(lock)
            os.close(lock)
        if made:
            with contextlib.suppress(OSError):  # something was put into it, or it is gone
                place.rmdir()


def _take_lock(folder: Path, purpose: str) -> int | None:
    path = folder / LOCK_NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileNotFoundError, FileExistsError):
            if os.path.lexists(folder) and not folder.is_dir():
                raise
            continue  # the last holder removed the folder that it had made
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "this system has no flock")
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(handle, path):
                break
        except BlockingIOError as error:
            holder = _read_holder(handle)
            os.close(handle)
            raise FolderInUseError(folder, holder) from error
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            logger.warning(
                "%s cannot be locked (%s): make sure that nobody else writes into it",
                *(folder, error.strerror),
            )
            return None
        os.close(handle)
    _held.add(handle)
    holder = {
        "host": platform.node(),
        "pid": os.getpid(),
        "started": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "purpose": purpose,
    }
    os.ftruncate(handle, 0)
    os.pwrite(handle, json.dumps(holder).encode(), 0)
    return handle


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _read_holder(handle: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
    except ValueError:  # it has the lock, but has not written its name yet
        return {}
    return holder if isinstance(holder, dict) else {}


def _forget_locks() -> None:
    """A forked child must not keep its parent's locks when the parent has died."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


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
        sync_folder(path.parent)
    finally:  # gone already unless something failed
        draft.unlink(missing_ok=True)
    return path


def sync_folder(folder: Path) -> None:
    """Let a power cut not undo what was renamed into a folder; no more than the system can do."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # a folder that may be written, not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, *_NO_LOCKS):  # a file system without it
            raise
    finally:
        os.close(handle)


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
