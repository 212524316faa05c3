"""Every reducer and the policy on fresh test questions of both built-in tasks.

    python -m benchmarks.every_reducer runs/crowded runs/sparse

The arguments are folders of `tprl quickstart`, one per task: their policy, autoencoder and
calibration store are used. Test questions are drawn anew (seed 1011), `tprl evaluate --reducers all
--positions both` measures, and the results go to `benchmarks/results`, pictures to `docs/images`,
tables to `docs/results.md`. With `--report` only what is written is made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.builtin_stores import QuickstartSettings, encode_split
from tprl_env.evaluation.reducer_comparison import RESULTS, compare_reducers
from tprl_env.evaluation.reducer_table import by_name, marks, plot_against, refusals
from tprl_env.files import write_text
from tprl_env.lvlm import load_lvlm
from tprl_env.policy.autoencoder_training import TokenAutoencoder, write_codes

BEGIN, END = "<!-- reducers:begin -->", "<!-- reducers:end -->"
_LEFT_OUT = ("by_type", "paper", "needs", "fields", "kind")
_KEPT = ", positions kept"
COST_AT = 48  # costs are shown at this average


def measure(quickstart: Path, args: Any) -> str:
    """Encode fresh questions and compare on them; returns the task."""
    task = str(json.loads((quickstart / "results.json").read_text("utf-8"))["task"])
    if args.report:
        return task
    lvlm = load_lvlm(f"builtin:{task}")
    settings = QuickstartSettings(task=task, out=args.out / task, seed=args.data_seed)
    store = encode_split(settings, lvlm, "test", args.questions)
    if not store.has_channel("codes"):
        write_codes(store, TokenAutoencoder.from_pretrained(quickstart / "autoencoder"))
    store = FeatureStore.open(store.path)
    compare_reducers(
        store.path,
        f"builtin:{task}",
        args.out / task / "results",
        ["all"],
        policy=quickstart / "train" / "policy",
        calibration=quickstart / "stores" / "calibration",
        positions="both",
    )
    return task


def record(task: str, quickstart: Path, args: Any) -> dict[str, Any]:
    """The small file of results, and the pictures."""
    folder = args.out / task / "results"
    content: dict[str, Any] = json.loads((folder / RESULTS).read_text("utf-8"))
    run = json.loads((quickstart / "results.json").read_text("utf-8"))
    content |= {
        "task": task,
        "data_seed": args.data_seed,
        "policy": {**run["training"], "scale": run["settings"]["scale"]},
        "rows": [
            {key: value for key, value in row.items() if key not in _LEFT_OUT}
            for row in content["rows"]
        ],
    }
    rows = ",\n".join(json.dumps(row) for row in content.pop("rows"))
    head = json.dumps(content, indent=1).removesuffix("\n}")
    write_text(args.record / f"reducers-{task}.json", f'{head},\n "rows": [\n{rows}\n]}}\n')
    content = json.loads((args.record / f"reducers-{task}.json").read_text("utf-8"))
    images = args.docs / "images"
    whole = json.loads((folder / RESULTS).read_text("utf-8"))
    for what in ("tokens", "flops"):
        plot_against(whole, what, images / f"reducers-{task}-{what}.png")
    if (folder / "examples.png").is_file():
        shutil.copy(folder / "examples.png", images / f"reducers-{task}-examples.png")
    return content


def section(content: Mapping[str, Any]) -> str:
    """Markdown of one task."""
    rows, full, task = content["rows"], content["full"], content["task"]
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    lines = [
        f"### `{task}`",
        "",
        f"{content['questions']} questions; all {content['visual_tokens']} tokens: "
        f"**{full['accuracy']:.3f}** ({full['ci95'][0]:.3f} to {full['ci95'][1]:.3f}), "
        f"{full['ms_llm']:.1f} ms, {full['flops_llm'] / 1e6:.0f} MFLOPs (tower "
        f"{full['flops_tower'] / 1e6:.0f} more).",
        "",
        f"| method | {' | '.join(map(str, budgets))} | ms at {COST_AT} | MFLOPs at {COST_AT} |",
        f"| --- | {' | '.join('---' for _ in budgets)} | --- | --- |",
    ]
    for name, group in by_name(rows).items():
        if not any(row["feasible"] for row in group):
            continue
        found = {row["budget"]: row for row in group}
        cells = " | ".join(_cell(found[budget]) for budget in budgets)
        lines.append(f"| {name}{marks(group[0])} | {cells} | {_cost(found.get(COST_AT))} |")
    lines += ["", "Not feasible:", ""]
    lines += [line for line in refusals(rows) if _KEPT not in line]
    for what in ("tokens", "flops", "examples"):
        lines += ["", f"![{task}: accuracy and {what}](images/reducers-{task}-{what}.png)"]
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    if not row["feasible"]:
        return "-"
    low, high = row["ci95"]
    half = max(row["accuracy"] - low, high - row["accuracy"])
    achieved = row["average_tokens"]
    other = f" [{achieved:g}]" if abs(achieved - row["budget"]) > 0.05 else ""
    return f"{row['accuracy']:.3f} ±{half:.3f}".replace("0.", ".") + other


def _cost(row: Mapping[str, Any] | None) -> str:
    if row is None or not row["feasible"]:
        return "- | -"
    flops = [row[f"flops_{part}"] / 1e6 for part in ("reducer", "llm")]
    return f"{row['ms_reducer']:.1f} + {row['ms_llm']:.1f} | {flops[0]:.0f} + {flops[1]:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quickstarts", type=Path, nargs="+", help="folders of tprl quickstart")
    parser.add_argument("--questions", type=int, default=900)
    parser.add_argument("--data-seed", type=int, default=1011)
    parser.add_argument("--out", type=Path, default=Path("runs/reducers"))
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--report", action="store_true", help="only write the files again")
    args = parser.parse_args(argv)
    tasks = [(measure(folder, args), folder) for folder in args.quickstarts]
    text = "\n\n".join(section(record(task, folder, args)) for task, folder in tasks)
    page = args.docs / "results.md"
    before, begin, rest = page.read_text("utf-8").partition(BEGIN)
    if not begin or END not in rest:
        raise SystemExit(f"{page} lacks the marks {BEGIN} and {END}")
    write_text(page, f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
