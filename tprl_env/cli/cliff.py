"""``tprl cliff``: from which layer on the LVLM needs no visual tokens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tprl_env.cli.parsing import counts, names, path, place


def cliff(args: argparse.Namespace) -> int:
    """Drop tokens before layers and measure."""
    from tprl_env.evaluation.cliff import COUNTS, RULES, measure_cliff

    measure_cliff(
        args.store,
        args.lvlm,
        args.out,
        rules=() if args.no_maps else args.rules or RULES,
        counts=args.counts or COUNTS,
        layers=args.layers,
        positions=args.positions,
        limit=args.limit,
    )
    print(f"cliff.json and plots in {args.out}")
    return 0


def add_cliff(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser(
        "cliff", help="accuracy when visual tokens are dropped before each layer of the LVLM"
    )
    sub.add_argument("store", type=path, help="feature store to measure on")
    sub.add_argument(
        "--lvlm", type=place, required=True, help="the LVLM that the store was encoded with"
    )
    sub.add_argument(
        "--rules", type=names,
        help="rules of the maps of layers and counts (default: question_rows,fastv,random)",
    )  # fmt: skip
    sub.add_argument("--no-maps", action="store_true", help="only drop all tokens")
    sub.add_argument("--counts", type=counts, help="tokens that stay (default: 72,48,29,14,7,4)")
    sub.add_argument("--layers", type=counts, help="layers of the maps (default: all)")
    sub.add_argument("--positions", default="original", help="original (default) or contiguous")
    sub.add_argument("--limit", type=int, help="use the first so many questions (default: all)")
    sub.add_argument("--out", type=path, default=Path("runs/cliff"), help="folder of results")
    sub.set_defaults(run=cliff)
