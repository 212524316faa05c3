"""Learning on the built-in LVLM: several seeds of one preset against heuristics and imitation.

    python -m benchmarks.learning --task crowded --preset recommended --seeds 0 1 2
    python -m benchmarks.learning --task crowded --preset mean_query --seeds 0 1 2
    python -m benchmarks.learning --task sparse --preset recommended --seeds 0 1 2
    python -m benchmarks.learning --task crowded --preset recommended --seeds 0 --from-nothing

Stores are encoded once per task; a finished run is kept and not repeated. Every run leaves one JSON
file in ``--record`` with its accuracies on the test split and its learning curve on the calibration
split; the table of all files there is printed at the end (``--table`` prints it alone).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.comparison import tune_penalty
from tprl_env.evaluate import evaluate_method, paired_difference
from tprl_env.features import FeatureStore
from tprl_env.learning_curve import LearningCurve, curve_hook, local_scorer
from tprl_env.lvlm import load_lvlm
from tprl_env.pruners import PolicyPruner, Pruner, make_pruner
from tprl_env.quickstart import (
    BUDGETS,
    QuickstartSettings,
    Stopwatch,
    all_threads,
    encode_all,
    imitated,
)
from tprl_env.results import versions, write_json
from tprl_env.rllib.config import TrainConfig, load_config
from tprl_env.rllib.train import train

HEURISTICS = ("random", "uniform", "cls_attention", "vispruner", "divprune")
REFERENCES = ("question_attention", "oracle")


def measure(pruner: Pruner, store: FeatureStore, scorer: Any) -> dict[str, Any]:
    """Accuracy, interval and per-question scores at every budget."""
    samples = np.arange(len(store), dtype=np.int64)
    rows = [evaluate_method("x", pruner, store, scorer, budget, samples) for budget in BUDGETS]
    return {
        "accuracy": {str(row.budget): round(row.accuracy, 5) for row in rows},
        "ci95": {str(row.budget): [round(bound, 5) for bound in row.ci95] for row in rows},
        "scores": {row.budget: row.scores for row in rows},
    }


def references(store: FeatureStore, scorer: Any, path: Path) -> dict[str, Any]:
    """Untrained pruners on the test split, measured once per task."""
    if path.is_file():
        return dict(json.loads(path.read_text("utf-8")))
    table = {}
    for name in (*HEURISTICS, *REFERENCES):
        row = measure(make_pruner(name), store, scorer)
        del row["scores"]
        table[name] = row
        print(f"{name:20} {row['accuracy']}", flush=True)
    full = float(np.asarray(store.full_scores("exact")).mean())
    content = {"full": round(full, 5), "questions": len(store), "pruners": table}
    write_json(path, content)
    return content


def run_seed(
    config: TrainConfig, stores: Mapping[str, FeatureStore], lvlm: Any, out: Path, name: str
) -> dict[str, Any]:
    """Imitate, reinforce, measure one seed."""
    begin = time.perf_counter()
    with all_threads():
        policy = imitated(config, stores["train"], out / "imitation")
    imitation_seconds = time.perf_counter() - begin
    curve = LearningCurve(
        out / "learning_curve.jsonl",
        stores["calibration"],
        local_scorer(lvlm, stores["calibration"]),
        300,
    )
    result = train(
        config,
        out / "train",
        resume=(out / "train" / "config.json").is_file(),
        init_policy=None if policy is None else out / "imitation",
        progress=False,
        on_iteration=curve_hook(curve, policy, config.max_scores or 75_000),
    )
    test, scorer = stores["test"], local_scorer(lvlm, stores["test"])
    pruner = PolicyPruner.from_pretrained(result.policy_path)
    held_out = stores["calibration"]
    tuned = tune_penalty(pruner.policy, held_out, curve.scorer, BUDGETS)
    trained, plain = measure(tuned, test, scorer), measure(pruner, test, scorer)
    record = {
        "run": name,
        "seed": config.seed,
        "lvlm_scores": result.progress.scores,
        "env_steps": result.progress.env_steps,
        "seconds": {
            "imitation": round(imitation_seconds, 1),
            "training": round(result.progress.seconds, 1),
        },
        "policy": {key: trained[key] for key in ("accuracy", "ci95")},
        "redundancy_penalty": tuned.redundancy_penalty,
        "policy_plain_top_k": {key: plain[key] for key in ("accuracy", "ci95")},
        "curve": curve.points(),
        "versions": versions(),
    }
    if policy is not None:
        start = tune_penalty(policy, held_out, curve.scorer, BUDGETS)
        before = measure(start, test, scorer)
        record["imitation_redundancy_penalty"] = start.redundancy_penalty
        record["imitation"] = {key: before[key] for key in ("accuracy", "ci95")}
        record["gain_over_imitation"] = {
            str(budget): [
                round(value, 5)
                for value in paired_difference(trained["scores"][budget], before["scores"][budget])
            ]
            for budget in BUDGETS
        }
    return record


def table(folder: Path) -> str:
    """Markdown table of every recorded run, relative to all tokens."""
    lines = []
    for task in ("crowded", "sparse"):
        path = folder / f"references-{task}.json"
        if not path.is_file():
            continue
        base = json.loads(path.read_text("utf-8"))
        full = base["full"]
        head = " | ".join(f"{budget} tokens" for budget in BUDGETS)
        lines += [
            f"`{task}`, all tokens {full:.3f} on {base['questions']} test questions:",
            "",
            f"| method | {head} | LVLM scores | seconds |",
            "| --- |" + " --- |" * (len(BUDGETS) + 2),
        ]
        for name, row in base["pruners"].items():
            cells = " | ".join(f"{row['accuracy'][str(b)]:.3f}" for b in BUDGETS)
            lines.append(f"| {name} | {cells} | | |")
        for path in sorted(folder.glob(f"{task}-*.json")):
            lines += _run_lines(json.loads(path.read_text("utf-8")), full)
        lines.append("")
    return "\n".join(lines)


def _run_lines(record: Mapping[str, Any], full: float) -> list[str]:
    def cells(row: Mapping[str, Any]) -> str:
        return " | ".join(
            f"{row['accuracy'][str(b)]:.3f} ({row['accuracy'][str(b)] / full:.1%})" for b in BUDGETS
        )

    seconds = record["seconds"]
    name = f"{record['run']}, seed {record['seed']}"
    lines = []
    if "imitation" in record:
        row = cells(record["imitation"])
        lines.append(f"| {name}: imitation only | {row} | 0 | {seconds['imitation']:.0f} |")
    row = cells(record["policy"])
    total = f"{seconds['imitation'] + seconds['training']:.0f}"
    return [*lines, f"| **{name}** | {row} | {record['lvlm_scores']} | {total} |"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="crowded")
    parser.add_argument("--preset", default="recommended")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--from-nothing", action="store_true", help="no demonstrations")
    parser.add_argument("--max-scores", type=int)
    parser.add_argument("--label", default="", help="added to the name of the run")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args(argv)
    if not args.table:
        settings = QuickstartSettings(task=args.task, out=args.out / args.task)
        lvlm = load_lvlm(f"builtin:{args.task}")
        stores = encode_all(settings, lvlm, Stopwatch())
        scorer = local_scorer(lvlm, stores["test"])
        references(stores["test"], scorer, args.record / f"references-{args.task}.json")
        for seed in args.seeds:
            name = args.preset + ("-from-nothing" if args.from_nothing else "") + args.label
            target = args.record / f"{args.task}-{name}-{seed}.json"
            if target.is_file():
                continue
            changes: dict[str, Any] = {
                "source": str(stores["train"].path),
                "lvlm": f"builtin:{args.task}",
                "seed": seed,
            }
            if args.from_nothing:
                changes["demonstrator"] = "none"
            if args.max_scores:
                changes["max_scores"] = args.max_scores
            config = load_config(args.preset, changes)
            out = settings.out / f"{name}-{seed}"
            write_json(target, run_seed(config, stores, lvlm, out, name))
    print(table(args.record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
