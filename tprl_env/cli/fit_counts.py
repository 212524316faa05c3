"""``tprl fit-counts STORE``: a count head for a trained policy."""

from __future__ import annotations

import argparse
import time
from typing import Any

from tprl_env.cli.parsing import counts, path, place

__all__ = ["add_fit_counts"]


def fit_counts(args: argparse.Namespace) -> int:
    """Score the policy's own choice at every count of a grid, fit, and save beside the policy."""
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.evaluation.contenders import load_policy
    from tprl_env.files import write_json
    from tprl_env.lvlm import load_lvlm
    from tprl_env.policy import count_fitting
    from tprl_env.policy.counts import FOLDER
    from tprl_env.scoring.lvlm_scorer import LVLMScorer

    lvlm: Any = load_lvlm(args.lvlm)
    store = FeatureStore.open(args.store, lvlm_fingerprint=lvlm.fingerprint)
    policy = load_policy(args.policy, store)
    settings = count_fitting.CountFit(
        args.counts or count_fitting.GRID, args.questions, seed=args.seed
    )
    began = time.perf_counter()
    scorer = LVLMScorer(lvlm, store, "likelihood")
    head, report = count_fitting.fit_counts(policy, store, scorer, settings)
    folder = args.policy / FOLDER
    head.save_pretrained(folder)
    seconds = round(time.perf_counter() - began, 1)
    write_json(folder / "fitting.json", {**report, "command": args.line, "seconds": seconds})
    print(f"count head in {folder}: {report['scores']} scores, {seconds:.0f} s")
    return 0


def add_fit_counts(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser("fit-counts", help="let a trained policy choose how many tokens")
    sub.add_argument("store", type=path, help="feature store of the training split, with codes")
    sub.add_argument("--lvlm", type=place, required=True, help="the LVLM that encoded it")
    sub.add_argument("--policy", type=path, required=True, help="folder of the policy")
    sub.add_argument("--questions", type=int, default=1500, help="scored at every count")
    sub.add_argument(
        "--counts", type=counts, help="grid of counts (default: 1,2,3,4,6,8,11,16,22,32,48)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the fit")
    sub.set_defaults(run=fit_counts)
