"""A benchmark run: every benchmark with every reducer and budget, resumable, then the tables."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tprl_env.data.benchmarks import BENCHMARKS, BenchmarkDataset, load_benchmark
from tprl_env.data.sample import Sample
from tprl_env.evaluation.benchmark.answering import (
    ALL,
    Answerer,
    Asked,
    Cell,
    answer_unit,
    part_path,
    read_answers,
    units,
)
from tprl_env.evaluation.benchmark.layout import draw, latex, markdown
from tprl_env.evaluation.benchmark.summary import averages, differences, relative, summarise
from tprl_env.files import folder_lock, versions, write_json, write_text

RESULTS, TABLE, LATEX, PLOT = "benchmark.json", "benchmark.md", "benchmark.tex", "benchmark.png"
_COUNTS = "units.json"

Build = Callable[[], Mapping[str, Answerer]]
"""Loads the LVLM and gives an answerer per reducer; runs here, or in each worker."""

Unit = tuple[int, list[Sample]]
"""Number and questions."""

Map = Callable[[Callable[[int, list[Sample]], None], Iterator[Unit]], None]
"""Runs a function on units, wherever; the default runs them here, one after the other."""


def run_benchmarks(
    names: Sequence[str],
    cells: Sequence[Cell],
    build: Build,
    lvlm: Mapping[str, Any],
    out: str | Path,
    *,
    places: Mapping[str, str] | None = None,
    split: str = "test",
    limit: int | None = None,
    unit: int = 256,
    batch_size: int = 8,
    skip_bad: bool = False,
    streaming: bool = False,
    command: str = "",
    each: Map | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Answer, grade and tabulate.

    Args:
        names: Benchmarks.
        cells: Reducers at budgets; the unpruned model is always measured.
        build: Makes the answerers.
        lvlm: "name", "fingerprint", "dtype" and "layers" of the LVLM.
        out: Folder of the answers and tables; what is there already is not asked again.
        places: Copies of the benchmarks, by name.
        split: Of every benchmark.
        limit: Questions of each benchmark.
        unit: Questions per file.
        batch_size: Questions per pass.
        skip_bad: Leave out rows that cannot be read.
        streaming: Read rows from the hub one after the other.
        command: What to repeat, for the results.
        each: Runs the units, such as on a cluster.
        say: Told of every benchmark that is done.

    Returns:
        What ``benchmark.json`` holds.

    Raises:
        ValueError: A benchmark, split or reducer does not exist, a budget cannot be had, or
            ``out`` holds answers under another protocol.
    """
    folder = Path(out)
    every = [Cell(ALL, 1.0, "none", {}, "original"), *cells]
    asked: dict[str, Asked] = {}
    tables: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    data = {
        name: load_benchmark(
            name, split, place=(places or {}).get(name), limit=limit, skip_bad=skip_bad,
            streaming=streaming,
        )
        for name in names
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    left_out = {}
    with folder_lock(folder, "tprl benchmark"):
        for name, dataset in data.items():
            asked[name] = _asked(dataset, split, limit, lvlm)
            count = _answer(dataset, every, asked[name], build, folder, unit, batch_size, each)
            answers = {
                cell.folder: read_answers(folder, asked[name], cell, count) for cell in every
            }
            own = [
                summarise(cell, asked[name], answers[cell.folder], int(lvlm["layers"]))
                for cell in every
            ]
            tables += own
            pairs += differences(every, asked[name], answers)
            left_out[name] = dataset.skipped
            say(f"{BENCHMARKS[name].title}: {own[0]['questions']} questions, {len(every)} rows")
        relative(tables)
        content = {
            "run": secrets.token_hex(8),
            "command": command,
            "lvlm": dict(lvlm),
            "asked": {name: asdict(one) for name, one in asked.items()},
            "left_out": left_out,
            "rows": tables,
            "averages": averages(tables),
            "differences": pairs,
            "versions": versions(),
        }
        write_text(folder / TABLE, markdown(content))
        write_text(folder / LATEX, latex(content))
        write_json(folder / RESULTS, content)
        draw(content, folder / PLOT)
    return content


def _asked(
    dataset: BenchmarkDataset, split: str, limit: int | None, lvlm: Mapping[str, Any]
) -> Asked:
    known = dataset.benchmark
    return Asked(
        dataset.name,
        split,
        dataset.fingerprint,
        limit,
        known.grader,
        known.max_new_tokens,
        str(lvlm["fingerprint"]),
        str(lvlm["dtype"]),
    )


def _answer(
    dataset: BenchmarkDataset,
    cells: Sequence[Cell],
    asked: Asked,
    build: Build,
    folder: Path,
    unit: int,
    batch_size: int,
    each: Map | None,
) -> int:
    """Answer what has no file yet; the number of units."""
    place = folder / "answers" / asked.benchmark / _COUNTS
    known = _read_counts(place, asked, unit)
    if known is not None and all(
        part_path(folder, asked, cell, number).exists() for cell in cells for number in range(known)
    ):
        return known
    count = 0

    def todo() -> Iterator[Unit]:
        nonlocal count
        for number, samples in units(dataset, unit):
            count = number + 1
            if not all(part_path(folder, asked, cell, number).exists() for cell in cells):
                yield number, samples

    work = Worker(build, tuple(cells), asked, folder, batch_size)
    (each or _here)(work, todo())
    if not count:
        raise ValueError(f"benchmark {asked.benchmark!r} has no question to ask")
    write_json(place, {"protocol": asked.key, "unit": unit, "count": count})
    return count


def _read_counts(place: Path, asked: Asked, unit: int) -> int | None:
    """Units of an earlier run; None where it did not finish.

    Raises:
        ValueError: It asked otherwise.
    """
    if not place.is_file():
        return None
    found = json.loads(place.read_text(encoding="utf-8"))
    if found["protocol"] != asked.key or found["unit"] != unit:
        raise ValueError(
            f"{place.parent} holds answers under another protocol (data, LVLM, limit or unit); "
            f"take another out"
        )
    return int(found["count"])


class Worker:
    """Answers units; loads the LVLM when the first one comes."""

    def __init__(
        self, build: Build, cells: Sequence[Cell], asked: Asked, folder: Path, batch_size: int
    ) -> None:
        """Keep what :func:`answer_unit` needs."""
        self._build, self._cells, self._asked = build, cells, asked
        self._folder, self._batch_size = folder, batch_size
        self._answerers: Mapping[str, Answerer] | None = None

    def __call__(self, number: int, samples: list[Sample]) -> None:
        """Answer one unit."""
        if self._answerers is None:
            self._answerers = self._build()
        answer_unit(
            self._answerers,
            self._cells,
            self._asked,
            number,
            samples,
            self._folder,
            self._batch_size,
        )


def _here(work: Callable[[int, list[Sample]], None], todo: Iterator[Unit]) -> None:
    for number, samples in todo:
        work(number, samples)
