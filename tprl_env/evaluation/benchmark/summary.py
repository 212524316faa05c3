"""Figures of a benchmark run: per cell the metric with its interval, shares, differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tprl_env.data.benchmarks import BENCHMARKS
from tprl_env.data.graders.cider import cider
from tprl_env.data.graders.sets import Graded, Metric, by_category, captions, mean
from tprl_env.evaluation.benchmark.answering import ALL, Asked, Cell
from tprl_env.evaluation.intervals import mean_interval, paired_difference

if TYPE_CHECKING:
    import pyarrow as pa

_RESAMPLES = 200
Summaries = list[dict[str, Any]]


def graded_of(table: pa.Table) -> list[Graded]:
    """The rows of a table of answers."""
    names = ("answer", "references", "score", "category", "group")
    return [
        Graded(answer, tuple(references), score, category, group)
        for answer, references, score, category, group in zip(
            *(table.column(name).to_pylist() for name in names), strict=True
        )
    ]


def summarise(cell: Cell, asked: Asked, table: pa.Table, layers: int) -> dict[str, Any]:
    """One cell of the table.

    Args:
        cell: Reducer and budget.
        asked: How it was asked.
        table: All its answers.
        layers: Decoder layers of the LVLM.
    """
    known = BENCHMARKS[asked.benchmark]
    rows = graded_of(table)
    figures = known.metric(rows)
    name, value = next(iter(figures.items()))
    low, high = interval(known.metric, rows)
    tokens = np.array(table.column("tokens").to_pylist())
    return {
        "benchmark": asked.benchmark,
        "reducer": cell.reducer,
        "kind": cell.kind,
        "fields": dict(cell.fields),
        "positions": cell.positions,
        "budget": cell.budget,
        "questions": len(rows),
        "metric": name,
        "value": round(value, 4),
        "ci95": [round(low, 4), round(high, 4)],
        "figures": {key: round(number, 4) for key, number in figures.items()},
        "tokens": round(float(tokens.mean()), 3),
        "tokens_per_layer": per_layer(table, layers, cell.kind),
    }


def per_layer(table: pa.Table, layers: int, kind: str) -> list[float]:
    """Mean number of visual tokens that enter each decoder layer."""
    if kind == "merger":  # merged tokens run through all layers
        return [round(float(np.mean(table.column("tokens").to_pylist())), 3)] * layers
    entered = np.zeros(layers)
    for counts in table.column("lives").to_pylist():
        own = np.zeros(layers + 1)
        own[: len(counts)] = counts
        entered += own[::-1].cumsum()[::-1][1:]  # tokens that live longer than each layer
    return [round(float(one), 3) for one in entered / table.num_rows]


def interval(metric: Metric, rows: Sequence[Graded]) -> tuple[float, float]:
    """95 % interval over questions; over groups of them, resampled, where a metric is no mean."""
    if metric in (mean, by_category):
        low, high = mean_interval(np.array([row.score for row in rows], np.float32))
        return 100 * low, 100 * high
    if metric is captions:
        scores = cider([row.answer for row in rows], [row.references for row in rows])
        half = 196 * float(np.std(scores)) / np.sqrt(len(scores))
        middle = 100 * float(np.mean(scores))
        return middle - half, middle + half
    groups: dict[tuple[str, str], list[Graded]] = {}
    for number, row in enumerate(rows):
        groups.setdefault((row.category, row.group or str(number)), []).append(row)
    return _resampled(metric, list(groups.values()))


def _resampled(metric: Metric, groups: Sequence[list[Graded]]) -> tuple[float, float]:
    """Percentiles of the metric over groups drawn with replacement inside each category."""
    generator = np.random.default_rng(0)
    by_category: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        by_category.setdefault(group[0].category, []).append(number)
    values = []
    for _ in range(_RESAMPLES):
        drawn: list[Graded] = []
        for own in by_category.values():
            for turn, number in enumerate(generator.choice(own, len(own))):
                drawn += [_again(row, turn) for row in groups[number]]
        values.append(next(iter(metric(drawn).values())))
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def _again(row: Graded, turn: int) -> Graded:
    """A row of a group that may be drawn twice."""
    return Graded(row.answer, row.references, row.score, row.category, f"{turn}/{row.group}")


def relative(rows: Summaries) -> None:
    """Add to each row its share of the unpruned model's value, in percent."""
    full = {row["benchmark"]: row["value"] for row in rows if row["reducer"] == ALL}
    for row in rows:
        whole = full[row["benchmark"]]
        row["relative"] = round(100 * row["value"] / whole, 3) if whole else None


def averages(rows: Summaries) -> Summaries:
    """Mean share over the benchmarks of each reducer and budget that has all of them."""
    names = sorted({row["benchmark"] for row in rows})
    found: dict[tuple[str, float], list[float | None]] = {}
    for row in rows:
        found.setdefault((row["reducer"], row["budget"]), []).append(row["relative"])
    return [
        {
            "reducer": reducer,
            "budget": budget,
            "benchmarks": names,
            "relative": round(float(np.mean([one for one in shares if one is not None])), 3),
        }
        for (reducer, budget), shares in found.items()
        if len(shares) == len(names) and None not in shares
    ]


def differences(cells: Sequence[Cell], asked: Asked, answers: Mapping[str, pa.Table]) -> Summaries:
    """Every reducer against the first one at each budget, by question; answers by cell's folder."""
    found, pruned = [], [cell for cell in cells if cell.reducer != ALL]
    for budget in dict.fromkeys(cell.budget for cell in pruned):
        first, *others = [cell for cell in pruned if cell.budget == budget]
        scores = _scores(answers[first.folder])
        for other in others:
            mean_, low, high = paired_difference(_scores(answers[other.folder]), scores)
            found.append(
                {
                    "benchmark": asked.benchmark,
                    "reducer": other.reducer,
                    "to": first.reducer,
                    "budget": budget,
                    "difference": round(100 * mean_, 4),
                    "ci95": [round(100 * low, 4), round(100 * high, 4)],
                }
            )
    return found


def _scores(table: pa.Table) -> Any:
    return np.array(table.column("score").to_pylist(), np.float32)


def check_together(contents: Mapping[str, Mapping[str, Any]]) -> int:
    """Refuse result files that were not measured under one protocol.

    Args:
        contents: By the name of the file.

    Returns:
        Rows in all of them.

    Raises:
        ValueError: LVLMs, data, prompts, graders or lengths differ; the files and what differs
            are named.
    """
    first_name, first = next(iter(contents.items()))
    for name, content in contents.items():
        _same(
            "LVLM", first_name, first["lvlm"]["fingerprint"], name, content["lvlm"]["fingerprint"]
        )
        _same("number type", first_name, first["lvlm"]["dtype"], name, content["lvlm"]["dtype"])
        for benchmark in first["asked"].keys() & content["asked"].keys():
            one, other = first["asked"][benchmark], content["asked"][benchmark]
            for field in sorted(one.keys() | other.keys()):
                _same(f"{benchmark}: {field}", first_name, one.get(field), name, other.get(field))
    return sum(len(content["rows"]) for content in contents.values())


def _same(what: str, first: str, value: object, other: str, found: object) -> None:
    if value != found:
        raise ValueError(
            f"{first} and {other} must not stand in one table: {what} is {value!r} there and "
            f"{found!r} here; measure both with one command"
        )
