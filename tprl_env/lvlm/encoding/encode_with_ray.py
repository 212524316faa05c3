"""Encoding with many workers: the units of ``encode.py`` as a Ray Data pipeline.

Each worker loads the LVLM once and writes the files of whole units into the store's folder, so
features never travel: pictures go out, sizes and checksums come back. The folder must be on a
disk that every worker sees, as it must be for training.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from tprl_env.data.features.journal import Journal, UnitEntry
from tprl_env.data.features.manifest import StoreError, trusting
from tprl_env.data.features.placement import StoredVisual
from tprl_env.data.features.store import FeatureStore
from tprl_env.data.jsonl import BadSampleError
from tprl_env.data.sample import Sample
from tprl_env.lvlm.encoding.bad_samples import finish, warn_of_low_scores
from tprl_env.lvlm.encoding.encode import (
    check_sizes,
    full_disk_as_store_error,
    lvlm_identity,
    to_numpy,
    unit_settings,
    write_unit,
    writing,
)
from tprl_env.lvlm.encoding.units import (
    SkippingReader,
    Unit,
    check_unit,
    count_samples,
    describe_dataset,
    plan_units,
)
from tprl_env.lvlm.picture_sets import joined_visual
from tprl_env.ray_session import ray_session

if TYPE_CHECKING:
    from tprl_env.lvlm.protocol import LVLM

logger = logging.getLogger(__name__)

LoadLVLM = Callable[[], "LVLM"]


class UnitWorker:
    """Ray Data actor: one LVLM, one unit at a time."""

    def __init__(
        self,
        load: str | LoadLVLM,
        folder: str,
        batch_size: int,
        tower: bool,
        skip_bad: bool,
        grade: int = 0,
    ) -> None:
        if isinstance(load, str):
            from tprl_env.lvlm import load_lvlm

            self._lvlm: LVLM = load_lvlm(load)
        else:
            self._lvlm = load()
        self._identity = lvlm_identity(self._lvlm)
        self._folder = Path(folder)
        self._batch_size = batch_size
        self._tower = tower
        self._skip_bad = skip_bad
        self._grade = grade

    def __call__(self, batch: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        """Write the units of a batch; returns their entries as JSON."""
        results = []
        for data in batch["unit"]:
            # Written by our own driver a moment ago, not a user's file.
            unit: Unit = pickle.loads(data)
            try:
                entry = self._write(unit)
            except BadSampleError as error:  # the sentence, without Ray's traceback around it
                results.append({"unit": unit.number, "bad": str(error), "sample": error.sample})
                continue
            except StoreError as error:
                results.append({"unit": unit.number, "refused": str(error)})
                continue
            results.append({"unit": unit.number, "entry": asdict(entry), "lvlm": self._identity})
        return {"result": [json.dumps(result) for result in results]}

    def _write(self, unit: Unit) -> UnitEntry:
        again = partial(self._again, unit)
        with full_disk_as_store_error(self._folder):
            return write_unit(
                self._lvlm,
                unit,
                self._folder,
                self._batch_size,
                self._tower,
                again,
                self._skip_bad,
                self._grade,
            )

    def _again(self, unit: Unit, image: int) -> StoredVisual:
        """Encode an image of an earlier unit again: that unit may not be written yet."""
        sample = unit.samples[unit.images.index(image)]
        visual = joined_visual(self._lvlm.encode_images(sample.images), sample.images)
        tokens = to_numpy(visual.tokens).astype(np.float16)
        placement = getattr(visual, "placement", None)
        return StoredVisual(tokens, visual.grid, placement, getattr(visual, "placeholder", ""))


@trusting
def encode_dataset_ray(
    lvlm: str | LoadLVLM,
    samples: Iterable[Sample],
    out: str | Path,
    *,
    num_gpus: float = 0,
    concurrency: int = 1,
    num_cpus: float = 1,
    batch_size: int = 64,
    tower: bool = True,
    shard_images: int = 256,
    resume: bool = True,
    skip_bad: bool = False,
    progress: bool = True,
    description: str | Mapping[str, Any] | None = None,
    trust: bool = False,
    grade: bool = False,
    wave_bytes: int = 4 << 30,
) -> FeatureStore:
    """Encode samples with several workers; content and arguments as in ``encode_dataset``.

    Args:
        lvlm: Name for ``load_lvlm``, or a function that loads the LVLM inside a worker.
        samples: Read once, in order, by this process.
        out: Folder of the store, on a disk that every worker sees.
        num_gpus: GPUs per worker; 0 encodes on CPUs.
        concurrency: Number of workers.
        num_cpus: CPUs per worker.
        batch_size: Images, and questions, per call of the LVLM.
        tower: Store the vision-tower features too.
        shard_images: Images per unit of work and per file.
        resume: Continue what is in ``out``; ``False`` removes it and starts over.
        skip_bad: Leave out bad samples as ``encode_dataset`` does, count and list them.
        progress: Show a progress bar.
        description: Names the dataset in the manifest; by default the samples' own.
        trust: Compare sizes of files there already, not their checksums (``--trust``).
        grade: Also write and grade answers, as ``encode_dataset`` does.
        wave_bytes: Pictures handed to Ray at a time; workers load the LVLM once per wave.

    Returns:
        The finished store.

    Raises:
        StoreError: As for ``encode_dataset``, or a worker failed.
        FolderInUseError: As for ``encode_dataset``.
        BadSampleError: As for ``encode_dataset``.
        ValueError: A size is below one, or the cluster has too few resources for one worker.
    """
    check_sizes(batch_size, shard_images)
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, got {concurrency}")
    folder = Path(out).resolve()
    settings = unit_settings(tower, shard_images, grade)
    reader = SkippingReader(samples, skip_bad, grade)
    total = count_samples(samples)
    dataset = describe_dataset(description, samples)
    worker = (lvlm, str(folder), batch_size, tower, skip_bad, settings.get("grade", 0))
    resources = {"num_gpus": num_gpus, "num_cpus": num_cpus, "concurrency": concurrency}
    units, started = 0, False
    bar = tqdm(total=total, unit=" samples", desc="encode", disable=not progress)
    with (
        ExitStack() as cluster,
        writing(folder),
        bar,
        full_disk_as_store_error(folder),
        _one_sentence(),
    ):
        journal = Journal.start(folder, dataset, settings, resume=resume)
        for wave in _waves(plan_units(reader, shard_images, journal.cuts), wave_bytes):
            units += len(wave)
            for unit in wave:
                if unit.number < len(journal.units):
                    check_unit(journal, unit)
            todo = [unit for unit in wave if unit.number >= len(journal.units)]
            bar.update(sum(len(u.samples) for u in wave) - sum(len(u.samples) for u in todo))
            sizes = {unit.number: len(unit.samples) for unit in todo}
            if todo and not started:
                cluster.enter_context(ray_session(0))
                started = True
            for number in _run_wave(todo, worker, resources, journal):
                bar.update(sizes[number])
        finish(journal, units, reader)
    store = FeatureStore.open(folder)
    warn_of_low_scores(store, None)
    return store


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turn a worker's failure into one sentence; Ray's text is the worker's whole traceback.

    Raises:
        StoreError: A worker failed.
    """
    from ray.exceptions import RayError

    try:
        yield
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise StoreError(f"an encoding worker failed ({reason})") from error


