"""Write the README's results section from the Parquet files of finished experiments.

    python -m benchmarks.readme_results

Replaces what stands between the two markers of README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
BUDGETS = (48, 29, 14, 7, 4)
PRUNERS = {
    "random": "random",
    "uniform": "uniform grid",
    "cls_attention": "CLS attention (FasterVLM)",
    "vispruner": "VisPruner",
    "divprune": "DivPrune",
    "question_attention": "LLM's question attention (a full LLM pass)",
    "oracle": "question oracle, blind to the answer",
}
ARMS = {"ppo": "**PPO**", "grpo": "**GRPO**", "mapo": "**MAPO**"}
FRESH = "fresh_test.json"


def _cells(rows: Sequence[dict[str, Any]]) -> str:
    """Mean over seeds, with lowest and highest, at every budget."""
    cells = []
    for budget in BUDGETS:
        values = [row["accuracy"] for row in rows if row["budget"] == budget]
        spread = f" ({min(values):.3f}–{max(values):.3f})" if len(values) > 1 else ""
        cells.append(f"{sum(values) / len(values):.3f}{spread}")
    return " | ".join(cells)


def _share(rows: Sequence[dict[str, Any]]) -> str:
    cells = []
    for budget in BUDGETS:
        values = [row["relative"] for row in rows if row["budget"] == budget]
        cells.append(f"{sum(values) / len(values):.1%}")
    return " | ".join(cells)


def task_table(rows: Sequence[dict[str, Any]], task: str) -> list[str]:
    """One task: untrained pruners, imitation, every algorithm."""
    own = [row for row in rows if row["task"] == task]
    seeds = len({row["seed"] for row in own if row["method"] == "policy"})
    lines = [
        "",
        f"`{task}`: with all 144 tokens the LVLM answers **{own[0]['full_accuracy']:.3f}** of "
        f"1 800 test questions; with so many tokens left ({seeds} seeds, lowest–highest):",
        "",
        "| method | " + " | ".join(map(str, BUDGETS)) + " |",
        "| --- |" + " --- |" * len(BUDGETS),
    ]
    for name, label in PRUNERS.items():
        found = [row for row in own if row["method"] == "untrained" and row["arm"] == name]
        if found:
            lines.append(f"| {label} | {_cells(found)} |")
    start = [row for row in own if row["method"] == "imitation" and row["arm"] == "ppo"]
    lines.append(f"| imitation only | {_cells(start)} |")
    for arm, label in ARMS.items():
        found = [row for row in own if row["method"] == "policy" and row["arm"] == arm]
        if found:
            lines.append(f"| {label} | {_cells(found)} |")
    found = [row for row in own if row["method"] == "policy" and row["arm"] == "mapo"]
    lines.append(f"| *MAPO, share of all tokens* | {_share(found)} |")
    return lines


def section(record: Path) -> str:
    """The markdown between the markers."""
    rows = pq.read_table(record / "compare_optimizers-results.parquet").to_pylist()
    lines = [line for task in ("crowded", "sparse") for line in task_table(rows, task)]
    fresh = record / FRESH
    if fresh.is_file():
        lines += ["", *_fresh_lines(json.loads(fresh.read_text("utf-8")))]
    return "\n".join(lines).strip()


def _fresh_lines(table: dict[str, Any]) -> list[str]:
    """What the same policies reach on questions that nobody has looked at."""
    lines = [
        f"The {table['arm'].upper()} policies on test questions drawn afterwards "
        f"(seed {table['data_seed']}, "
        f"{table['questions']} questions, measured once; same scans and photo regions):",
        "",
        "| task | all tokens | " + " | ".join(map(str, BUDGETS)) + " |",
        "| --- | --- |" + " --- |" * len(BUDGETS),
    ]
    for task, entry in table["tasks"].items():
        cells = []
        for budget in BUDGETS:
            values = [run[str(budget)] for run in entry["runs"].values()]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f}–{max(values):.3f})")
        lines.append(f"| `{task}` | {entry['full_accuracy']:.3f} | {' | '.join(cells)} |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the section."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/experiments"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    args = parser.parse_args(argv)
    text = args.readme.read_text("utf-8")
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    note = (
        "Mean accuracy over seeds; 50 000 LVLM scores after imitation of the LVLM's own question "
        "attention. Policies are evaluated by top-k with the redundancy penalty that is best on "
        "the calibration split. The test split of the first tables was looked at while the method "
        "was built; the last one was not. Intervals, paired differences, ablations and "
        "commands: [docs/experiments.md](docs/experiments.md)."
    )
    content = f"\n## Results\n\n{section(args.record)}\n\n{note}\n\n"
    args.readme.write_text(text[:start] + content + text[stop:], "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
