"""The ``tprl`` command.

Each sub-command is a thin layer over one public function; heavy imports happen inside, so that
``tprl --help`` is instant. A mistake of the user ends in one sentence and exit status 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tprl_env import __version__
from tprl_env.cli.benchmark import add_benchmark
from tprl_env.cli.cliff import add_cliff
from tprl_env.cli.cluster import add_submit, add_token, split_script
from tprl_env.cli.compare import add_compare
from tprl_env.cli.efficiency import add_efficiency
from tprl_env.cli.encode import add_encode
from tprl_env.cli.evaluate_reducers import add_reducers, evaluate_reducers
from tprl_env.cli.finetune import add_finetune
from tprl_env.cli.fit_counts import add_fit_counts
from tprl_env.cli.help import complete
from tprl_env.cli.listing import add_list
from tprl_env.cli.parsing import (
    Parser,
    TrainHelp,
    add_trust,
    at_least_one,
    budgets,
    counts,
    names,
    overrides,
    path,
    place,
    resume,
)
from tprl_env.cli.report import add_report
from tprl_env.cli.scenes import add_scenes
from tprl_env.cli.verify import add_verify
from tprl_env.cli.words import ShellWords, shell_words, unknown_arguments
from tprl_env.env.scorer import ScoringError

USER_ERRORS = (ValueError, ScoringError, OSError, ImportError, FloatingPointError)
_LONGEST_SENTENCE = 1500  # characters; what was typed may be longer
INTERRUPTED = 130  # what shells report for a command ended by Ctrl-C
BUDGETS = (48, 29, 14, 7, 4)


def quickstart(args: argparse.Namespace) -> int:
    """Chain everything on the built-in LVLM."""
    from tprl_env.cli.quickstart import run_quickstart
    from tprl_env.evaluation.builtin_stores import QuickstartSettings

    settings = QuickstartSettings(
        task=args.task, out=args.out, preset=args.preset, seed=args.seed, scale=args.scale
    )
    run_quickstart(settings, overrides=overrides(args.overrides), command=args.line)
    return 0


def autoencoder(args: argparse.Namespace) -> int:
    """Train the token autoencoder on a store and write its codes into the stores."""
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.policy.autoencoder_training import (
        TokenAutoencoder,
        train_autoencoder,
        write_codes,
    )

    store = FeatureStore.open(args.store)
    others = [FeatureStore.open(path) for path in args.also]
    if args.load:
        model = TokenAutoencoder.from_pretrained(args.load)
    else:
        model, report = train_autoencoder(
            store, code_width=args.code_width, steps=args.steps, seed=args.seed
        )
        model.save_pretrained(args.out or Path(args.store) / "autoencoder")
        print(
            f"code width {model.code_width}: reconstruction error {report.reconstruction_error:.4g}"
            f", explained variance {report.explained_variance:.4f} on held-out images"
        )
    for target in (store, *others):
        write_codes(target, model)
    return 0


def train(args: argparse.Namespace) -> int:
    """Train a policy with RLlib."""
    from tprl_env.rllib.config import load_config

    config = load_config(args.config, overrides(args.overrides))
    from tprl_env.rllib.run.train import train as run  # ray takes seconds to load

    result = run(
        config,
        args.out,
        resume=args.resume,
        init_policy=args.init_policy,
        preset=Path(args.config).stem,
    )
    print(f"policy in {result.where}/policy; metrics in {result.where}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Compare pruners, or reducers of every kind, on a store at matched budgets."""
    if args.reducers is not None:
        return evaluate_reducers(args)
    if args.positions is not None:
        raise ValueError("--positions belongs to --reducers; give it, or leave --positions out")
    from tprl_env.evaluation.compare_on_store import evaluate_store

    if args.mean_tokens and args.budgets:
        raise ValueError("--mean-tokens are the budgets; give one of --mean-tokens and --budgets")
    evaluate_store(
        args.store,
        args.lvlm,
        args.out,
        policy=args.policy,
        calibration=args.calibration,
        threshold=args.threshold,
        pruners=args.pruners,
        budgets=args.mean_tokens or args.budgets or BUDGETS,
        mean_tokens=bool(args.mean_tokens),
        limit=args.limit,
        trajectories=10 if args.trajectories is None else args.trajectories,
        command=args.line,
    )
    return 0


