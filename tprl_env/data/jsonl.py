"""Samples from a local JSON-lines file.

One object per line::

    {"id": "q1", "image": "pictures/1.png", "question": "what is it?", "answers": ["a cat"]}

``image`` is relative to the file and lies below its folder; a question about several pictures has
``"images": [...]`` in its place. ``question_type``, ``grader`` and ``image_id`` are optional;
samples with the same pictures share them. Ids may be whole numbers, and ``answers`` one string or
number: they become strings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tprl_env.checks import check_choice
from tprl_env.data.graders import GRADERS
from tprl_env.data.records import (
    BadSampleError,
    answers_field,
    id_field,
    names_field,
    read_records,
    text_field,
)
from tprl_env.data.sample import Sample

__all__ = ["BadSampleError", "JsonlDataset", "NoSamplesError", "log_left_out"]

logger = logging.getLogger(__name__)

_REQUIRED = ("id", "image", "question", "answers")
_KNOWN = (*_REQUIRED, "images", "question_type", "grader", "image_id")
_RENAMED = {"metric": "grader", "kind": "question_type"}
_MAX_TEXT = 100_000  # characters of a question or answer; no context of an LVLM takes more
_LOGGED = 10  # bad samples that are logged one by one
_LOGGED_LENGTH = 500
_SKIP = "or pass skip_bad=True"


class NoSamplesError(ValueError):
    """No sample is left: every one was left out."""


def log_left_out(number: int, message: str) -> None:
    """Log the ``number``-th sample that is left out; only the first few, and bounded.

    Args:
        number: How many were left out, this one included.
        message: Why.
    """
    if number <= _LOGGED:
        logger.warning("left out: %s", message[:_LOGGED_LENGTH])
    if number == _LOGGED:
        logger.warning("further samples that are left out are counted, not logged")


class JsonlDataset:
    """A re-iterable dataset; pictures are opened one by one while iterating.

    Args:
        path: The file.
        limit: Use only the first this many samples.
        skip_bad: Leave out samples that cannot be used instead of raising; they are counted in
            ``skipped`` and logged.
        allow_outside: Also read pictures that do not lie below the file's folder.

    Attributes:
        description: File name and limit, for manifests.
        skipped: Messages of the samples left out by the latest iteration.
        skipped_ids: Their ids.

    Raises:
        ValueError: The file is missing or empty, or an id occurs twice.
        BadSampleError: A line is not a JSON object with the known fields or names an unknown
            grader (never skipped: the file itself is wrong then), or a picture is outside.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        limit: int | None = None,
        skip_bad: bool = False,
        allow_outside: bool = False,
    ) -> None:
        self.path = Path(path)
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.skipped_ids: list[str] = []
        self.description = self.path.name + (f" limit {limit}" if limit is not None else "")
        self._root = None if allow_outside else self.path.parent.resolve()
        numbered = islice(read_records(self.path), limit)
        self._records = [self._check(number, record) for number, record in numbered]
        if not self._records:
            raise ValueError(f"the dataset {self.path} has no samples; add some lines to it")
        seen: dict[str, int] = {}
        for record in self._records:
            first = seen.setdefault(record["id"], record["line"])
            if first != record["line"]:
                raise ValueError(
                    f"the dataset {self.path} has the id {record['id']!r} twice, in lines {first} "
                    f"and {record['line']}; make ids unique"
                )
            for name in record["images"]:
                if (name.startswith("/") or ".." in name) and not skip_bad:
                    self._file(record, name)  # said before an LVLM is loaded

    def _check(self, number: int, record: dict[str, Any]) -> dict[str, Any]:
        where = f"{self.path} line {number}"
        for old in _RENAMED.keys() & record:
            raise BadSampleError(
                f"{where}: the field {old!r} is now {_RENAMED[old]!r}; rename it in the file"
            )
        if "image" in record and "images" in record:
            raise BadSampleError(
                f"{where} has both 'image' and 'images'; keep 'image' for one picture, or 'images' "
                f"for a list of them"
            )
        given = record.keys() | ({"image"} if "images" in record else set())
        missing = [name for name in _REQUIRED if name not in given]
        unknown = [name[:50] for name in record if name not in _KNOWN]
        if missing or unknown:
            raise BadSampleError(
                f"{where} lacks {missing} and has unknown fields {unknown[:5]}; "
                f"the fields are {', '.join(_KNOWN)}"
            )
        checked: dict[str, Any] = {"line": number, "where": where}
        for name in record:
            if name == "answers":
                checked[name] = answers_field(record, name, where)
            elif name == "images":
                checked[name] = names_field(record, name, where)
            elif name in ("id", "image_id"):
                checked[name] = id_field(record, name, where)
            else:
                checked[name] = text_field(record, name, where)
        try:
            check_choice(f"{where}: grader", checked.get("grader", "exact"), GRADERS)
        except ValueError as error:
            raise BadSampleError(str(error)) from error
        checked.setdefault("images", (checked.pop("image", ""),))
        return checked

    def _file(self, record: dict[str, Any], name: str) -> Path:
        """Where a picture of a sample is.

        Raises:
            BadSampleError: Outside of the data folder, or no name of a file.
        """
        file = self.path.parent / name
        if self._root is None:
            return file
        where = f"sample {record['id']!r} of {self.path} line {record['line']}: the image"
        try:
            resolved = file.resolve()  # symbolic links must not lead out either
        except (OSError, RuntimeError, ValueError) as error:
            raise BadSampleError(
                f"{where} {name[:200]!r} cannot be found ({error}), {_SKIP}",
                sample=record["id"],
            ) from error
        if not resolved.is_relative_to(self._root):
            raise BadSampleError(
                f"{where} {name[:200]!r} lies outside of the data folder {self._root}; "
                f"move it there or pass allow_outside=True",
                sample=record["id"],
            )
        return resolved

    def __len__(self) -> int:
        """Return the number of samples, those that turn out to be bad included."""
        return len(self._records)

    def __iter__(self) -> Iterator[Sample]:
        """Read the samples in order.

        Raises:
            BadSampleError: A picture cannot be read, a question is empty or an answer is
                missing. The iterator survives: the next ``next`` yields the next sample.
        """
        self.skipped, self.skipped_ids = [], []
        return _Reader(self)

    def read(self, index: int) -> Sample:
        """Read one sample.

        Raises:
            BadSampleError: It cannot be used.
        """
        from tprl_env.data.pictures import PictureError, read_picture

        record = self._records[index]
        where = f"sample {record['id']!r} of {self.path} line {record['line']}"
        for text in (record["question"], *record["answers"]):
            if len(text) > _MAX_TEXT:
                raise BadSampleError(
                    f"{where}: a text of {len(text)} characters, at most {_MAX_TEXT} are read; "
                    f"shorten it, {_SKIP}",
                    sample=record["id"],
                )
        images = []
        for number, name in enumerate(record["images"], start=1):
            try:
                images.append(read_picture(self._file(record, name)))
            except PictureError as error:
                which = "the image" if len(record["images"]) == 1 else f"image {number}"
                raise BadSampleError(
                    f"{where}: cannot read {which} {error}, {_SKIP}", sample=record["id"]
                ) from error
        try:
            return Sample(
                id=record["id"],
                image=images[0],
                question=record["question"],
                answers=record["answers"],
                image_id=record.get("image_id", " + ".join(record["images"])),
                question_type=record.get("question_type", ""),
                grader=record.get("grader", "exact"),
                meta={"where": record["where"]},
                more_images=tuple(images[1:]),
            )
        except ValueError as error:
            raise BadSampleError(
                f"{record['where']}: {error}, {_SKIP}", sample=record["id"]
            ) from error


class _Reader:
    """Iterator over a dataset that is still usable after it raised."""

    def __init__(self, dataset: JsonlDataset) -> None:
        self._dataset = dataset
        self._next = 0

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> Sample:
        while self._next < len(self._dataset):
            self._next += 1
            try:
                return self._dataset.read(self._next - 1)
            except BadSampleError as error:
                if not self._dataset.skip_bad:
                    raise
                reason = str(error).removesuffix(f", {_SKIP}")
                self._dataset.skipped.append(reason)
                self._dataset.skipped_ids.append(error.sample)
                log_left_out(len(self._dataset.skipped), reason)
        if len(self._dataset.skipped) == len(self._dataset):
            # not a BadSampleError, which readers pass over
            raise NoSamplesError(
                f"no sample of {self._dataset.path} is left: every sample was left out, the first "
                f"because: {self._dataset.skipped[0]}"
            )
        raise StopIteration
