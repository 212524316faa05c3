"""`tprl report`: the page of a finished comparison, drawn again from its stored numbers."""

from __future__ import annotations

import argparse
from typing import Any

from tprl_env.cli.parsing import path

__all__ = ["add_report"]


def add_report(commands: Any) -> None:
    """Add the command."""
    sub = commands.add_parser(
        "report",
        help="draw plots and report.html of a finished quickstart or evaluate again, from results",
    )
    sub.add_argument("out", type=path, help="the folder that holds results.json")
    sub.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from tprl_env.evaluation.report_files import rebuild_report

    print(rebuild_report(args.out))
    return 0
