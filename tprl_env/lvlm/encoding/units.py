"""Units of encoding work: samples are read, checked and cut into units."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.journal import DatasetHash, Journal, Skipped, picture_digest
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.jsonl import BadSampleError, NoSamplesError, log_left_out
from tprl_env.data.sample import Sample

COMPUTED_GRADER = "exact"  # teacher-forced exact match, the only score that encoding computes
_SAMPLES_PER_IMAGE = 16  # a unit holds at most this many samples per image it may hold


@dataclass
class Unit:
    """A run of samples and the images that appear in it for the first time.

    Attributes:
        number: Place in the store.
        samples: The samples in order.
        images: Number of each sample's image.
        new: First sample of each new image, in order of the images' numbers.
        first_image: Number of the first new image.
        dataset: Hash of the dataset up to the last sample.
    """

    number: int
    first_image: int
    samples: list[Sample] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    new: list[Sample] = field(default_factory=list)
    dataset: str = ""


def plan_units(
    samples: Iterable[Sample], shard_images: int, cuts: Sequence[int] = ()
) -> Iterator[Unit]:
    """Cut samples into units; the same samples are always cut in the same way.

    Args:
        samples: In the order of the store.
        shard_images: Largest number of new images in a unit.
        cuts: Samples in each unit that is written already.

    Raises:
        StoreError: An id occurs twice, or one image id has two different pictures.
    """
    numbers: dict[str, int] = {}
    digests: list[bytes] = []
    ids: set[str] = set()
    running = DatasetHash()
    unit = Unit(0, 0)
    pictures: dict[int, tuple[npt.NDArray[np.uint8], ...]] = {}
    for sample in samples:
        if sample.id in ids:
            raise StoreError(f"the sample id {sample.id!r} occurs twice; make ids unique")
        ids.add(sample.id)
        new = sample.image_id not in numbers
        if unit.number < len(cuts):
            full = len(unit.samples) == cuts[unit.number]
        else:
            full = new and len(unit.new) == shard_images
            full = full or len(unit.samples) == _SAMPLES_PER_IMAGE * shard_images
        if full:
            unit.dataset = running.digest()
            yield unit
            unit = Unit(unit.number + 1, len(numbers))
            pictures = {}
        digest = picture_digest(*sample.images)
        if new:
            numbers[sample.image_id] = len(numbers)
            digests.append(digest)
            unit.new.append(sample)
        number = numbers[sample.image_id]
        if digests[number] != digest:
            raise StoreError(
                f"sample {sample.id!r} shows another picture than earlier samples with the "
                f"image id {sample.image_id!r}; give different pictures different image ids"
            )
        running.add(sample, digest)
        # Questions about one picture share its memory, here and when a unit is pickled.
        first, *more = pictures.setdefault(number, sample.images)
        unit.samples.append(replace(sample, image=first, more_images=tuple(more)))
        unit.images.append(number)
    if unit.samples:
        unit.dataset = running.digest()
        yield unit


def check_unit(journal: Journal, unit: Unit) -> None:
    """Compare a unit with the one that an earlier run wrote.

    Raises:
        StoreError: It holds other samples.
    """
    journal.check(unit.number, unit.dataset, unit.samples[0].id, unit.samples[-1].id)


class SkippingReader:
    """Samples of an iterable; the bad ones raise ``BadSampleError``, or are left out if wanted.

    Bad are those that the iterable raises ``BadSampleError`` for, and those that ask for a grader
    that is not computed: they must not be scored by another one without a word.

    Attributes:
        skipped: Samples left out, those that the iterable itself skipped included.
    """

    def __init__(self, samples: Iterable[Sample], skip_bad: bool, graded: bool = False) -> None:
        self._source = samples
        self._skip_bad = skip_bad
        self._graded = graded
        self._own: list[Skipped] = []

    @property
    def skipped(self) -> list[Skipped]:
        """Samples left out so far, those that the iterable itself skipped included."""
        reasons = getattr(self._source, "skipped", ())
        ids = getattr(self._source, "skipped_ids", [""] * len(reasons))
        own = zip(ids, reasons, strict=True)
        return [*({"id": name, "reason": reason} for name, reason in own), *self._own]

    def __iter__(self) -> Iterator[Sample]:
        """Read the samples.

        Raises:
            BadSampleError: A sample is bad and ``skip_bad`` is off, or the iterable is a
                generator, which would end silently at the first bad sample.
            NoSamplesError: All of them were left out.
        """
        iterator = iter(self._source)
        read, before = 0, ""
        while True:
            try:
                sample = next(iterator)
            except StopIteration:
                break
            except BadSampleError as error:
                # the same complaint again is an iterator that does not go on
                if not self._skip_bad or inspect.isgenerator(iterator) or str(error) == before:
                    raise
                before = str(error)
                self._leave_out(error.sample, before)
                continue
            if self._graded or sample.grader == COMPUTED_GRADER:
                read += 1
                yield sample
                continue
            refused = BadSampleError(
                f"sample {sample.id!r} asks for the grader {sample.grader!r}, but only "
                f'"{COMPUTED_GRADER}" (teacher-forced exact match) is computed; pass grade=True to '
                f'have answers written and graded, set "grader": "{COMPUTED_GRADER}" in a file or '
                f'grader="{COMPUTED_GRADER}" for a benchmark, or pass skip_bad=True',
                sample=sample.id,
            )
            if not self._skip_bad:
                raise refused
            self._leave_out(sample.id, str(refused))
        if self._own and not read:
            raise NoSamplesError(
                f"no sample is left: every sample was left out, the first because: "
                f"{self._own[0]['reason']}"
            )

    def _leave_out(self, name: str, reason: str) -> None:
        self._own.append({"id": name, "reason": reason})
        log_left_out(len(self._own), reason)


def describe_dataset(description: str | Mapping[str, Any] | None, samples: object) -> str:
    """Return the text that names a dataset in the manifest."""
    if description is None:
        return str(getattr(samples, "description", ""))
    if isinstance(description, str):
        return description
    return json.dumps(dict(description), sort_keys=True, default=str)


def count_samples(samples: object) -> int | None:
    """Return the number of samples, or None when only reading them would tell."""
    return len(samples) if isinstance(samples, Sized) else None
