"""Tables of an experiment: intervals over seeds, differences paired by seed.

Reads the ``record.json`` of every run of a folder that ``tprl compare`` made. The unit is the
training run: intervals are Student's t over seeds, differences are taken between runs of the same
seed, which share data, imitation and test questions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.files import write_atomically, write_text

__all__ = ["check_experiment", "curve_rows", "markdown", "read_records", "rows", "write_tables"]

COLUMNS = (
    "experiment", "task", "arm", "seed", "algorithm", "method", "budget", "tokens", "accuracy",
    "ci_low", "ci_high", "full_accuracy", "relative", "lvlm_scores", "seconds",
)  # fmt: skip


def check_experiment(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix two experiments in one folder.

    Raises:
        ValueError: naming what differs.
    """
    if found == wanted:
        return
    different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    raise ValueError(
        f"{folder} holds runs of {found.get('name')!r} with other {', '.join(different)}; choose "
        "another --out, so that no table mixes two experiments"
    )


def read_records(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Definition and records of a finished experiment.

    Raises:
        ValueError: The folder holds no experiment, an unfinished one, a foreign record, or runs
            that used different numbers of LVLM scores.
    """
    path = folder / "experiment.json"
    if not path.is_file():
        raise ValueError(f"there is no experiment in {folder}; make one with `tprl compare`")
    definition = json.loads(path.read_text("utf-8"))
    runs = definition.get("runs", {})
    records, unfinished = [], []
    for task in definition["tasks"]:
        for arm in definition["arms"]:
            for seed in definition["seeds"]:
                name = f"{task}/{arm}/seed-{seed}"
                file = folder / runs.get(name, "absent") / "record.json"
                if not file.is_file():
                    unfinished.append(name)
                    continue
                record = json.loads(file.read_text("utf-8"))
                if record["key"] != file.parent.name or record["seed"] != seed:
                    raise ValueError(
                        f"{file} is the record of another run ({record['key']}, seed "
                        f"{record['seed']}); remove its folder and run the experiment again"
                    )
                place = {"experiment": definition["name"], "task": task, "arm": arm}
                records.append({**record, **place})
    if unfinished:
        raise ValueError(
            f"{len(unfinished)} of {len(unfinished) + len(records)} runs of {folder} are not "
            f"finished, {unfinished[0]} for one; resume with the same `tprl compare` command"
        )
    references = definition.get("references", {})
    untrained = {task: folder / path for task, path in references.items()}
    definition["untrained"] = {
        task: json.loads(path.read_text("utf-8"))
        for task, path in untrained.items()
        if path.is_file()
    }
    for task in definition["tasks"]:
        _check_scores([record for record in records if record["task"] == task])
    return definition, records


def _check_scores(records: Sequence[Mapping[str, Any]]) -> None:
    """Runs stop after the iteration that reaches the limit, so one iteration may differ."""
    used = {record["lvlm_scores"]: record for record in records}
    low, high = min(used), max(used)
    if high - low > max(record["scores_per_iteration"] for record in records):
        raise ValueError(
            f"runs used different numbers of LVLM scores, {low} ({used[low]['arm']}) and {high} "
            f"({used[high]['arm']}), so they cannot be compared; run them with one max_scores"
        )


def rows(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per run, method ("policy", "imitation") and budget, with `COLUMNS`."""
    for record in records:
        for method in ("policy", "imitation"):
            measured = record[method]
            if measured is None:
                continue
            full = measured["full_accuracy"]
            for row in measured["budgets"]:
                yield {
                    **{name: record[name] for name in COLUMNS[:5]},
                    "method": method,
                    "budget": row["budget"],
                    "tokens": row["mean_tokens"],
                    "accuracy": row["accuracy"],
                    "ci_low": row["ci95"][0],
                    "ci_high": row["ci95"][1],
                    "full_accuracy": full,
                    "relative": row["accuracy"] / full,
                    "lvlm_scores": record["lvlm_scores"] if method == "policy" else 0,
                    "seconds": record["seconds"] if method == "policy" else measured["seconds"],
                }


def reference_rows(definition: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows of the untrained pruners: the arm is the pruner's name, the method "untrained"."""
    for task, untrained in definition["untrained"].items():
        full = untrained["full_accuracy"]
        for name, entry in untrained["pruners"].items():
            for row in entry["budgets"]:
                yield {
                    "experiment": definition["name"],
                    "task": task,
                    "arm": name,
                    "seed": 0,
                    "algorithm": "none",
                    "method": "untrained",
                    "budget": row["budget"],
                    "tokens": row["mean_tokens"],
                    "accuracy": row["accuracy"],
                    "ci_low": row["ci95"][0],
                    "ci_high": row["ci95"][1],
                    "full_accuracy": full,
                    "relative": row["accuracy"] / full,
                    "lvlm_scores": 0,
                    "seconds": row["seconds"],
                }


def curve_rows(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """One row per point of every learning curve (calibration questions) and budget."""
    for record in records:
        for point in record["curve"]:
            for budget, accuracy in point["accuracy"].items():
                yield {
                    **{name: record[name] for name in COLUMNS[:5]},
                    "lvlm_scores": point["lvlm_scores"],
                    "budget": int(budget),
                    "accuracy": accuracy,
                }


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of its 95 % interval over seeds (Student's t); NaN from one seed."""
    from scipy.stats import t

    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return float(array.mean()), math.nan
    half = float(t.ppf(0.975, len(array) - 1)) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return float(array.mean()), half


def accuracies(
    table: Sequence[Mapping[str, Any]], task: str, arm: str, method: str
) -> dict[int, dict[int, float]]:
    """Budget -> seed -> accuracy of one arm."""
    found: dict[int, dict[int, float]] = {}
    for row in table:
        if (row["task"], row["arm"], row["method"]) == (task, arm, method):
            found.setdefault(row["budget"], {})[row["seed"]] = row["accuracy"]
    return found


def markdown(definition: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The experiment as Markdown: accuracies with intervals, then paired differences."""
    table = list(rows(records))
    seeds, budgets = definition["seeds"], definition["budgets"]
    scores = max(record["lvlm_scores"] for record in records)
    lines = [definition["question"], ""]
    for task in definition["tasks"]:
        own = [record for record in records if record["task"] == task]
        full = own[0]["policy"]["full_accuracy"]
        lines += [
            f"`{task}`, all tokens {full:.3f} on {own[0]['policy']['questions']} test questions, "
            f"{len(seeds)} seeds ({', '.join(map(str, seeds))}), {scores} LVLM scores per run. "
            "Accuracy: mean ± half of the 95 % interval over seeds (share of all tokens).",
            "",
            "| arm | " + " | ".join(f"{budget} tokens" for budget in budgets) + " | seconds |",
            "| --- |" + " --- |" * (len(budgets) + 1),
        ]
        lines += _reference_lines(definition.get("untrained", {}).get(task), budgets)
        for arm in definition["arms"]:
            lines += _arm_lines(table, task, arm, budgets, full)
        lines += ["", *_difference_lines(table, definition, task)]
    return "\n".join(lines) + "\n"


def _reference_lines(untrained: Mapping[str, Any] | None, budgets: Sequence[int]) -> list[str]:
    """Untrained pruners, which have no seeds."""
    if untrained is None:
        return []
    full, lines = untrained["full_accuracy"], []
    for name, entry in untrained["pruners"].items():
        found = {row["budget"]: row["accuracy"] for row in entry["budgets"]}
        cells = " | ".join(f"{found[b]:.3f} ({found[b] / full:.1%})" for b in budgets)
        lines.append(f"| *{name}* | {cells} | |")
    return lines


def _arm_lines(
    table: Sequence[Mapping[str, Any]],
    task: str,
    arm: str,
    budgets: Sequence[int],
    full: float,
) -> list[str]:
    """Imitation, where the arm has one, and the policy."""
    lines = []
    for method in ("imitation", "policy"):
        found = accuracies(table, task, arm, method)
        if not found:
            continue
        cells = []
        for budget in budgets:
            mean, half = seed_interval(list(found[budget].values()))
            spread = "" if math.isnan(half) else f" ± {half:.3f}"
            cells.append(f"{mean:.3f}{spread} ({mean / full:.1%})")
        seconds = [r["seconds"] for r in table if _is(r, task, arm, method)]
        label = arm if method == "policy" else f"{arm}: imitation only"
        lines.append(f"| {label} | {' | '.join(cells)} | {np.mean(seconds):.0f} |")
    return lines


def _is(row: Mapping[str, Any], task: str, arm: str, method: str) -> bool:
    return (row["task"], row["arm"], row["method"]) == (task, arm, method)


def _difference_lines(
    table: Sequence[Mapping[str, Any]], definition: Mapping[str, Any], task: str
) -> list[str]:
    """Differences to the first arm, and of each policy to the imitation it started from."""
    arms, budgets = list(definition["arms"]), definition["budgets"]
    base = accuracies(table, task, arms[0], "policy")
    pairs = [
        (f"{arm} - {arms[0]}", accuracies(table, task, arm, "policy"), base) for arm in arms[1:]
    ]
    for arm in arms:
        start = accuracies(table, task, arm, "imitation")
        if start:
            pairs.append((f"{arm} - its imitation", accuracies(table, task, arm, "policy"), start))
    if not pairs or len(definition["seeds"]) < 2:
        return []
    lines = [
        "Differences paired by seed, with 95 % intervals; bold where the interval excludes 0.",
        "",
        "| difference | " + " | ".join(f"{budget} tokens" for budget in budgets) + " |",
        "| --- |" + " --- |" * len(budgets),
    ]
    for name, first, second in pairs:
        cells = []
        for budget in budgets:
            seeds = sorted(first[budget])
            mean, half = seed_interval([first[budget][s] - second[budget][s] for s in seeds])
            cell = f"{mean:+.3f} ± {half:.3f}"
            cells.append(f"**{cell}**" if abs(mean) > half else cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def write_tables(folder: Path) -> Path:
    """Parquet tables, Markdown and plots of a finished experiment, each written atomically.

    Returns:
        The folder.

    Raises:
        ValueError: see `read_records`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tprl_env.evaluation.experiment_plots import plot_budgets, plot_scores

    definition, records = read_records(folder)
    results = [*rows(records), *reference_rows(definition)]
    for name, table in (("results", results), ("curves", list(curve_rows(records)))):
        save = partial(pq.write_table, pa.Table.from_pylist(table))
        write_atomically(folder / f"{name}.parquet", save)
    write_text(folder / "tables.md", markdown(definition, records))
    for task in definition["tasks"]:
        own = [record for record in records if record["task"] == task]
        plot_budgets(list(rows(own)), list(definition["arms"]), folder / f"{task}-tokens.png", task)
        plot_scores(
            list(curve_rows(own)), list(definition["arms"]), folder / f"{task}-scores.png", task
        )
    return folder
