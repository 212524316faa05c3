"""``tprl finetune STORE``: an LVLM tuned to a pruner by LoRA, saved as a checkpoint of its own."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from tprl_env.cli.parsing import budgets, path, place

__all__ = ["add_finetune"]


def finetune(args: argparse.Namespace) -> int:
    """Tune and save.

    Raises:
        ValueError: Arguments that do not go together.
    """
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.files import write_json
    from tprl_env.inference.finetuning import TuningSettings, tune
    from tprl_env.lvlm import load_lvlm
    from tprl_env.policy.pruner import PolicyPruner
    from tprl_env.reducers import make_pruner

    if args.policy is not None and args.pruner is not None:
        raise ValueError("give --policy or --pruner, not both")
    if (args.out / "config.json").exists():
        raise ValueError(f"{args.out} holds a checkpoint already; take another --out")
    settings = TuningSettings(
        args.budgets or (), args.steps, args.batch_size, args.lr, args.rank, args.seed
    )
    lvlm: Any = load_lvlm(args.lvlm, device=args.device, dtype=args.dtype)
    store = FeatureStore.open(args.store)
    pruner: Any = None
    if args.policy is not None:
        pruner = PolicyPruner.from_pretrained(args.policy)
    elif args.pruner is not None:
        pruner = make_pruner(args.pruner)
    every = max(args.steps // 10, 1)

    def told(step: int, loss: float) -> None:
        if (step + 1) % every == 0:
            print(f"step {step + 1} of {args.steps}: loss {loss:.4f}", file=sys.stderr)

    losses = tune(lvlm, store, pruner, settings, told)
    lvlm.save_pretrained(args.out)
    record = {
        "command": args.line,
        "store": store.fingerprint,
        "settings": vars(settings),
        "losses": [round(one, 5) for one in losses],
    }
    write_json(args.out / "finetuning.json", record)
    print(f"tuned checkpoint in {args.out}; stores must be encoded again with it")
    return 0


def add_finetune(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser("finetune", help="tune an LVLM to a pruner by LoRA (TPRL table 5)")
    sub.add_argument("store", type=path, help="feature store of the training split")
    sub.add_argument("--lvlm", type=place, required=True, help="the LVLM that encoded it")
    sub.add_argument("--policy", type=path, help="folder of a trained policy, which stays as it is")
    sub.add_argument("--pruner", help="name of a published pruner instead")
    sub.add_argument(
        "--budgets", type=budgets,
        help="tokens kept, one drawn per batch (default: all tokens, a control without a pruner)",
    )  # fmt: skip
    sub.add_argument("--steps", type=int, default=300, help="gradient steps")
    sub.add_argument("--batch-size", type=int, default=32, help="questions per step")
    sub.add_argument("--lr", type=float, default=1e-3, help="largest learning rate")
    sub.add_argument("--rank", type=int, default=8, help="of the LoRA matrices")
    sub.add_argument("--seed", type=int, default=0, help="of order, budgets and matrices")
    sub.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    sub.add_argument("--dtype", help="number type (default: bfloat16 on a GPU, else float32)")
    sub.add_argument("--out", type=path, required=True, help="folder of the tuned checkpoint")
    sub.set_defaults(run=finetune)
