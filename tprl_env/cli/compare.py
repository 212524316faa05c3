"""``tprl compare``: experiments over arms and seeds, and searches."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tprl_env.cli.parsing import path, place


def compare(args: argparse.Namespace) -> int:
    """Run, resume or only report an experiment."""
    if args.report:
        if args.out is None:
            raise ValueError(
                "tprl compare --report needs the folder of a finished experiment: --out FOLDER"
            )
        from tprl_env.evaluation.experiment_tables import write_tables

        print((write_tables(args.out) / "tables.md").read_text("utf-8"))
        return 0
    if args.config is None:
        raise ValueError(
            "tprl compare needs the name of an experiment or a .py file, or --report with --out"
        )
    from tprl_env.lvlm import find_lvlm
    from tprl_env.rllib.experiments.definition import Experiment, load_experiment

    experiment = load_experiment(args.config)
    out = args.out or Path("runs/compare") / experiment.name
    from tprl_env.rllib.experiments.compare import compare as run
    from tprl_env.rllib.experiments.places import TaskData
    from tprl_env.rllib.experiments.search import search

    given = {name: getattr(args, name) for name in ("lvlm", "train", "calibration", "test")}
    stores = None
    if any(given.values()):
        missing = [f"--{name}" for name, value in given.items() if not value]
        if missing:
            raise ValueError(f"your own data needs {', '.join(missing)} too")
        paths = {
            name: str(Path(given[name]).resolve()) for name in ("train", "calibration", "test")
        }
        stores = TaskData(lvlm=given["lvlm"], **paths)
        find_lvlm(stores.lvlm)  # refused here, before a folder is made
        stores.fingerprints()
    options: dict[str, Any] = {
        "shared": args.shared,
        "stores": stores,
        "concurrent": args.concurrent,
        "callbacks": loggers(args.log, experiment.name),
    }
    if isinstance(experiment, Experiment):
        folder = run(experiment, out, **options)
        print((folder / "tables.md").read_text("utf-8"))
        print(f"tables and plots in {folder}")
    else:
        print(search(experiment, out, **options).read_text("utf-8"))
    return 0


def loggers(names: Sequence[str], project: str) -> list[Any]:
    """Ray's own logger callbacks; TensorBoard, JSON and CSV are always written.

    Args:
        names: ``"mlflow"``, ``"mlflow=URI"``, ``"wandb"`` or ``"wandb=PROJECT"``.
        project: Name of the MLflow experiment, and of the W&B project where none is given.

    Raises:
        ValueError: An unknown logger.
        ModuleNotFoundError: Its extra is not installed.
    """
    found: list[Any] = []
    for text in names:
        name, _, value = text.partition("=")
        if name == "mlflow":
            import mlflow  # noqa: F401 - Ray's callback fails later and less clearly without it
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            found.append(MLflowLoggerCallback(tracking_uri=value or None, experiment_name=project))
        elif name == "wandb":
            import wandb  # noqa: F401
            from ray.air.integrations.wandb import WandbLoggerCallback

            found.append(WandbLoggerCallback(project=value or project))
        else:
            raise ValueError(
                f"unknown logger {name!r}; known: mlflow[=URI], wandb[=PROJECT] (TensorBoard, JSON "
                "and CSV files are always written)"
            )
    return found


def add_compare(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser(
        "compare", help="run, resume or report an experiment over arms and seeds"
    )
    sub.add_argument(
        "config", type=place, nargs="?", help="one of `tprl list experiments` or a .py file"
    )
    sub.add_argument("--out", type=path, help="default: runs/compare/NAME")
    sub.add_argument(
        "--shared",
        type=path,
        help="folder of stores and runs that experiments share (default: in --out)",
    )
    sub.add_argument(
        "--concurrent", type=int, help="runs at the same time (default: as many as fit)"
    )
    sub.add_argument(
        "--log", action="append", default=[], help="mlflow[=URI] or wandb[=PROJECT], repeatable"
    )
    sub.add_argument("--report", action="store_true", help="only write the tables of --out again")
    sub.add_argument(
        "--lvlm", type=place, help="your LVLM, with --train, --calibration and --test stores"
    )
    sub.add_argument("--train", type=place, help="store to learn on")
    sub.add_argument("--calibration", type=place, help="store for curves and redundancy penalties")
    sub.add_argument("--test", type=place, help="store that is reported on")
    sub.set_defaults(run=compare)
