"""Tables of an experiment: intervals over seeds, differences paired by seed.

Reads the ``record.json`` of every run of a folder that ``tprl compare`` made. The unit is the
training run: intervals are Student's t over seeds, differences are taken between runs of the same
seed, which share data, imitation and test questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from tprl_env.evaluation.plots import attempt
from tprl_env.files import write_atomically, write_text

__all__ = ["check_experiment", "curves", "markdown", "read_records", "results", "write_tables"]

RUN = ("experiment", "task", "arm", "seed", "algorithm")
RESULTS = (
    *RUN, "method", "budget", "tokens", "accuracy", "ci_low", "ci_high", "full_accuracy",
    "relative", "lvlm_scores", "seconds", "resumed",
)  # fmt: skip
CURVES = (*RUN, "lvlm_scores", "budget", "accuracy")


def check_experiment(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse to mix two experiments in one folder.

    Raises:
        ValueError: Naming what differs.
    """
    if found == wanted:
        return
    different = sorted(k for k in {*found, *wanted} if found.get(k) != wanted.get(k))
    raise ValueError(
        f"{folder} holds runs of {found.get('name')!r} with other {', '.join(different)}; choose "
        "another out, so that no table mixes two experiments"
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


def results(definition: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per run, method ("policy", "imitation") and budget, with `RESULTS`.

    The untrained pruners follow: their arm is the pruner's name, their method "untrained".
    """
    rows = []
    for place, measured, full in _measured(definition, records):
        for row in measured["budgets"]:
            numbers = {
                "tokens": row["mean_tokens"],
                "ci_low": row["ci95"][0],
                "ci_high": row["ci95"][1],
                "full_accuracy": full,
                "relative": row["accuracy"] / full,
            }
            rows.append(row | numbers | place)
    return pd.DataFrame(rows, columns=RESULTS)


def _measured(
    definition: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[dict[str, Any], Mapping[str, Any], float]]:
    """Every measurement: what its rows share, its budgets, and the accuracy of all tokens."""
    for record in records:
        place = {name: record[name] for name in RUN}
        for method in ("policy", "imitation"):
            measured = record[method]
            if measured is not None:
                trained = method == "policy"
                cost = {
                    "lvlm_scores": record["lvlm_scores"] if trained else 0,
                    "seconds": record["seconds"] if trained else measured["seconds"],
                    "resumed": record.get("resumed", 0) if trained else 0,
                }
                yield place | cost | {"method": method}, measured, measured["full_accuracy"]
    for task, untrained in definition["untrained"].items():
        for name, measured in untrained["pruners"].items():
            place = dict(zip(RUN, (definition["name"], task, name, 0, "none"), strict=True))
            place |= {"method": "untrained", "lvlm_scores": 0, "resumed": 0}  # each row has seconds
            yield place, measured, untrained["full_accuracy"]


def curves(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per point of every learning curve (calibration questions) and budget."""
    rows = [
        {name: record[name] for name in RUN}
        | {"lvlm_scores": point["lvlm_scores"], "budget": int(budget), "accuracy": accuracy}
        for record in records
        for point in record["curve"]
        for budget, accuracy in point["accuracy"].items()
    ]
    return pd.DataFrame(rows, columns=CURVES)


def seed_intervals(values: pd.DataFrame) -> pd.DataFrame:
    """Per column, the mean over seeds (rows) and half of its 95 % interval (Student's t).

    Args:
        values: One row per seed.

    Returns:
        Columns ``mean`` and ``half``; ``half`` is NaN from one seed.
    """
    from scipy.stats import t

    half = t.ppf(0.975, values.count() - 1) * values.sem()
    return pd.DataFrame({"mean": values.mean(), "half": half})


def markdown(definition: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The experiment as Markdown: accuracies with intervals, then paired differences."""
    table = results(definition, records)
    seeds, scores = definition["seeds"], table["lvlm_scores"].max()
    lines = [definition["question"], ""]
    for task in definition["tasks"]:
        measured = next(record["policy"] for record in records if record["task"] == task)
        own = table[table["task"] == task]
        lines += [
            f"`{task}`, all tokens {measured['full_accuracy']:.3f} on {measured['questions']} test "
            f"questions, {len(seeds)} seeds ({', '.join(map(str, seeds))}), {scores} LVLM scores "
            "per run. Accuracy: mean ± half of the 95 % interval over seeds (share of all tokens).",
            "",
            *_accuracy_lines(own, definition, measured["full_accuracy"]),
            "",
            *_resumed_lines([record for record in records if record["task"] == task]),
            *_difference_lines(own, definition),
        ]
    return "\n".join(lines) + "\n"


def _resumed_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A footnote on the runs that an interruption may have changed; empty without any."""
    names = [
        f"{record['arm']} seed {record['seed']} ({record['resumed']} x)"
        for record in records
        if record.get("resumed")
    ]
    if not names:
        return []
    return [
        f"† Resumed after an interruption, so not to the bit what an undisturbed run would have "
        f"given: {', '.join(names)}.",
        "",
    ]


def _lines(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"
        for cells in (head, ["---"] * len(head), *body)
    ]


def _by_seed(own: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of one task: a row per seed, columns (method, arm, budget)."""
    table = own.pivot(index="seed", columns=["method", "arm", "budget"], values="accuracy")
    return table.sort_index(axis=1)


def _accuracy_lines(own: pd.DataFrame, definition: Mapping[str, Any], full: float) -> list[str]:
    """Untrained pruners, then of each arm the imitation, where it has one, and the policy."""
    by_seed, budgets = _by_seed(own), definition["budgets"]
    seconds = own.groupby(["method", "arm"])["seconds"].mean()
    resumed = own.groupby(["method", "arm"])["resumed"].sum()
    labels = {
        ("untrained", name): f"*{name}*" for name in own.query("method == 'untrained'").arm.unique()
    }
    for arm in definition["arms"]:
        labels |= {("imitation", arm): f"{arm}: imitation only", ("policy", arm): arm}
    body = []
    for key, label in labels.items():
        if key not in seconds:
            continue
        cells = [
            f"{mean:.3f}{'' if pd.isna(half) else f' ± {half:.3f}'} ({mean / full:.1%})"
            for mean, half in seed_intervals(by_seed[key]).loc[budgets].to_numpy()
        ]
        cost = "" if key[0] == "untrained" else f"{seconds[key]:.0f}"  # pruners have no seeds
        body.append([f"{label} †" if resumed[key] else label, *cells, cost])
    return _lines(["arm", *(f"{budget} tokens" for budget in budgets), "seconds"], body)


def _difference_lines(own: pd.DataFrame, definition: Mapping[str, Any]) -> list[str]:
    """Differences to the first arm, and of each policy to the imitation it started from."""
    by_seed, budgets = _by_seed(own[own["method"] != "untrained"]), definition["budgets"]
    first, *others = definition["arms"]
    pairs = [(f"{arm} - {first}", arm, ("policy", first)) for arm in others]
    pairs += [
        (f"{arm} - its imitation", arm, ("imitation", arm))
        for arm in definition["arms"]
        if ("imitation", arm) in by_seed
    ]
    if not pairs or len(definition["seeds"]) < 2:
        return []
    body = []
    for label, arm, base in pairs:
        difference = by_seed["policy", arm] - by_seed[base]
        cells = []
        for mean, half in seed_intervals(difference).loc[budgets].to_numpy():
            cell = f"{mean:+.3f} ± {half:.3f}"
            cells.append(f"**{cell}**" if abs(mean) > half else cell)
        body.append([label, *cells])
    return [
        "Differences paired by seed, with 95 % intervals; bold where the interval excludes 0.",
        "",
        *_lines(["difference", *(f"{budget} tokens" for budget in budgets)], body),
        "",
    ]


def write_tables(folder: Path) -> Path:
    """Parquet tables, Markdown and plots of a finished experiment, each written atomically.

    Returns:
        The folder.

    Raises:
        ValueError: See `read_records`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tprl_env.evaluation.experiment_plots import plot_budgets, plot_scores

    definition, records = read_records(folder)
    tables = {"results": results(definition, records), "curves": curves(records)}
    for name, table in tables.items():
        # from_pylist, because from_pandas would add pandas' own types and metadata
        save = partial(pq.write_table, pa.Table.from_pylist(table.to_dict("records")))
        write_atomically(folder / f"{name}.parquet", save)
    write_text(folder / "tables.md", markdown(definition, records))
    arms = list(definition["arms"])
    for task in definition["tasks"]:
        own = {name: table[table["task"] == task] for name, table in tables.items()}
        trained = own["results"].query("method != 'untrained'")
        tokens, scores = (folder / f"{task}-{of}.png" for of in ("tokens", "scores"))
        attempt(str(tokens), partial(plot_budgets, trained, arms, tokens, task))
        attempt(str(scores), partial(plot_scores, own["curves"], arms, scores, task))
    return folder
