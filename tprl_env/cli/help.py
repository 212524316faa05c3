"""What every ``--help`` shows: the form of each value, its default, and one example."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from tprl_env.cli.parsing import at_least_one, budgets, counts, names, path, place

__all__ = ["EXAMPLES", "HelpFormatter", "complete", "sub_commands"]

_METAVARS: dict[Any, str] = {
    int: "INT", at_least_one: "INT", float: "FLOAT", path: "PATH", place: "NAME|PATH",
    counts: "INT,INT", budgets: "NUMBER,NUMBER", names: "NAME,NAME", None: "TEXT",
}  # fmt: skip

EXAMPLES: dict[str, str] = {
    "quickstart": "tprl quickstart --task sparse --scale 0.2 --out runs/small",
    "encode": "tprl encode --data scenes-sparse --split train --limit 96 --lvlm builtin:sparse "
    "--out stores/train",
    "autoencoder": "tprl autoencoder stores/train --also stores/test --out runs/autoencoder",
    "train": "tprl train recommended --source stores/train --lvlm builtin:sparse --out runs/mine",
    "evaluate": "tprl evaluate stores/test --lvlm builtin:sparse --policy runs/mine/policy "
    "--budgets 29,7 --out runs/mine/evaluation",
    "benchmark": "tprl benchmark --lvlm llava-hf/llava-1.5-7b-hf --benchmarks gqa,pope "
    "--reducers divprune,fastv --budgets 192,64 --out runs/benchmark",
    "compare": "tprl compare compare_optimizers --shared runs/shared",
    "fit-counts": "tprl fit-counts stores/train --lvlm builtin:sparse --policy runs/mine/policy",
    "finetune": "tprl finetune stores/train --lvlm builtin:sparse --policy runs/mine/policy "
    "--budgets 48,14 --out runs/tuned",
    "efficiency": "tprl efficiency llava-1.5-7b --reducers divprune,fastv --budgets 192,64 "
    "--out runs/efficiency",
    "cliff": "tprl cliff stores/test --lvlm builtin:sparse --counts 29,7 --out runs/cliff",
    "tiny-lvlm train": "tprl tiny-lvlm train --task sparse --scale 0.01 --out runs/tiny",
    "scenes": "tprl scenes --data scenes-sparse --split test --limit 12 --out mine",
    "list": "tprl list pruners --json",
    "submit": "tprl submit recommended --storage s3://bucket/runs/first "
    "--source /shared/stores/train --lvlm /shared/llava-1.5-7b",
    "token": "tprl token ~/.ray/auth_token",
    "verify": "tprl verify runs/mine",
    "report": "tprl report runs/mine/evaluation",
    "check-results": "tprl check-results runs/mine/evaluation/results.json --budgets 29,7",
}
"""One command line for every sub-command."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the form of every value, and the default where the text does not say it already."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(action.type, action.dest.upper())

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if not action.option_strings or "default" in text or action.nargs == 0:
            return text
        if action.required:
            return f"{text} (required)"
        value = action.default
        if isinstance(value, tuple | list):
            value = ",".join(map(str, value))
        return f"{text} (default: {'none' if value in (None, '', False) else value})"


def sub_commands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every sub-command below a parser with its words, those of sub-commands included."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in _choices(action).items():
                deeper = [(f"{word} {rest}", each) for rest, each in sub_commands(sub)]
                yield from deeper or [(word, sub)]


def _choices(action: argparse.Action) -> Mapping[str, argparse.ArgumentParser]:
    choices: Any = action.choices
    return dict(choices)


def complete(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give every sub-command the formatter and its example."""
    for words, sub in sub_commands(parser):
        sub.formatter_class = HelpFormatter
        sub.set_defaults(parser=sub)
        if words in EXAMPLES:
            sub.epilog = f"example:\n  {EXAMPLES[words]}"
    return parser