def _waves(units: Iterable[Unit], wave_bytes: int) -> Iterator[list[Unit]]:
    wave: list[Unit] = []
    size = 0
    for unit in units:
        wave.append(unit)
        size += sum(image.nbytes for sample in unit.new for image in sample.images)
        if size >= wave_bytes:
            yield wave
            wave, size = [], 0
    if wave:
        yield wave


def _check_resources(num_cpus: float, num_gpus: float) -> None:
    """Refuse workers that could never start; Ray would wait for them without an end."""
    import ray

    available = ray.cluster_resources()
    for name, wanted in (("CPU", num_cpus), ("GPU", num_gpus)):
        if wanted > available.get(name, 0):
            raise ValueError(
                f"each encoding worker wants {wanted:g} {name}, the whole Ray cluster has "
                f"{available.get(name, 0):g}; lower num_{name.lower()}s or add a node"
            )


def _run_wave(
    units: list[Unit], worker: tuple[Any, ...], resources: dict[str, Any], journal: Journal
) -> Iterator[int]:
    """Run units on the workers; commit them in order, whatever order they finish in."""
    if not units:
        return
    import ray.data

    _check_resources(resources["num_cpus"], resources["num_gpus"])
    rows = ray.data.from_items(
        [{"unit": pickle.dumps(unit)} for unit in units], override_num_blocks=len(units)
    )
    done = rows.map_batches(
        UnitWorker, fn_constructor_args=worker, batch_size=1, batch_format="numpy", **resources
    )
    waiting: dict[int, UnitEntry] = {}
    for row in done.iter_rows():
        result = json.loads(row["result"])
        if "bad" in result:
            raise BadSampleError(result["bad"], sample=result["sample"])
        if "refused" in result:
            raise StoreError(result["refused"])
        journal.identify(result["lvlm"])
        waiting[result["unit"]] = UnitEntry.from_json(result["entry"])
        while len(journal.units) in waiting:
            number = len(journal.units)
            journal.commit(waiting.pop(number))
            yield number
