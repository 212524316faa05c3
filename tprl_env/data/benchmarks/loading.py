"""Rows of a benchmark, from the hub or a folder, as samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from tprl_env.checks import quoted
from tprl_env.data.benchmarks.benchmark import Benchmark, Item
from tprl_env.data.jsonl import BadSampleError, NoSamplesError, log_left_out
from tprl_env.data.sample import Sample

_SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` writes into a folder: several splits, or one."""

_SKIP = "or pass skip_bad=True"


class BenchmarkDataset:
    """One split of a benchmark; re-iterable, rows are opened one by one.

    Attributes:
        name: Its name in the table.
        benchmark: Its row there.
        description: Name, split, place and limit, for manifests.
        fingerprint: Of the data as ``datasets`` knows it; empty where it is streamed.
        skipped: Messages of the rows left out by the latest iteration.
        skipped_ids: Their ids, as far as they are known.
    """

    def __init__(
        self,
        name: str,
        benchmark: Benchmark,
        split: str,
        place: str | None,
        limit: int | None,
        skip_bad: bool,
        streaming: bool,
        grader: str,
    ) -> None:
        """Open the tables; see ``load_benchmark`` for arguments and errors."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.name, self.benchmark, self.skip_bad = name, benchmark, skip_bad
        self._limit, self._grader = limit, grader
        self.skipped: list[str] = []
        self.skipped_ids: list[str] = []
        config, own = benchmark.splits[split]
        self._where = f"benchmark {name!r}, split {split!r}"
        source = place or benchmark.hub
        self._rows = open_table(source, config, own, streaming)
        self._pictures: Mapping[str, int] = {}
        self._table: Any = None
        needed = list(benchmark.columns)
        if split in benchmark.pictures_from:
            self._table = open_table(source, benchmark.pictures_from[split], own, False)
            self._check_columns(self._table, ("id", "image"), "its pictures")
            self._pictures = {str(one): at for at, one in enumerate(self._table["id"])}
        self._check_columns(self._rows, needed, "its rows")
        self.fingerprint = str(getattr(self._rows, "_fingerprint", ""))
        given = "" if place is None else f" from {Path(place).name or place}"
        cut = "" if limit is None else f" limit {limit}"
        self.description = f"{name} {split}{given}{cut}"

    def _check_columns(self, table: Any, wanted: Sequence[str], what: str) -> None:
        found = list(table.column_names or next(iter(table), {}))
        missing = [name for name in wanted if name not in found]
        if missing:
            raise ValueError(
                f"{self._where}: {what} lack the columns {', '.join(missing)}; they have "
                f"{', '.join(found)}. It must be a copy of {self.benchmark.hub}"
            )

    def __iter__(self) -> Iterator[Sample]:
        """Read the samples in order.

        Raises:
            BadSampleError: A row cannot be used and ``skip_bad`` is off.
            NoSamplesError: None is left.
            ValueError: An id occurs twice.
        """
        self.skipped, self.skipped_ids = [], []
        return islice(self._samples(), self._limit)

    def _samples(self) -> Iterator[Sample]:
        seen: set[str] = set()
        for at, row in enumerate(self._rows):
            where = f"{self._where}, row {at}"
            items: Iterable[Item] = ()
            try:
                items = self._items(row, at)
            except (ValueError, KeyError, TypeError, IndexError) as error:
                self._bad(where, "", f"it cannot be read ({quoted(str(error))})", error)
            for item in items:
                if item.id in seen:
                    raise ValueError(f"{where}: the id {item.id!r} occurs twice in this copy")
                seen.add(item.id)
                try:
                    yield self._sample(item, where)
                except ValueError as error:
                    self._bad(where, item.id, str(error), error)
        if self.skipped and not seen - set(self.skipped_ids):
            raise NoSamplesError(
                f"no sample of {self._where} is left, the first was left out because: "
                f"{self.skipped[0]}"
            )

    def _items(self, row: Mapping[str, Any], at: int) -> Iterable[Item]:
        full = {**row, "place": at}
        if self._table is not None:
            picture = str(row["imageId"])
            if picture not in self._pictures:
                raise ValueError(f"there is no picture {picture!r}")
            full["image"] = self._table[self._pictures[picture]]["image"]
        found = self.benchmark.read(full)
        return () if found is None else [found] if isinstance(found, Item) else found

    def _sample(self, item: Item, where: str) -> Sample:
        from tprl_env.data.pictures import as_picture

        if not item.pictures:
            raise ValueError("it has no picture")
        first, *more = [
            as_picture(one["bytes"] if isinstance(one, Mapping) else one) for one in item.pictures
        ]
        return Sample(
            id=item.id,
            image=first,
            question=item.question,
            answers=tuple(dict.fromkeys(item.answers)) if self._grader == "exact" else item.answers,
            image_id=item.image_id or item.id,
            question_type=item.category,
            grader=self._grader,
            meta={"where": where, "group": item.group},
            more_images=tuple(more),
        )

    def _bad(self, where: str, name: str, reason: str, error: Exception) -> None:
        """Leave a row out, or stop at it.

        Raises:
            BadSampleError: ``skip_bad`` is off.
        """
        told = f"{where}{f' (id {name!r})' if name else ''}: {reason}"
        if not self.skip_bad:
            raise BadSampleError(f"{told}, {_SKIP}", sample=name) from error
        self.skipped.append(told)
        self.skipped_ids.append(name)
        log_left_out(len(self.skipped), told)


def open_table(place: str, config: str | None, split: str, streaming: bool) -> Any:
    """A table of a dataset.

    Args:
        place: A folder that ``datasets`` saved or that holds parquet files, one folder per config
            where there are several; else a hub id.
        config: Of the dataset.
        split: Of the dataset.
        streaming: Read rows when they are asked for.

    Raises:
        FileNotFoundError: Nothing there, or no hub within reach; the message says what to copy.
        ValueError: The dataset has no such split.
        ImportError: ``datasets`` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError(
            'benchmarks need datasets, which is not installed: pip install "tprl-env[benchmarks]"'
        ) from error
    folder = Path(place).expanduser()
    if folder.is_dir():
        inner = folder / config if config and (folder / config).is_dir() else folder
        if any((inner / name).is_file() for name in _SAVED):
            return _of_split(datasets.load_from_disk(str(inner)), split, str(inner))
        files = _parquet_files(inner, split)
        return datasets.load_dataset(
            "parquet", data_files={split: files}, split=split, streaming=streaming
        )
    try:
        return datasets.load_dataset(place, config, split=split, streaming=streaming)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"the dataset {place!r} is no folder and cannot be had from the hub "
            f"({type(error).__name__}); where there is a network, run `hf download {place} "
            f"--repo-type dataset --local-dir DIR`, copy DIR here and name it as the place"
        ) from error


def _parquet_files(folder: Path, split: str) -> list[str]:
    """The files of a split, named as the hub names them: ``<split>-00000-of-00002.parquet``.

    Raises:
        FileNotFoundError: There are no parquet files at all.
        ValueError: None is of that split.
    """
    every = sorted(folder.rglob("*.parquet"))
    if not every:
        raise FileNotFoundError(
            f"{str(folder)!r} holds neither what datasets' save_to_disk() writes nor parquet "
            f"files; copy the dataset there"
        )
    own = [p for p in every if p.stem == split or p.name.startswith(f"{split}-") or
           p.parent.name == split]  # fmt: skip
    if not own:
        known = sorted({path.stem.partition("-")[0] for path in every})
        raise ValueError(f"{str(folder)!r} has parquet files of {', '.join(known)}, not {split!r}")
    return list(map(str, own))


def _of_split(found: Any, split: str, place: str) -> Any:
    """The split of a table of tables."""
    if not isinstance(found, Mapping):
        return found
    if split not in found:
        raise ValueError(f"{place!r} has the splits {', '.join(found)}, not {split!r}")
    return found[split]
