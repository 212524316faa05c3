"""What tells one benchmark from another: its dataset, how rows are read, what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tprl_env.data.graders import sets

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question of a benchmark.

    Attributes:
        id: Unique in its split.
        pictures: Pictures as the dataset gives them, in order.
        question: With options and the benchmark's own closing words.
        answers: Accepted answers.
        category: The benchmark's own; empty where it has none.
        group: What counts together; see ``graders.sets.Graded``.
        image_id: Shared by questions about the same pictures; empty: the id.
    """

    id: str
    pictures: Sequence[Any]
    question: str
    answers: tuple[str, ...]
    category: str = ""
    group: str = ""
    image_id: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One row of :data:`~tprl_env.data.benchmarks.BENCHMARKS`.

    Attributes:
        title: As papers print it.
        hub: Dataset id.
        splits: Split of ours to (config, split) of the dataset; no "train" where there is none.
        columns: Columns that a row must have.
        read: From a row to an item, or several where a row asks several times.
        grader: Name in ``GRADERS``.
        metric: From all graded answers to figures, the printed one first.
        pictures_from: Config that holds the pictures, by "id", where the questions do not.
        max_new_tokens: Longest answer.
        note: What differs from how papers measure it.
    """

    title: str
    hub: str
    splits: Mapping[str, tuple[str | None, str]]
    columns: tuple[str, ...]
    read: Callable[[Row], Item | Sequence[Item] | None]
    grader: str
    metric: sets.Metric = sets.mean
    pictures_from: Mapping[str, str] = field(default_factory=dict)
    max_new_tokens: int = 16
    note: str = ""


def with_options(question: str, options: Sequence[str], hint: str = "") -> str:
    """A question, its lettered options and LLaVA's closing words for them."""
    lines = [f"{LETTERS[place]}. {text}" for place, text in enumerate(options)]
    return "\n".join([*([hint] if hint else []), question, *lines, LETTER])


def short(question: str) -> str:
    """A question and LLaVA's closing words for short answers."""
    return f"{question}\n{SHORT}"