def tiny_lvlm(args: argparse.Namespace) -> int:
    """Train the built-in LVLM from nothing."""
    from tprl_env.evaluation.tiny_lvlm import measure_tiny_lvlm
    from tprl_env.lvlm.tiny.train import train_tiny_lvlm

    report = train_tiny_lvlm(
        args.task,
        args.out,
        measure=measure_tiny_lvlm,
        seed=args.seed,
        scale=args.scale,
        threads=args.threads,
    )
    print(f"checkpoint in {args.out}; {report}")
    return 0


def check_results(args: argparse.Namespace) -> int:
    """Check a results file."""
    from tprl_env.evaluation.result_files import read_results

    results = read_results(args.file, args.budgets)
    print(f"{args.file}: {len(results['methods'])} rows, all that readers rely on is there")
    return 0


def _add_quickstart(commands: Any) -> None:
    sub = commands.add_parser("quickstart", help="encode, train, compare and report in one go")
    sub.add_argument("--task", default="crowded", help="crowded or sparse")
    sub.add_argument("--out", type=path, default=Path("runs/quickstart"), help="folder of the run")
    sub.add_argument("--preset", default="recommended", help="one of `tprl list presets`")
    sub.add_argument("--seed", type=int, default=0, help="of data, imitation and training")
    sub.add_argument("--scale", type=float, default=1.0, help="size of everything; 1 = 10 minutes")
    sub.set_defaults(run=quickstart, takes_fields=True)


def _add_autoencoder(commands: Any) -> None:
    sub = commands.add_parser("autoencoder", help="train it on a store, write codes into stores")
    sub.add_argument("store", type=path, help="feature store to learn on")
    sub.add_argument(
        "--also", type=path, nargs="*", default=[], help="more stores to write codes to"
    )
    sub.add_argument("--out", type=path, help="folder for the weights (default: in the store)")
    sub.add_argument("--load", type=path, help="use these weights, do not train")
    sub.add_argument("--code-width", type=at_least_one, help="default: token width / 16")
    sub.add_argument("--steps", type=int, default=2000, help="training steps")
    sub.add_argument("--seed", type=int, default=0, help="of weights and batches")
    add_trust(sub)
    sub.set_defaults(run=autoencoder)


def _add_train(commands: Any) -> None:
    sub = commands.add_parser(
        "train",
        help="train a policy: tprl train CONFIG [--policy.width 64 ...]",
        usage="tprl train CONFIG [--out OUT] [--resume [auto]] [--init-policy FOLDER] [--trust] "
        "[--PART.SETTING VALUE ...]",
        add_help=False,
    )
    sub.add_argument(
        "-h", "--help", action=TrainHelp, nargs=0, default=argparse.SUPPRESS,
        help="show this and every setting, with the values of CONFIG if it comes before",
    )  # fmt: skip
    sub.add_argument("config", type=place, help="one of `tprl list presets` or a .py file")
    sub.add_argument(
        "--out", type=place, default="runs/train", help="a folder, or a URI of shared storage"
    )
    sub.add_argument(
        "--resume", nargs="?", type=resume, const=True, default=False, metavar="auto",
        help="continue the run in --out; auto: or start it if there is none",
    )  # fmt: skip
    sub.add_argument(
        "--init-policy", type=path, help="start from this policy folder (default: new weights)"
    )
    add_trust(sub)
    sub.set_defaults(run=train, takes_fields=True)


