"""Scores per second of reducers inside the LLM, against plain masks of the same average tokens.

    python -m benchmarks.inside STORE --lvlm builtin:crowded

Methods and masks take turns, so that drifts of the machine hit all alike; medians are printed, with
their ratios to the mask's. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm import load_lvlm
from tprl_env.reducers.layer import LAYER_PRUNERS, make_layer_pruner
from tprl_env.scoring.lvlm_scorer import LVLMScorer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--lvlm", default="builtin:crowded")
    parser.add_argument("--average", type=float, default=60)
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    lvlm = load_lvlm(args.lvlm)
    store = FeatureStore.open(args.store, lvlm_fingerprint=lvlm.fingerprint)
    scorer = LVLMScorer(lvlm, store)
    samples = np.arange(min(args.questions, len(store)))
    calls = _calls(scorer, samples, args.average)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(args.repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                rates[name].append(len(samples) / (time.perf_counter() - began))
    plain = rates["plain mask"]
    found = {
        name: {
            "median": round(float(np.median(rate)), 1),
            "best": round(max(rate), 1),
            "median_to_mask": round(float(np.median(rate) / np.median(plain)), 3),
            "best_to_mask": round(max(rate) / max(plain), 3),
        }
        for name, rate in rates.items()
    }
    for name, one in found.items():
        print(f"{name:14} {one['median']:7.0f} scores/s, {one['median_to_mask']:.2f} of the mask")
    print(json.dumps({"setting": {**vars(args), "store": str(args.store)}, "rates": found}))
    return 0


def _calls(scorer: LVLMScorer, samples: np.ndarray, average: float) -> dict[str, Callable[[], Any]]:
    """What takes turns: a random mask, and every method that can have the average."""
    exists = scorer.store.exists(samples)
    order = np.where(exists, np.random.default_rng(0).random(exists.shape), 2.0).argsort(1)
    keep = (order.argsort(1) < round(average)) & exists
    calls: dict[str, Callable[[], Any]] = {"plain mask": lambda: scorer.score_both(samples, keep)}
    for name in LAYER_PRUNERS:
        reducer = make_layer_pruner(name)
        calls[reducer.label] = lambda reducer=reducer: scorer.score_inside(
            samples, reducer=reducer, average=average
        )
    return calls


if __name__ == "__main__":
    raise SystemExit(main())
