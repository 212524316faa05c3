"""An LVLM tuned under pruning against the same as it is, and against one tuned without pruning.

    python -m benchmarks.finetuning QUICKSTART --out FILE

QUICKSTART is a folder of `tprl quickstart` (its policy, autoencoder and training store). For every
seed the built-in LVLM is tuned by LoRA with the policy frozen, once per budget and once without
pruning, the test questions are encoded with it, and the policy is measured on them. Differences are
to the LVLM as it is, on the same questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.intervals import paired_difference
from tprl_env.evaluation.measure import evaluate_method
from tprl_env.files import versions, write_json
from tprl_env.inference.finetuning import TuningSettings, tune
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.policy.autoencoder_training import write_codes
from tprl_env.policy.pruner import PolicyPruner
from tprl_env.scoring.lvlm_scorer import LVLMScorer

BUDGETS = (48, 14, 7)
"""33, 10 and 5 % of 144 tokens."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("--task", default="crowded")
    parser.add_argument("--questions", type=int, default=900)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    policy = PolicyPruner.from_pretrained(args.quickstart / "train" / "policy")
    codes = TokenAutoencoder.from_pretrained(args.quickstart / "autoencoder")
    # tower and projector are not tuned, so the tokens are the ones that it was trained on
    codes.config = replace(codes.config, lvlm_fingerprint="")
    train = FeatureStore.open(args.quickstart / "stores" / "train")
    samples = load_dataset(f"scenes-{args.task}", "test", limit=args.questions, seed=2002)
    lvlm = f"builtin:{args.task}"
    before = _measured(load_lvlm(lvlm), samples, codes, policy)
    rows = [_row("frozen", None, before, before)]
    for seed in range(args.seeds):
        for budgets in ((), *((one,) for one in BUDGETS)):
            model: Any = load_lvlm(lvlm)
            settings = TuningSettings(budgets=budgets, steps=args.steps, seed=seed)
            began = time.perf_counter()
            tune(model, train, policy if budgets else None, settings)
            seconds = time.perf_counter() - began
            name = f"tuned at {budgets[0]}" if budgets else "tuned without pruning"
            after = _measured(model, samples, codes, policy)
            rows.append({**_row(name, seed, after, before), "seconds": round(seconds, 1)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    record = {
        "command": f"python -m benchmarks.finetuning QUICKSTART --task {args.task} "
        f"--questions {args.questions} --steps {args.steps} --seeds {args.seeds}",
        "questions": args.questions,
        "visual_tokens": train.max_tokens,
        "rows": rows,
        "versions": versions(),
    }
    write_json(args.out, record)
    print(json.dumps(record))
    return 0


def _measured(
    lvlm: Any, samples: Any, codes: TokenAutoencoder, policy: PolicyPruner
) -> dict[int, Any]:
    """Scores of every question with all tokens (key 0), and with the policy at each budget."""
    with tempfile.TemporaryDirectory() as folder:
        store = encode_dataset(lvlm, samples, Path(folder) / "store", progress=False)
        write_codes(store, codes)
        store = FeatureStore.open(store.path)
        scorer, numbers = LVLMScorer(lvlm, store), np.arange(len(store))
        found = {0: store.full_scores("exact")}
        for budget in BUDGETS:
            row = evaluate_method("policy", policy, store, scorer, budget, numbers)
            found[budget] = row.scores
        return found


def _row(
    name: str, seed: int | None, after: dict[int, Any], before: dict[int, Any]
) -> dict[str, Any]:
    row: dict[str, Any] = {"lvlm": name, "seed": seed}
    for budget, scores in after.items():
        difference, low, high = paired_difference(scores, before[budget])
        row["all" if budget == 0 else str(budget)] = {
            "accuracy": round(float(scores.mean()), 5),
            "difference": round(difference, 5),
            "ci95": [round(low, 5), round(high, 5)],
        }
    return row


if __name__ == "__main__":
    raise SystemExit(main())