def _add_evaluate(commands: Any) -> None:
    sub = commands.add_parser("evaluate", help="compare pruners at matched budgets")
    sub.add_argument("store", type=path, help="feature store to measure on")
    sub.add_argument(
        "--lvlm", type=place, required=True, help="the LVLM that the store was encoded with"
    )
    sub.add_argument(
        "--policy", type=path, help="folder of a trained policy (default: pruners only)"
    )
    sub.add_argument(
        "--calibration", type=path, help="store to calibrate thresholds on (default: no thresholds)"
    )
    sub.add_argument(
        "--threshold",
        type=float,
        help="also keep p > THRESHOLD, 0 to 1 (TPRL eq. 16; default: not)",
    )
    sub.add_argument(
        "--pruners", type=names, help="comma-separated names (default: all that the store allows)"
    )
    add_reducers(sub)
    sub.add_argument(
        "--mean-tokens", type=counts,
        help="means of a policy with a count head, found on --calibration (default: none)",
    )  # fmt: skip
    sub.add_argument(
        "--budgets", type=budgets,
        help="tokens kept, counts or shares of each picture's such as 0.2 (default: 48,29,14,7,4)",
    )  # fmt: skip
    sub.add_argument("--limit", type=int, help="use the first so many questions (default: all)")
    sub.add_argument("--trajectories", type=int, help="how many to draw (default: 10)")
    sub.add_argument("--out", type=path, default=Path("runs/evaluate"), help="folder of results")
    add_trust(sub)
    sub.set_defaults(run=evaluate)


def _add_tiny_lvlm(commands: Any) -> None:
    parser = commands.add_parser("tiny-lvlm", help="the built-in LVLM")
    actions = parser.add_subparsers(dest="action", required=True)
    sub = actions.add_parser("train", help="train it from nothing")
    sub.add_argument("--task", default="crowded", help="crowded or sparse")
    sub.add_argument("--out", type=path, required=True, help="folder of the checkpoint")
    sub.add_argument("--seed", type=int, default=0, help="of weights and scenes")
    sub.add_argument("--scale", type=float, default=1.0, help="multiplies all step counts")
    sub.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    sub.set_defaults(run=tiny_lvlm)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = Parser(prog="tprl", description=__doc__)
    parser.add_argument("--version", action="version", version=f"tprl-env {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (
        _add_quickstart,
        add_encode,
        _add_autoencoder,
        _add_train,
        _add_evaluate,
        add_compare,
        add_cliff,
        add_benchmark,
        add_efficiency,
        add_finetune,
        add_fit_counts,
        _add_tiny_lvlm,
        add_scenes,
        add_list,
        add_submit,
        add_token,
        add_verify,
        add_report,
    ):
        add(commands)
    sub = commands.add_parser("check-results", help="check a results.json")
    sub.add_argument("file", type=path, help="a results.json, or its folder")
    sub.add_argument(
        "--budgets", type=counts, help="counts that must be there (default: those in the file)"
    )
    sub.set_defaults(run=check_results)
    return complete(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, or 2 after a mistake of the user, which is printed as one sentence.
    """
    lines = logging.StreamHandler()
    lines.setFormatter(ShellWords("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[lines])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its hints are not the user's
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    options: Sequence[str] = ()
    try:
        words, script = split_script(sys.argv[1:] if argv is None else argv)
        args, rest = build_parser().parse_known_args(words)
        if rest and not getattr(args, "takes_fields", False):
            raise ValueError(unknown_arguments(args.parser, rest))
        options = [one.dest for one in args.parser._actions if one.option_strings]
        args.overrides, args.script, args.line = rest, script, shlex.join(["tprl", *words])
        from tprl_env.data.features.manifest import trust_files

        with trust_files(getattr(args, "trust", False)):
            return int(args.run(args))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("tprl_env"):
            raise  # a bug, not something the user left out
        print(
            f'tprl: {error.name} is not installed; run pip install "tprl-env[all]"', file=sys.stderr
        )
        return 2
    except USER_ERRORS as error:
        sentence = shell_words(" ".join(str(error).split()), options)
        cut = "..." if len(sentence) > _LONGEST_SENTENCE else ""
        print(f"tprl: {sentence[:_LONGEST_SENTENCE]}{cut}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tprl: interrupted; the same command continues where it can", file=sys.stderr)
        return INTERRUPTED
