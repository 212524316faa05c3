"""The JSON files of a feature store: its contents, and sizes and checksums to verify them.

A store is a folder. Its data files are written first, each under a temporary name and then
renamed; ``manifest.json`` is written last, so a folder with a manifest is complete by
construction and a folder without one is a store that was never finished.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from tprl_env.files import write_json

P = ParamSpec("P")
R = TypeVar("R")

FORMAT = "tprl-features"
VERSION = 2
READABLE = (1, VERSION)
"""Version 1 knows one grid at consecutive positions only: what it holds means the same."""
MANIFEST_NAME = "manifest.json"
JOURNAL_NAME = "encoding.json"
_LATER = ("dtype", "image_backend")
"""Fields that the first stores lack; their fingerprints must not change."""
PACKAGES = ("numpy", "pyarrow", "torch", "transformers", "Pillow")


CURE = "encode the store again with resume=False"
_DATA_FILE = re.compile(r"(images|samples)-[0-9]{5,9}\.arrow")
_TEXTS = ("lvlm", "lvlm_fingerprint", "model_type", "dataset", "dataset_fingerprint")
_COUNTS = (
    *("samples", "images", "max_tokens", "max_question_tokens"),
    *("token_width", "tower_width", "query_width", "skipped"),
)


Verify = Literal["once", "sizes", "checksums"]
"""How data files are checked when opened: their sizes always; every byte never, again, or unless
this process has done so since the file last changed."""

SEAL = "checksum"
"""Field of a JSON file: the sha256 of its other fields; the first stores lack it."""

_TRUST = "TPRL_TRUST"
_verified: set[tuple[str, int, int, int, str]] = set()


class StoreError(ValueError):
    """A feature store is missing, damaged, unfinished, foreign or does not fit its use."""


@dataclass(frozen=True)
class FileEntry:
    """What one data file of a store must look like.

    Attributes:
        rows: Rows in the file.
        bytes: Size of the file.
        sha256: Hex digest of its content.
    """

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a store that is not tensor data.

    Attributes:
        lvlm: Name of the LVLM that encoded the images.
        lvlm_fingerprint: Fingerprint of its weights and processing.
        model_type: Its family, empty when unknown.
        dataset: Free description of the samples.
        dataset_fingerprint: Hash over every sample in order, pictures included.
        samples: Number of samples S.
        images: Number of distinct images.
        max_tokens: Largest number of visual tokens of any image.
        max_question_tokens: Largest number of question tokens of any sample.
        token_width: Width D of the visual tokens.
        tower_width: Width Dv of the vision-tower features, 0 when they were not stored.
        query_width: Width d_q of the question's token embeddings.
        skipped: Unreadable samples that were left out on request.
        files: Name of each data file and what it must look like.
        packages: Versions of the packages that wrote the store.
        version: Format version.
        dtype: Number type the LVLM computed in; empty in stores that did not record it.
        image_backend: What prepared the pictures, "pil" or "torchvision"; empty likewise.
    """

    lvlm: str
    lvlm_fingerprint: str
    model_type: str
    dataset: str
    dataset_fingerprint: str
    samples: int
    images: int
    max_tokens: int
    max_question_tokens: int
    token_width: int
    tower_width: int
    query_width: int
    skipped: int
    files: dict[str, FileEntry]
    packages: dict[str, str]
    version: int = VERSION
    dtype: str = ""
    image_backend: str = ""

    @property
    def fingerprint(self) -> str:
        """Hash of the content; package versions do not enter, nor fields not recorded."""
        content = {k: v for k, v in asdict(self).items() if k != "packages"}
        content = {k: v for k, v in content.items() if v != "" or k not in _LATER}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def named(self, prefix: str) -> list[str]:
        """Return the data files that start with ``prefix``, in order."""
        return sorted(name for name in self.files if name.startswith(prefix))

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` atomically."""
        content = seal({"format": FORMAT, **asdict(self)})
        write_json(folder / MANIFEST_NAME, content, sort=True)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check ``manifest.json``.

        Raises:
            StoreError: The folder or manifest is missing, unfinished, foreign, damaged or of
                another format version.
        """
        if not folder.is_dir():
            raise StoreError(
                f"no feature store at {folder}: the folder does not exist; "
                f"make one with `tprl encode`"
            )
        path = folder / MANIFEST_NAME
        if not path.is_file():
            if (folder / JOURNAL_NAME).is_file():
                raise StoreError(
                    f"the feature store {folder} is unfinished (it has no {MANIFEST_NAME}); "
                    f"run the same `tprl encode` again, it continues where it stopped"
                )
            raise StoreError(
                f"{folder} is not a feature store (it has no {MANIFEST_NAME}); "
                f"give a folder written by `tprl encode`"
            )
        content = read_json(path)
        if content.pop("format", None) != FORMAT:
            raise StoreError(
                f"{folder} is not a feature store ({MANIFEST_NAME} belongs to something else); "
                f"give a folder written by `tprl encode`"
            )
        if content.get("version") not in READABLE:
            raise StoreError(
                f"the feature store {folder} has format version {content.get('version')!r}, this "
                f"package reads versions {' and '.join(map(str, READABLE))}; encode it again with "
                f"resume=False"
            )
        check_seal(path, {"format": FORMAT, **content}, CURE)
        content.pop(SEAL, None)
        wanted = {field.name for field in fields(cls)}
        wrong = (wanted - set(content) - set(_LATER)) | (set(content) - wanted)
        if wrong:
            raise StoreError(
                f"{path} is damaged: fields {sorted(wrong)} are missing or unknown; encode the "
                f"store again with resume=False"
            )
        try:
            for name, entry in content["files"].items():
                check_numbers(path, entry, ("rows", "bytes"), CURE)
                if not _DATA_FILE.fullmatch(name) or not isinstance(entry["sha256"], str):
                    raise TypeError(name)
            content["files"] = {k: FileEntry(**v) for k, v in content["files"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path} is damaged: its table of files is malformed; encode the store again with "
                f"resume=False"
            ) from error
        check_numbers(path, content, _COUNTS, CURE)
        odd = [name for name in _TEXTS if not isinstance(content[name], str)]
        odd += ["packages"] * (not isinstance(content["packages"], dict))
        if odd:
            raise StoreError(f"{path} is damaged: {odd[0]} is of another type; {CURE}")
        return cls(**content)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        StoreError: The file cannot be read, is truncated, or holds something else than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # numbers of 5000 digits too
        raise StoreError(
            f"{path} is damaged or unreadable ({error}); encode the store again with resume=False"
        ) from error
    if not isinstance(content, dict):
        raise StoreError(
            f"{path} is damaged: expected a JSON object; encode the store again with resume=False"
        )
    return content


def check_numbers(where: Path, content: Mapping[str, Any], names: Iterable[str], cure: str) -> None:
    """Check that fields are whole numbers that a machine word holds, not below 0.

    Raises:
        StoreError: One is not.
    """
    for name in names:
        value = content[name]
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**62:
            text = str(value) if not isinstance(value, int) else "a number out of range"
            raise StoreError(
                f"{where} is damaged: {name} must be a whole number of at least 0, got "
                f"{text[:60]!r}; {cure}"
            )


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a JSON file with its checksum."""
    return {**content, SEAL: _content_sha256(content)}


def check_seal(path: Path, content: Mapping[str, Any], cure: str) -> None:
    """Compare a JSON file's content with the checksum in it, if it has one.

    Raises:
        StoreError: They differ.
    """
    rest = {name: value for name, value in content.items() if name != SEAL}
    if SEAL in content and content[SEAL] != _content_sha256(rest):
        raise StoreError(
            f"{path} is damaged: its fields do not have the checksum that was written with them; "
            f"{cure}"
        )


def _content_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextmanager
def trust_files(trust: bool = True) -> Iterator[None]:
    """Compare sizes only, no checksums, where stores are opened without saying how.

    Processes that start meanwhile on this machine do the same.

    Args:
        trust: False changes nothing.
    """
    before = os.environ.get(_TRUST)
    if trust:
        os.environ[_TRUST] = "1"
    try:
        yield
    finally:
        if trust and before is None:
            del os.environ[_TRUST]


def trusting(function: Callable[P, R]) -> Callable[P, R]:
    """Run a function that has the keyword ``trust`` within `trust_files` where it is given."""

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with trust_files(bool(kwargs.get("trust", False))):
            return function(*args, **kwargs)

    return wrapped


def default_verify() -> Verify:
    """How files are checked where nothing is said: each byte once, or sizes (`trust_files`)."""
    return "sizes" if os.environ.get(_TRUST) == "1" else "once"


def describe_file(path: Path, rows: int) -> FileEntry:
    """Return size and digest of a finished data file that this process has written."""
    entry = FileEntry(rows=rows, bytes=path.stat().st_size, sha256=file_sha256(path))
    _verified.add(_state(path, entry))
    return entry


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _state(path: Path, entry: FileEntry) -> tuple[str, int, int, int, str]:
    found = path.stat()
    return (str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, entry.sha256)


def check_file(path: Path, entry: FileEntry, *, verify: Verify, cure: str) -> None:
    """Compare a data file with what was recorded about it.

    Raises:
        StoreError: The file is missing, has another size, or (unless ``verify`` is ``"sizes"``)
            other content.
    """
    try:
        size = path.stat().st_size
    except OSError:
        raise StoreError(f"{path} is missing from its feature store; {cure}") from None
    if size != entry.bytes:
        raise StoreError(
            f"{path} has {size} bytes, its feature store recorded {entry.bytes}: the file is "
            f"truncated or was replaced; {cure}"
        )
    if verify == "sizes" or (verify == "once" and _state(path, entry) in _verified):
        return
    state = _state(path, entry)  # of before: what changes while it is read counts as unread
    if file_sha256(path) != entry.sha256:
        raise StoreError(f"{path} does not have its recorded checksum: bytes changed; {cure}")
    _verified.add(state)
