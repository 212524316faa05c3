"""Shared storage of runs behind a URI: folders are complete or absent, on any file system.

Object stores cannot rename a folder. So a folder is uploaded under its final name and counts only
once its mark, ``NAME.whole.json`` with size and sha256 of every file, exists next to it; the mark
is written last and removed first. A single file is written under another name and moved.
"""

from __future__ import annotations

import json
import logging
import posixpath
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from tprl_env.data.features.manifest import file_sha256

__all__ = ["Storage", "StorageError", "is_uri"]

logger = logging.getLogger(__name__)

_MARK = ".whole.json"


class StorageError(OSError):
    """What lies in the storage is not what was written there."""


def is_uri(place: str | Path) -> bool:
    """Whether ``place`` is a URI such as ``s3://bucket/run`` rather than a path."""
    return isinstance(place, str) and "://" in place


class Storage:
    """One folder of a file system that pyarrow knows: file, s3, gs, abfs, hdfs.

    Credentials come from where the cloud's own tools look for them, never from the URI: a URI is
    shown in dashboards and logs.

    Args:
        filesystem: The file system.
        root: The folder in it.
        name: How messages call it.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, name: str = "") -> None:
        self.filesystem, self.root = filesystem, root.rstrip("/")
        self.name = name or self.root

    @classmethod
    def open(cls, uri: str) -> Storage:
        """Open the folder that a URI names; it need not exist yet.

        Raises:
            ValueError: For a scheme that pyarrow does not know, or a URI with a password in it.
        """
        cls.check(uri)
        try:
            filesystem, root = fs.FileSystem.from_uri(uri)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"cannot open the storage {uri!r} ({error}); expected a path or a URI such as "
                "s3://bucket/folder, gs://bucket/folder or file:///folder"
            ) from error
        return cls(filesystem, root, uri)

    @staticmethod
    def check(uri: str) -> None:
        """Refuse a URI that holds credentials; touches no network.

        Raises:
            ValueError: It does.
        """
        if urlsplit(uri).password is not None:
            raise ValueError(
                "a storage URI must not hold credentials, because it is shown in dashboards and "
                "logs; set up the cloud's own credentials and write s3://bucket/folder"
            )

    def _path(self, name: str) -> str:
        return posixpath.join(self.root, name) if name else self.root

    def read(self, name: str) -> bytes | None:
        """Content of a file, None if there is none."""
        if self.filesystem.get_file_info(self._path(name)).type != fs.FileType.File:
            return None
        with self.filesystem.open_input_stream(self._path(name)) as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file under another name, then move it over the old one."""
        self._make_folder(posixpath.dirname(self._path(name)))
        draft = f"{self._path(name)}.writing"
        with self.filesystem.open_output_stream(draft) as stream:
            stream.write(content)
        self.filesystem.move(draft, self._path(name))

    def folders(self, parent: str) -> dict[str, dict[str, Any]]:
        """Whole folders below ``parent`` with their marks, by name, sorted.

        A folder whose mark is missing or unreadable, or whose files have other sizes than the mark
        says, is not among them.
        """
        marks = {name: self._whole(posixpath.join(parent, name)) for name in self._names(parent)}
        return {name: mark for name, mark in marks.items() if mark is not None}

    def drop_torn(self, parent: str) -> None:
        """Remove the folders below ``parent`` that are not whole: uploads that were cut off."""
        for name in self._names(parent):
            if self._whole(posixpath.join(parent, name)) is None:
                self.drop_folder(posixpath.join(parent, name))

    def _names(self, parent: str) -> list[str]:
        selector = fs.FileSelector(self._path(parent), allow_not_found=True)
        return sorted(
            posixpath.basename(info.path.rstrip("/"))
            for info in self.filesystem.get_file_info(selector)
            if info.type == fs.FileType.Directory
        )

    def _whole(self, name: str) -> dict[str, Any] | None:
        content = self.read(name + _MARK)
        if content is None:
            return None
        try:
            mark: dict[str, Any] = json.loads(content)
        except ValueError:  # neither JSON nor text
            logger.warning("the mark of %s in %s is torn; left out", name, self.name)
            return None
        sizes = {part: entry["size"] for part, entry in mark["files"].items()}
        return mark if self._sizes(name) == sizes else None

    def _sizes(self, name: str) -> dict[str, int]:
        selector = fs.FileSelector(self._path(name), allow_not_found=True, recursive=True)
        head = self._path(name) + "/"
        return {
            info.path.removeprefix(head): info.size
            for info in self.filesystem.get_file_info(selector)
            if info.type == fs.FileType.File
        }

    def push_folder(self, path: Path, name: str) -> None:
        """Upload a local folder; it counts once everything has arrived.

        Args:
            path: Local folder.
            name: Its name here; what lies there is replaced.
        """
        self.drop_folder(name)
        files = {}
        for part in sorted(p for p in path.rglob("*") if p.is_file()):
            digest, size = file_sha256(part), part.stat().st_size
            files[part.relative_to(path).as_posix()] = {"size": size, "sha256": digest}
        self._make_folder(self._path(name))
        fs.copy_files(str(path), self._path(name), fs.LocalFileSystem(), self.filesystem)
        self.write(name + _MARK, json.dumps({"files": files}).encode())

    def fetch_folder(self, name: str, path: Path) -> None:
        """Download a whole folder and compare its contents with the mark.

        Args:
            name: The folder here.
            path: Local folder; it appears in one piece, and must not exist.

        Raises:
            StorageError: It is not whole, or a file's content is another than was uploaded.
        """
        mark = self._whole(name)
        if mark is None:
            raise StorageError(f"{name!r} in {self.name} is not whole")
        draft = path.with_name(f".writing-{path.name}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        fs.copy_files(self._path(name), str(draft), self.filesystem, fs.LocalFileSystem())
        for part, entry in mark["files"].items():
            if file_sha256(draft / part) != entry["sha256"]:
                shutil.rmtree(draft)
                raise StorageError(
                    f"{name}/{part} in {self.name} has another content than was uploaded"
                )
        draft.rename(path)

    def drop_file(self, name: str) -> None:
        """Remove a file if it is there."""
        if self.filesystem.get_file_info(self._path(name)).type == fs.FileType.File:
            self.filesystem.delete_file(self._path(name))

    def drop_folder(self, name: str) -> None:
        """Remove a folder, its mark first."""
        self.drop_file(name + _MARK)
        if self.filesystem.get_file_info(self._path(name)).type == fs.FileType.Directory:
            self.filesystem.delete_dir(self._path(name))

    def _make_folder(self, path: str) -> None:
        if path:
            self.filesystem.create_dir(path, recursive=True)
