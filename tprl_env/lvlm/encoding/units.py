"""What is to be encoded: samples are read, checked and cut into units of work."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.journal import DatasetHash, Skipped, picture_digest
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.jsonl import BadSampleError
from tprl_env.data.sample import Sample

logger = logging.getLogger(__name__)

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


def plan_units(samples: Iterable[Sample], shard_images: int) -> Iterator[Unit]:
    """Cut samples into units; the same samples are always cut in the same way.

    Args:
        samples: In the order of the store.
        shard_images: Largest number of new images in a unit.

    Raises:
        StoreError: An id occurs twice, or an image id stands for two different pictures.
    """
    numbers: dict[str, int] = {}
    digests: list[bytes] = []
    ids: set[str] = set()
    running = DatasetHash()
    unit = Unit(0, 0)
    pictures: dict[int, npt.NDArray[np.uint8]] = {}
    for sample in samples:
        if sample.id in ids:
            raise StoreError(f"the sample id {sample.id!r} occurs twice; make ids unique")
        ids.add(sample.id)
        new = sample.image_id not in numbers
        if (new and len(unit.new) == shard_images) or (
            len(unit.samples) == _SAMPLES_PER_IMAGE * shard_images
        ):
            unit.dataset = running.digest()
            yield unit
            unit = Unit(unit.number + 1, len(numbers))
            pictures = {}
        digest = picture_digest(sample.image)
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
        shared = pictures.setdefault(number, sample.image)
        unit.samples.append(replace(sample, image=shared))
        unit.images.append(number)
    if unit.samples:
        unit.dataset = running.digest()
        yield unit


class SkippingReader:
    """Samples of an iterable, without those it raises ``BadSampleError`` for if wanted."""

    def __init__(self, samples: Iterable[Sample], skip_bad: bool) -> None:
        self._source = samples
        self._skip_bad = skip_bad
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
            BadSampleError: A sample is bad and ``skip_bad`` is off, or the iterable cannot go on:
                it skips by itself and has nothing left, or is a generator, which would end
                silently at the first bad sample.
        """
        iterator = iter(self._source)
        ends = inspect.isgenerator(iterator) or getattr(self._source, "skip_bad", False)
        while True:
            try:
                sample = next(iterator)
            except StopIteration:
                return
            except BadSampleError as error:
                if not self._skip_bad or ends:
                    raise
                self._own.append({"id": error.sample, "reason": str(error)})
                logger.warning("left out: %s", error)
                continue
            yield sample


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
