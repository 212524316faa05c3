"""``tprl encode``: a dataset and an LVLM to a feature store."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

from tprl_env.cli.parsing import add_trust, path, place

__all__ = ["add_encode"]


def encode(args: argparse.Namespace) -> int:
    """Turn a dataset split and an LVLM into a feature store."""
    from tprl_env.data import load_dataset
    from tprl_env.lvlm import find_lvlm, load_lvlm

    samples = load_dataset(
        args.data,
        args.split,
        limit=args.limit,
        seed=args.seed,
        skip_bad=args.skip_bad,
        allow_outside=args.allow_outside,
        place=args.place,
        grader=args.grader,
    )
    description = {"data": args.data, "split": args.split, "limit": args.limit, "seed": args.seed}
    load = partial(
        load_lvlm,
        args.lvlm,
        device=args.device,
        dtype=args.dtype,
        revision=args.revision,
        device_map=args.device_map,
    )
    options: dict[str, Any] = {
        "batch_size": args.batch_size,
        "tower": args.tower,
        "skip_bad": args.skip_bad,
        "grade": args.grade,
        "resume": not args.restart,
        "description": description,
        "progress": sys.stderr.isatty(),
    }
    lvlm: Any = None
    if args.engine == "ray":
        find_lvlm(args.lvlm, args.revision)  # refused here rather than in every worker
        from tprl_env.lvlm.encoding.encode_with_ray import encode_dataset_ray

        options |= {"num_gpus": args.num_gpus, "concurrency": args.concurrency}
        store = encode_dataset_ray(load, samples, args.out, **options)
    else:
        from tprl_env.lvlm.encoding.encode import encode_dataset

        lvlm = load()
        store = encode_dataset(lvlm, samples, args.out, **options)
    if args.question_attention and not store.has_channel("question_attention"):
        from tprl_env.lvlm.encoding.saliency import add_question_attention

        lvlm = lvlm or load()
        add_question_attention(store, lvlm, batch_size=args.batch_size)
    if args.question_rows is not None and not store.has_channel("question_rows"):
        from tprl_env.lvlm.encoding.saliency import add_question_rows

        add_question_rows(store, lvlm or load(), args.question_rows, args.batch_size)
    left_out = f"; {store.manifest.skipped} bad samples left out" if args.skip_bad else ""
    print(
        f"{len(store)} questions about {store.num_images} images in {args.out}; accuracy with all "
        f"tokens {float(store.full_scores('exact').mean()):.4f}{left_out}"
    )
    return 0


def add_encode(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser("encode", help="dataset split + LVLM -> feature store")
    sub.add_argument(
        "--data",
        type=place,
        required=True,
        help="a dataset or benchmark (tprl list datasets, benchmarks), or a .jsonl file",
    )
    sub.add_argument(
        "--from", dest="place", type=place, metavar="FOLDER", help="copy of a benchmark's dataset"
    )
    sub.add_argument("--split", default="train", help="of a dataset: train, calibration or test")
    sub.add_argument(
        "--grader", help="of a benchmark, in place of its own: exact is what training computes"
    )
    sub.add_argument(
        "--limit", type=int, help="number of questions (default: all of a file, else 1200)"
    )
    sub.add_argument("--seed", type=int, default=0, help="chooses other scenes of the split")
    sub.add_argument(
        "--lvlm", type=place, required=True, help="builtin:crowded, a folder or a hub id"
    )
    sub.add_argument("--revision", help="commit of a hub checkpoint (default: its newest)")
    sub.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    sub.add_argument(
        "--device-map", metavar="HOW",
        help="several GPUs instead: auto, balanced, balanced_low_0 or sequential",
    )  # fmt: skip
    sub.add_argument(
        "--dtype", help="float32, bfloat16 or float16 (default: bfloat16 on a GPU, else float32)"
    )
    sub.add_argument("--out", type=path, required=True, help="folder of the store")
    sub.add_argument("--batch-size", type=int, default=64, help="questions per forward pass")
    sub.add_argument(
        "--tower", action=argparse.BooleanOptionalAction, default=True,
        help="also the vision tower's features, where the LVLM hands them out (default: yes)",
    )  # fmt: skip
    sub.add_argument(
        "--restart", action="store_true", help="remove the store in --out first, do not continue it"
    )
    sub.add_argument(
        "--grade", action="store_true",
        help="also write answers and grade them by each sample's grader (rules.score_kind=graded)",
    )  # fmt: skip
    sub.add_argument("--skip-bad", action="store_true", help="leave bad samples out, list them")
    sub.add_argument(
        "--allow-outside", action="store_true", help="also read pictures outside the data's folder"
    )
    sub.add_argument(
        "--question-attention", action="store_true", help="also the demonstrator's map"
    )
    sub.add_argument(
        "--question-rows", type=int, nargs="?", const=0, metavar="LAYER",
        help="also what the question looks up before this decoder layer (default 0: no pass)",
    )  # fmt: skip
    _add_engine(sub)
    sub.set_defaults(run=encode)


def _add_engine(sub: Any) -> None:
    """Where it runs."""
    sub.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="this process, or Ray workers"
    )
    sub.add_argument("--num-gpus", type=float, default=0, help="per worker of --engine ray")
    sub.add_argument("--concurrency", type=int, default=1, help="workers of --engine ray")
    add_trust(sub)
