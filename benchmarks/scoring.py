"""How many masks per second an LVLM scores, and what batching, deduplication and cache bring.

    python -m benchmarks.scoring --lvlm builtin:crowded --threads 1

Prints one line per figure and, last, one JSON line with all of them. Questions of one dataset,
random masks: the speed depends on the number of kept tokens, not on which ones they are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tprl_env.data import load_dataset
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.protocol import LVLM
from tprl_env.scoring.cache import CachedScorer
from tprl_env.scoring.lvlm_scorer import LVLMScorer

KEPT = (0, 48, 29, 14, 7, 4)
"""Kept tokens; 0 stands for all of them."""
PLACES = (512, 1024, 2048, 4096, 8192)
"""Most padded places of one forward pass: what the default of `LVLMScorer` was chosen from."""

Request = tuple[Any, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lvlm", default="builtin:crowded")
    parser.add_argument("--dataset", default="scenes-crowded")
    parser.add_argument("--samples", type=int, default=240)
    parser.add_argument("--rows", type=int, default=512, help="masks per request")
    parser.add_argument("--repeats", type=int, default=3, help="the median of these is reported")
    parser.add_argument("--device", default=None)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(args.seed)
    result: dict[str, Any] = {"setting": vars(args), "torch": torch.__version__, "dtypes": {}}
    with tempfile.TemporaryDirectory() as folder:
        store: FeatureStore | None = None
        exact: dict[str, Any] = {}
        for dtype in args.dtypes:
            lvlm = load_lvlm(args.lvlm, device=args.device, dtype=dtype)
            if store is None:
                store = _encode(lvlm, args, Path(folder) / "store")
            mixed = _request(store, args.rows, (4, min(48, store.max_tokens)), rng)
            result["dtypes"][dtype] = {
                "by_kept": _by_kept(lvlm, store, args, rng),
                "batching": _batching(lvlm, store, mixed, args),
                "by_places": _by_places(lvlm, store, mixed, args),
                "cache": _cache(lvlm, store, mixed),
            }
            fixed = _request(store, args.rows, (4, 48), np.random.default_rng(args.seed))
            exact[dtype] = LVLMScorer(lvlm, store).score_both(*fixed)
    result["agreement"] = _agreement(exact)
    print(json.dumps(result))
    return 0


def _encode(lvlm: LVLM, args: argparse.Namespace, out: Path) -> FeatureStore:
    samples = load_dataset(args.dataset, "test", limit=args.samples)
    return encode_dataset(lvlm, samples, out, tower=False, progress=False)


def _request(
    store: FeatureStore, rows: int, kept: tuple[int, int], rng: np.random.Generator
) -> Request:
    """Random samples, each with a random mask of ``kept[0]``..``kept[1]`` tokens."""
    samples = rng.integers(0, len(store), rows)
    exists = store.exists(samples)
    wanted = np.minimum(rng.integers(kept[0], kept[1] + 1, rows), exists.sum(1))
    order = np.where(exists, rng.random(exists.shape), 2.0).argsort(1).argsort(1)
    return samples, order < wanted[:, None]


def _rate(call: Callable[[], Any], rows: int, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return round(rows / float(np.median(seconds)), 1)


def _by_kept(
    lvlm: LVLM, store: FeatureStore, args: argparse.Namespace, rng: np.random.Generator
) -> dict[str, float]:
    scorer = LVLMScorer(lvlm, store)
    found = {}
    for kept in KEPT:
        count = kept or store.max_tokens
        rows = args.rows if kept else max(1, args.rows // 4)
        samples, keep = _request(store, rows, (count, count), rng)
        scorer(samples[: min(rows, 64)], keep[: min(rows, 64)])
        name = str(kept or "all")
        found[name] = _rate(partial(scorer, samples, keep), rows, args.repeats)
        print(f"{lvlm.dtype}  kept {name:>4}  {found[name]:8.0f} scores/s")
    return found


def _batching(
    lvlm: LVLM, store: FeatureStore, request: Request, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The bucketed scorer against one row at a time and against unsorted, padded batches."""
    samples, keep = request
    rows = len(samples)
    bucketed = LVLMScorer(lvlm, store)
    single = LVLMScorer(lvlm, store, batch_size=1)
    padded = LVLMScorer(lvlm, store, batch_size=128, batch_tokens=1 << 30, max_padding=1.0)

    def to_longest() -> None:
        # whatever 128 rows come together, as they come, padded to the longest of them
        order = np.random.default_rng(0).permutation(rows)
        for start in range(0, rows, 128):
            part = order[start : start + 128]
            padded(samples[part], keep[part])

    runs: dict[str, tuple[LVLMScorer, Callable[[], Any]]] = {
        "bucketed": (bucketed, lambda: bucketed(samples, keep)),
        "one_by_one": (single, lambda: single(samples, keep)),
        "padded_to_longest": (padded, to_longest),
    }
    found = {}
    for name, (scorer, call) in runs.items():
        rate = _rate(call, rows, args.repeats)
        share = scorer.stats.padded_tokens / args.repeats / rows
        found[name] = {"scores_per_second": rate, "padded_tokens_per_row": round(share, 2)}
        print(f"{lvlm.dtype}  {name:18} {rate:8.0f} scores/s, {share:5.2f} padding per row")
    return found


def _by_places(
    lvlm: LVLM, store: FeatureStore, request: Request, args: argparse.Namespace
) -> dict[str, float]:
    """Batches of other sizes; scorers take turns, so that drifts of the machine hit all alike."""
    scorers = {places: LVLMScorer(lvlm, store, batch_tokens=places) for places in PLACES}
    rates: dict[int, list[float]] = {places: [] for places in PLACES}
    for _ in range(args.repeats + 1):
        for places, scorer in scorers.items():
            rates[places].append(_rate(partial(scorer, *request), len(request[0]), 1))
    found = {str(places): float(np.median(many[1:])) for places, many in rates.items()}
    for name, rate in found.items():
        print(f"{lvlm.dtype}  at most {name:>5} places {rate:8.0f} scores/s")
    return found


def _cache(lvlm: LVLM, store: FeatureStore, request: Request) -> dict[str, float]:
    """A request in which half the rows are duplicates and a tenth keeps all; then it repeats."""
    samples, keep = (part.copy() for part in request)
    half, tenth = len(samples) // 2, len(samples) // 10
    samples[half:], keep[half:] = samples[: len(samples) - half], keep[: len(samples) - half]
    keep[:tenth] = store.exists(samples[:tenth])
    cached = CachedScorer(LVLMScorer(lvlm, store), store, "exact")
    first = _rate(lambda: cached(samples, keep), len(samples), 1)
    once = cached.stats
    again = _rate(lambda: cached(samples, keep), len(samples), 3)
    found = {
        "first_scores_per_second": first,
        "computed": once.computed,
        "duplicates": once.duplicates,
        "full_hits": once.full_hits,
        "repeated_scores_per_second": again,
        "cache_hits_per_repeat": (cached.stats.cache_hits - once.cache_hits) // 3,
    }
    print(f"{lvlm.dtype}  cache: {found}")
    return found


def _agreement(both: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How far the first number type and the others agree on the same masks."""
    names = list(both)
    return {
        f"{names[0]}_vs_{other}": {
            "exact_disagreements": int((both[names[0]][0] != both[other][0]).sum()),
            "rows": len(both[other][0]),
            "likelihood_mean_abs": float(np.abs(both[names[0]][1] - both[other][1]).mean()),
        }
        for other in names[1:]
    }


if __name__ == "__main__":
    raise SystemExit(main())
