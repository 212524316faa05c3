"""Samples from a local JSON-lines file.

One object per line::

    {"id": "q1", "image": "pictures/1.png", "question": "what is it?", "answers": ["a cat"]}

``image`` is relative to the file. ``question_type``, ``grader`` and ``image_id`` are optional;
samples with the same ``image`` share one picture.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.sample import Sample

logger = logging.getLogger(__name__)

_REQUIRED = ("id", "image", "question", "answers")
_KNOWN = (*_REQUIRED, "question_type", "grader", "image_id")


class BadSampleError(ValueError):
    """A sample cannot be used; the message names it and the file.

    Attributes:
        sample: Its id, empty where it has none.
    """

    def __init__(self, message: str, sample: str = "") -> None:
        super().__init__(message)
        self.sample = sample


class JsonlDataset:
    """A re-iterable dataset; pictures are opened one by one while iterating.

    Args:
        path: The file.
        limit: Use only the first this many samples.
        skip_bad: Leave out samples that cannot be used instead of raising; they are counted in
            ``skipped`` and logged.

    Attributes:
        description: File name and limit, for manifests.
        skipped: Messages of the samples left out by the latest iteration.
        skipped_ids: Their ids.

    Raises:
        ValueError: The file is missing or empty, or an id occurs twice.
        BadSampleError: A line is not a JSON object with the known fields (never skipped: the
            file itself is wrong then).
    """

    def __init__(
        self, path: str | Path, *, limit: int | None = None, skip_bad: bool = False
    ) -> None:
        self.path = Path(path)
        self.skip_bad = skip_bad
        self.skipped: list[str] = []
        self.skipped_ids: list[str] = []
        self.description = self.path.name + (f" limit {limit}" if limit is not None else "")
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ValueError(f"cannot read the dataset {self.path}: {error.strerror}") from error
        numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
        self._records = [self._parse(n, line) for n, line in islice(numbered, limit)]
        if not self._records:
            raise ValueError(f"the dataset {self.path} has no samples; add some lines to it")
        seen: set[str] = set()
        for record in self._records:
            if record["id"] in seen:
                raise ValueError(
                    f"the dataset {self.path} has the id {record['id']!r} twice; make ids unique"
                )
            seen.add(record["id"])

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        where = f"{self.path} line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadSampleError(
                f"{where} is not JSON ({error.msg}); write one object per line"
            ) from error
        if not isinstance(record, dict):
            raise BadSampleError(f"{where} is not a JSON object; write one object per line")
        missing = [name for name in _REQUIRED if name not in record]
        unknown = [name for name in record if name not in _KNOWN]
        if missing or unknown:
            raise BadSampleError(
                f"{where} lacks {missing} and has unknown fields {unknown}; "
                f"the fields are {', '.join(_KNOWN)}"
            )
        answers = record["answers"]
        texts = [value for name, value in record.items() if name != "answers"]
        if not (isinstance(answers, list) and all(isinstance(a, str) for a in [*answers, *texts])):
            raise BadSampleError(f"{where}: answers must be a list of strings, the rest strings")
        return {**record, "where": where}

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
        record = self._records[index]
        file = self.path.parent / record["image"]
        try:
            return Sample(
                id=record["id"],
                image=read_rgb(file),
                question=record["question"],
                answers=tuple(record["answers"]),
                image_id=record.get("image_id", record["image"]),
                question_type=record.get("question_type", ""),
                grader=record.get("grader", "exact"),
                meta={"where": record["where"]},
            )
        except OSError as error:
            raise BadSampleError(
                f"sample {record['id']!r} ({record['where']}): cannot read the image {file} "
                f"({error}); repair it or pass --skip-bad",
                sample=record["id"],
            ) from error
        except ValueError as error:
            raise BadSampleError(
                f"{record['where']}: {error}, or pass --skip-bad", sample=record["id"]
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
                self._dataset.skipped.append(str(error))
                self._dataset.skipped_ids.append(error.sample)
                logger.warning("left out: %s", error)
        if len(self._dataset.skipped) == len(self._dataset):
            raise BadSampleError(
                f"every sample of {self._dataset.path} was left out, "
                f"the first because: {self._dataset.skipped[0]}"
            )
        raise StopIteration


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Read a picture as RGB, ``(H, W, 3)``; rotation flags are applied, alpha is dropped.

    Raises:
        OSError: The file is missing, truncated, too large to be a picture, or none at all.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        # Pillow raises these for broken files of some formats.
        raise OSError(f"{type(error).__name__}: {error}") from error
