"""Answers to a benchmark's questions, a unit of them at a time, each unit in a file of its own.

A unit that is written is not answered again, so a stopped run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tprl_env.data.graders import grade
from tprl_env.data.sample import Sample
from tprl_env.files import write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

ALL = "all tokens"
"""Name of the unpruned model's row."""

_KEY = b"protocol"


class Answer(Protocol):
    """What a pruned LVLM gives; ``tprl_env.inference.PrunedAnswer``."""

    text: str
    lives: Any
    average_tokens: float


Answerer = Callable[[Sequence[Any], Sequence[str], float, int], Sequence[Answer]]
"""From pictures, questions, budget and longest answer to answers."""


@dataclass(frozen=True)
class Cell:
    """One reducer at one budget.

    Attributes:
        reducer: Its label; :data:`ALL` for none.
        budget: Count or share.
        kind: "pruner", "merger", "layer pruner", "policy" or "none".
        fields: Values of its fields.
        positions: Rotary positions of what is left.
    """

    reducer: str
    budget: float
    kind: str
    fields: Mapping[str, Any]
    positions: str

    @property
    def folder(self) -> str:
        """A name for its files."""
        plain = re.sub(r"[^a-zA-Z0-9_.=-]+", "_", self.reducer).strip("_")
        told = json.dumps(asdict(self), sort_keys=True, default=str)
        return f"{plain}@{self.budget:g}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Asked:
    """How a benchmark is asked; the same for every cell.

    Attributes:
        benchmark: Its name.
        split: Of the benchmark.
        data: Fingerprint of the rows, as ``datasets`` has it.
        limit: Questions, or None for all.
        grader: Name in ``GRADERS``.
        max_new_tokens: Longest answer.
        lvlm: Fingerprint of the LVLM.
        dtype: Its number type.
    """

    benchmark: str
    split: str
    data: str
    limit: int | None
    grader: str
    max_new_tokens: int
    lvlm: str
    dtype: str

    @property
    def key(self) -> str:
        """What a file's answers belong to."""
        told = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def units(samples: Iterable[Sample], size: int) -> Iterator[tuple[int, list[Sample]]]:
    """Numbered runs of samples."""
    iterator, number = iter(samples), 0
    while unit := list(islice(iterator, size)):
        yield number, unit
        number += 1


def part_path(folder: Path, asked: Asked, cell: Cell, number: int) -> Path:
    """File of a unit."""
    return folder / "answers" / asked.benchmark / cell.folder / f"part-{number:05}.parquet"


def answer_unit(
    answerers: Mapping[str, Answerer],
    cells: Sequence[Cell],
    asked: Asked,
    number: int,
    unit: Sequence[Sample],
    folder: Path,
    batch_size: int,
) -> None:
    """Answer a unit with every cell whose file is not there, and write the files.

    Args:
        answerers: By the reducer's label.
        cells: What to answer with.
        asked: How.
        number: Of the unit.
        unit: Its samples.
        folder: Of the run.
        batch_size: Questions per pass.

    Raises:
        ValueError: A reducer cannot have its budget, or a question cannot be asked; the cell and
            the first id of its batch are named.
    """
    for cell in cells:
        path = part_path(folder, asked, cell, number)
        if path.exists():
            continue
        answers: list[Answer] = []
        for start in range(0, len(unit), batch_size):
            some = unit[start : start + batch_size]
            pictures = [list(one.images) for one in some]
            questions = [one.question for one in some]
            try:
                answers += answerers[cell.reducer](
                    pictures, questions, cell.budget, asked.max_new_tokens
                )
            except ValueError as error:
                raise ValueError(
                    f"{cell.reducer} at {cell.budget:g}, {asked.benchmark}, from {some[0].id!r}: "
                    f"{error}"
                ) from error
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, partial(_write, _table(unit, answers), asked.key))


def _table(unit: Sequence[Sample], answers: Sequence[Answer]) -> pa.Table:
    import pyarrow as pa

    scores = [
        grade(one.grader, answer.text, one.answers)
        for one, answer in zip(unit, answers, strict=True)
    ]
    return pa.table(
        {
            "id": [one.id for one in unit],
            "category": [one.question_type for one in unit],
            "group": [str(one.meta.get("group", "")) for one in unit],
            "references": pa.array([list(one.answers) for one in unit], pa.list_(pa.string())),
            "answer": [answer.text for answer in answers],
            "score": pa.array(scores, pa.float32()),
            "tokens": pa.array([answer.average_tokens for answer in answers], pa.float32()),
            "lives": pa.array(
                [np.bincount(answer.lives).tolist() for answer in answers], pa.list_(pa.int32())
            ),
        }
    )


def _write(table: pa.Table, key: str, file: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table.replace_schema_metadata({_KEY: key.encode()}), file)


def read_answers(folder: Path, asked: Asked, cell: Cell, count: int) -> pa.Table:
    """All answers of a cell.

    Args:
        folder: Of the run.
        asked: How it was asked.
        cell: The cell.
        count: Units.

    Raises:
        ValueError: A file is missing, damaged, or of answers that were asked for otherwise.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = []
    for number in range(count):
        path = part_path(folder, asked, cell, number)
        try:
            part = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(
                f"{path} is missing or damaged ({type(error).__name__}); remove it and run the "
                f"same command again"
            ) from error
        key = (part.schema.metadata or {}).get(_KEY, b"").decode()
        if key != asked.key:
            raise ValueError(
                f"{path} holds answers under another protocol; take another folder (--out)"
            )
        parts.append(part)
    return pa.concat_tables(parts)
