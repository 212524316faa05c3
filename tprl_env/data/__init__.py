"""Datasets: every one yields ``Sample`` records, and ``load_dataset`` finds it by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tprl_env.checks import did_you_mean
from tprl_env.data.jsonl import BadSampleError, JsonlDataset, NoSamplesError
from tprl_env.data.sample import Sample

if TYPE_CHECKING:
    from tprl_env.data.benchmarks import BenchmarkDataset

__all__ = [
    "DATASETS",
    "BadSampleError",
    "Dataset",
    "JsonlDataset",
    "NoSamplesError",
    "Sample",
    "load_dataset",
]

QUESTIONS_PER_SCENE = 6
DEFAULT_SCENES = 200

# Name of a built-in dataset -> task of tprl_env.data.scenes that makes it.
DATASETS: dict[str, str] = {
    "scenes-crowded": "crowded",
    "scenes-sparse": "sparse",
}


class Dataset(Iterable[Sample], Protocol):
    """Samples that can be counted and read again from the start."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __iter__(self) -> Iterator[Sample]:
        """Read the samples in order."""
        ...


def load_dataset(
    name: str | Path,
    split: str = "train",
    limit: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
    allow_outside: bool = False,
    place: str | None = None,
    grader: str | None = None,
) -> Dataset | BenchmarkDataset:
    """Load a dataset by name, a benchmark, or a local JSON-lines file.

    Args:
        name: A name in ``DATASETS`` or in ``data.benchmarks.BENCHMARKS``, or the path of a
            ``.jsonl`` file (see ``data.jsonl``).
        split: ``"train"``, ``"calibration"`` or ``"test"``; a benchmark's own; a file is one split,
            so there this is ignored.
        limit: Number of samples; ``None`` means all of a file and 200 scenes otherwise.
        seed: Chooses other scenes of the same split; a file ignores it.
        skip_bad: Leave out the samples of a file that cannot be read, and count them.
        allow_outside: Also read pictures that do not lie below a file's folder.
        place: Folder of a benchmark's copy; see ``load_benchmark``.
        grader: Another grader than the benchmark's.

    Returns:
        The samples. Pictures of a file are opened while iterating.

    Raises:
        ValueError: The name is unknown (the nearest known one is named), the limit is below
            one, or the dataset is empty or malformed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    text = str(name)
    from tprl_env.data.benchmarks import BENCHMARKS, load_benchmark

    if text in BENCHMARKS:
        options = {"limit": limit, "skip_bad": skip_bad, "grader": grader}
        return load_benchmark(text, split, place=place, **options)  # type: ignore[arg-type]
    if place is not None or grader is not None:
        raise ValueError(
            f"place and grader belong to a benchmark, and {text!r} is none; benchmarks are "
            f"{', '.join(BENCHMARKS)}"
        )
    if text.endswith(".jsonl"):
        return JsonlDataset(text, limit=limit, skip_bad=skip_bad, allow_outside=allow_outside)
    if text not in DATASETS:
        known = (*DATASETS, *BENCHMARKS)
        raise ValueError(
            f"unknown dataset {text!r}, known are {', '.join(known)} and .jsonl files"
            f"{did_you_mean(text, known)}"
        )
    from tprl_env.data.scenes import load_scenes

    scenes = DEFAULT_SCENES if limit is None else -(-limit // QUESTIONS_PER_SCENE)
    samples = load_scenes(DATASETS[text], split, scenes, QUESTIONS_PER_SCENE, seed)
    return samples[:limit]
