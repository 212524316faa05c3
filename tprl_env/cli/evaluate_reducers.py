"""``tprl evaluate STORE --reducers ...``: pruners, mergers and layer pruners beside each other."""

from __future__ import annotations

import argparse
from typing import Any


def reducer_names(text: str) -> list[str]:
    """``"all"`` or ``"divprune,fastv(layer=2)"`` to a list."""
    from tprl_env.evaluation.reducer_names import split_names

    try:
        return split_names(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def add_reducers(sub: Any) -> None:
    """The options."""
    sub.add_argument(
        "--reducers", type=reducer_names,
        help="all, or name,name(field=value): compare pruners, mergers and reducers inside the LLM "
        "at equal averages of tokens per decoder layer (--budgets, default 60,48,40,14,7,4)",
    )  # fmt: skip
    sub.add_argument(
        "--positions",
        help="with --reducers: own (default: what each method's code does), original, contiguous, "
        "or both (own, and kept ones too where a method closes them up)",
    )


def evaluate_reducers(args: argparse.Namespace) -> int:
    """Compare reducers of every kind.

    Raises:
        ValueError: An option that belongs to the comparison of pruners alone.
    """
    from tprl_env.evaluation.reducer_comparison import BUDGETS, compare_reducers

    for name in ("pruners", "threshold", "trajectories"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"--{name} belongs to the comparison of pruners; leave it or --reducers out"
            )
    compare_reducers(
        args.store,
        args.lvlm,
        args.out,
        args.reducers,
        policy=args.policy,
        calibration=args.calibration,
        budgets=args.budgets or BUDGETS,
        positions=args.positions or "own",
        limit=args.limit,
    )
    print(f"reducers.json, reducers.md and plots in {args.out}")
    return 0
