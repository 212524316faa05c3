"""Write the README's short table and docs/results.md from the records of finished experiments.

    python -m benchmarks.readme_results

Replaces the text between the two markers of each file.
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
SHORT_BUDGETS = (48, 14, 4)
TASKS = ("crowded", "sparse")
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
SHORT_METHODS = {
    ("untrained", "random"): "random tokens",
    ("untrained", "vispruner"): "VisPruner",
    ("untrained", "divprune"): "DivPrune",
    ("imitation", "ppo"): "policy after imitation",
    ("policy", "mapo"): "**policy after MAPO** (`recommended`)",
}
FRESH = "fresh_test.json"
INTRODUCTION = """\
Accuracy on 1 800 test questions per task at a fixed number of visual tokens of 144, mean over five
seeds. `crowded` and `sparse` are built-in questions about synthetic scenes of handwritten digits,
96 x 96 pixels, answered by a LLaVA of 1.7 M parameters that ships with the package
([model card](docs/tiny_lvlm.md)); they are **not** public benchmarks. In `crowded` a token shows
only its own 8 x 8 pixels, in `sparse` tokens are redundant."""


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
        f"## `{task}`",
        "",
        f"With all 144 tokens the LVLM answers **{own[0]['full_accuracy']:.3f}** of "
        f"1 800 test questions. Accuracy with 48 to 4 tokens kept, mean of {seeds} seeds "
        "(lowest–highest):",
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


def short_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Both tasks at three budgets, one mean per cell."""
    titles = [f"`{task}`, {budget} tokens" for task in TASKS for budget in SHORT_BUDGETS]
    lines = [
        "| method | " + " | ".join(titles) + " |",
        "| --- |" + " --- |" * len(titles),
    ]
    full = {row["task"]: f"{row['full_accuracy']:.3f}" for row in rows}
    cells = [full[task] for task in TASKS for _ in SHORT_BUDGETS]
    lines.append("| *all 144 tokens* | " + " | ".join(f"*{cell}*" for cell in cells) + " |")
    for (method, arm), label in SHORT_METHODS.items():
        found = [row for row in rows if row["method"] == method and row["arm"] == arm]
        cells = [_mean(found, task, budget) for task in TASKS for budget in SHORT_BUDGETS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _mean(rows: Sequence[dict[str, Any]], task: str, budget: int) -> str:
    values = [row["accuracy"] for row in rows if row["task"] == task and row["budget"] == budget]
    return f"{sum(values) / len(values):.3f}"


def readme_section(record: Path) -> str:
    """The markdown between the markers of README.md."""
    rows = pq.read_table(record / "compare_optimizers-results.parquet").to_pylist()
    table = "\n".join(short_table(rows))
    note = (
        "50 000 LVLM scores after imitation. More methods, budgets and fresh questions:\n"
        "[docs/results.md](docs/results.md); intervals, ablations and negative results:\n"
        "[docs/experiments.md](docs/experiments.md)."
    )
    plot = "![Accuracy against tokens kept, crowded, one seed](docs/images/accuracy.png)"
    return f"## Results\n\n{INTRODUCTION}\n\n{table}\n\n{note}\n\n{plot}"


def results_section(record: Path) -> str:
    """The markdown between the markers of docs/results.md."""
    rows = pq.read_table(record / "compare_optimizers-results.parquet").to_pylist()
    lines = [line for task in TASKS for line in task_table(rows, task)]
    fresh = record / FRESH
    if fresh.is_file():
        lines += ["", *_fresh_lines(json.loads(fresh.read_text("utf-8")))]
    return "\n".join(lines).strip()


def _fresh_lines(table: dict[str, Any]) -> list[str]:
    """Accuracy of the same policies on questions that were drawn after the method was built."""
    lines = [
        "## Fresh questions",
        "",
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


def replace_section(text: str, content: str) -> str:
    """The text with other content between its markers."""
    start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n{content}\n{text[stop:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the two sections."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/experiments"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument("--results", type=Path, default=Path("docs/results.md"))
    args = parser.parse_args(argv)
    sections = {args.readme: readme_section, args.results: results_section}
    for path, section in sections.items():
        path.write_text(replace_section(path.read_text("utf-8"), section(args.record)), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
