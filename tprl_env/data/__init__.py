"""Datasets: every one yields ``Sample`` records, and ``load_dataset`` finds it by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

from tprl_env.checks import did_you_mean
from tprl_env.data.jsonl import BadSampleError, JsonlDataset, NoSamplesError
from tprl_env.data.sample import Sample

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
) -> Dataset:
    """Load a dataset by name, or a local JSON-lines file.

    Args:
        name: A name in ``DATASETS``, or the path of a ``.jsonl`` file (see ``data.jsonl``).
        split: ``"train"``, ``"calibration"`` or ``"test"``; a file is one split, so there this
            is ignored.
        limit: Number of samples; ``None`` means all of a file and 200 scenes otherwise.
        seed: Chooses other scenes of the same split; a file ignores it.
        skip_bad: Leave out the samples of a file that cannot be read, and count them.
        allow_outside: Also read pictures that do not lie below a file's folder.

    Returns:
        The samples. Pictures of a file are opened while iterating.

    Raises:
        ValueError: The name is unknown (the nearest known one is named), the limit is below
            one, or the dataset is empty or malformed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    text = str(name)
    if text.endswith(".jsonl"):
        return JsonlDataset(text, limit=limit, skip_bad=skip_bad, allow_outside=allow_outside)
    if text not in DATASETS:
        raise ValueError(
            f"unknown dataset {text!r}, known are {', '.join(DATASETS)} and .jsonl files"
            f"{did_you_mean(text, DATASETS)}"
        )
    from tprl_env.data.scenes import load_scenes

    scenes = DEFAULT_SCENES if limit is None else -(-limit // QUESTIONS_PER_SCENE)
    samples = load_scenes(DATASETS[text], split, scenes, QUESTIONS_PER_SCENE, seed)
    return samples[:limit]
