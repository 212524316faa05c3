"""Measure the policies of an experiment on test questions that were never looked at.

    python -m benchmarks.fresh_test --data-seed 1001 --questions 1800

The draw has the test split's scans and photo regions, with other scenes and questions. Each policy
keeps the redundancy penalty that its run chose on the calibration split.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.builtin_stores import QuickstartSettings, encode_split
from tprl_env.evaluation.measure import evaluate_method
from tprl_env.files import versions, write_json
from tprl_env.lvlm import load_lvlm
from tprl_env.policy import PolicyPruner
from tprl_env.policy.autoencoder_training import TokenAutoencoder, write_codes
from tprl_env.policy.network import PruningPolicy
from tprl_env.scoring import local_scorer


def measure_task(folder: Path, definition: dict[str, Any], task: str, args: Any) -> dict[str, Any]:
    """Full accuracy, and that of every seed's policy at every budget."""
    lvlm = load_lvlm(f"builtin:{task}")
    runs = {
        seed: folder / definition["runs"][f"{task}/{args.arm}/seed-{seed}"]
        for seed in definition["seeds"]
    }
    records = {seed: json.loads((run / "record.json").read_text()) for seed, run in runs.items()}
    source = Path(next(iter(records.values()))["config"]["source"])
    settings = QuickstartSettings(task=task, out=args.out / task, seed=args.data_seed)
    store = encode_split(settings, lvlm, "test", args.questions)
    if not store.has_channel("codes"):
        autoencoder = TokenAutoencoder.from_pretrained(source.parents[1] / "autoencoder")
        write_codes(store, autoencoder)
    store = FeatureStore.open(store.path)
    scorer, samples = local_scorer(lvlm, store), np.arange(len(store), dtype=np.int64)
    found = {}
    for seed, run in runs.items():
        policy = PruningPolicy.from_pretrained(run / "train" / "policy")
        found[str(seed)] = {}
        for budget, penalty in records[seed]["policy"]["redundancy_penalty"].items():
            pruner = PolicyPruner.as_trained(policy, redundancy_penalty=penalty)
            row = evaluate_method("policy", pruner, store, scorer, int(budget), samples)
            found[str(seed)][budget] = round(row.accuracy, 5)
        print(task, seed, found[str(seed)], flush=True)
    full = float(np.asarray(store.full_scores("exact")).mean())
    by_type = {
        kind: round(float(np.mean(np.asarray(store.full_scores("exact"))[rows])), 5)
        for kind, rows in _rows_by_type(store).items()
    }
    return {"full_accuracy": round(full, 5), "full_by_type": by_type, "runs": found}


def _rows_by_type(store: FeatureStore) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for sample in range(len(store)):
        rows.setdefault(store.question_type(sample), []).append(sample)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", type=Path, default=Path("runs/compare/compare_optimizers"))
    parser.add_argument("--arm", default="ppo")
    parser.add_argument("--data-seed", type=int, default=1001)
    parser.add_argument("--questions", type=int, default=1800)
    parser.add_argument("--out", type=Path, default=Path("runs/fresh"))
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/experiments"))
    args = parser.parse_args(argv)
    definition = json.loads((args.experiment / "experiment.json").read_text("utf-8"))
    tasks = {
        task: measure_task(args.experiment, definition, task, args) for task in definition["tasks"]
    }
    content = {
        "experiment": definition["name"],
        "arm": args.arm,
        "data_seed": args.data_seed,
        "questions": args.questions,
        "tasks": tasks,
        "versions": versions(),
    }
    write_json(args.record / "fresh_test.json", content)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
