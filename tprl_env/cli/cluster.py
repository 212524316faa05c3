"""The sub-commands for clusters: ``tprl submit`` and ``tprl token``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tprl_env.cli.parsing import overrides, path, place

__all__ = ["add_submit", "add_token", "split_script"]

_SCRIPT = "-"


def split_script(words: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """Part ``submit ... -- python script.py`` at the ``--``; None if there is none.

    A dash takes the config's place: argparse loses an optional positional behind options.
    """
    words = list(words)
    if words[:1] != ["submit"] or "--" not in words:
        return words, None
    at = words.index("--")
    return [*words[:at], _SCRIPT], words[at + 1 :]


def submit(args: argparse.Namespace) -> int:
    """Send a training, or a script, to a cluster and follow it."""
    from tprl_env.ray_session import use_token

    if args.script is not None and args.config != _SCRIPT:
        raise ValueError(f"expected either the config {args.config!r} or a script after --")
    if args.script is None and not args.storage:
        raise ValueError("--storage is missing: a URI or path for the run, such as s3://b/run")
    if args.script is not None and (args.storage or args.overrides):
        raise ValueError("--storage and settings belong to a config; a script gets its own")
    use_token()  # before ray is imported: it reads the mode once
    from tprl_env.rllib.run import submit as jobs

    variables = dict(_variable(word) for word in args.env)
    folder = args.working_dir
    if args.script is not None:
        command = jobs.script_command(args.script)
        folder = folder or Path.cwd()
    else:
        folder = folder or jobs.checkout()
        command = jobs.training_command(
            args.config,
            overrides(args.overrides),
            args.storage,
            working_dir=folder,
            python=args.python,
        )
    client, job = jobs.send(
        command,
        jobs.runtime_env(folder, variables),
        address=args.address,
        driver_cpus=args.driver_cpus,
    )
    print(f"tprl: job {job}: {command}", file=sys.stderr)
    if args.no_wait:
        print(job)
        return 0
    return jobs.follow(client, job)


def _variable(word: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise ValueError(f"--env expects NAME=VALUE, got {word!r}")
    return name, value


def token(args: argparse.Namespace) -> int:
    """Make the token file of a cluster; the token itself is never printed."""
    from tprl_env.ray_session import make_private

    print(f"token in {make_private(args.path)}, for this user's eyes only (mode 600)")
    return 0


def add_submit(commands: Any) -> None:
    """Declare ``tprl submit``."""
    sub = commands.add_parser(
        "submit",
        help="train on a cluster: tprl submit CONFIG --storage URI [--policy.width 64 ...]",
        description="Send a training to a Ray cluster as a job and follow it; sent again with the "
        "same --storage it goes on. Any other script: tprl submit [options] -- python script.py",
    )
    sub.add_argument("config", type=place, help="one of `tprl list presets` or a .py file")
    sub.add_argument(
        "--storage", type=place, help="URI, or a path that every node sees, for the run"
    )
    sub.add_argument(
        "--address", help="dashboard (default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, port 8265)"
    )
    sub.add_argument("--working-dir", type=path, help="folder to upload (default: the checkout)")
    sub.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for the job; no secrets"
    )
    sub.add_argument("--driver-cpus", type=float, default=0.0, help="0 (default): on the head")
    sub.add_argument("--python", default="python", help="interpreter on the cluster")
    sub.add_argument("--no-wait", action="store_true", help="print the job's id and leave")
    sub.set_defaults(run=submit, takes_fields=True)


def add_token(commands: Any) -> None:
    """Declare ``tprl token``."""
    sub = commands.add_parser("token", help="make a token file for Ray's authentication, mode 600")
    sub.add_argument("path", type=path, nargs="?", help="default: where Ray looks for it")
    sub.set_defaults(run=token)
