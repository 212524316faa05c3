"""``tprl efficiency SHAPE``: memory, operations and time of reducers, part by part."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tprl_env.cli.evaluate_reducers import reducer_names
from tprl_env.cli.parsing import budgets, counts, path, place

__all__ = ["add_efficiency"]

RESULTS, TABLE = "efficiency.json", "efficiency.md"


def efficiency(args: argparse.Namespace) -> int:
    """Measure and write the tables."""
    import numpy as np
    import torch

    from tprl_env.env.budgets import is_share, tokens_of
    from tprl_env.evaluation.efficiency import Bench, Protocol
    from tprl_env.evaluation.reducer_names import contenders
    from tprl_env.files import versions, write_json, write_text
    from tprl_env.lvlm import load_lvlm
    from tprl_env.lvlm.shapes import SHAPES, random_lvlm

    chosen = contenders(args.reducers or ["divprune"])
    protocols = [
        Protocol(text, batch, args.new_tokens, args.warmup, args.samples)
        for text in args.text for batch in args.batch
    ]  # fmt: skip
    options = {"device": args.device, "dtype": args.dtype}
    random = args.config in SHAPES
    lvlm = random_lvlm(args.config, **options) if random else load_lvlm(args.config, **options)
    side = SHAPES[args.config].picture if random else (336, 336)
    picture = np.random.default_rng(0).integers(0, 255, (*side, 3), dtype=np.uint8)
    rows: list[dict[str, Any]] = []
    benches = [Bench(lvlm, picture, protocol) for protocol in protocols]
    bench = benches[0]
    wanted = [
        (one, tokens_of(budget, bench.count) if is_share(budget) else int(budget))
        for budget in args.budgets for one in chosen
    ]  # fmt: skip
    for one, count in wanted:  # before minutes are spent on the others
        bench.check(one.make(count), count)
    for bench in benches:
        every: list[tuple[str, Any, int]] = [("all tokens", None, bench.count)]
        every += [(one.label, one.make(count), count) for one, count in wanted]
        for label, reducer, count in every:
            rows.append(bench.measure(label, reducer, count))
            if args.largest:
                rows[-1]["largest_batch"] = bench.largest_batch(reducer, count)
    cuda = lvlm.device.type == "cuda"
    content = {
        "command": args.line,
        "lvlm": lvlm.name,
        "weights": "random" if random else "of the checkpoint",
        "device": torch.cuda.get_device_name(lvlm.device) if cuda else _processor(),
        "threads": None if cuda else torch.get_num_threads(),
        "dtype": str(lvlm.dtype).removeprefix("torch."),
        "attention": "torch scaled_dot_product_attention for every row",
        "visual_tokens": bench.count,
        "always_kept": bench.fixed,
        "warmup": args.warmup,
        "samples": args.samples,
        "rows": rows,
        "versions": versions(),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / RESULTS, content)
    page = table(content)
    write_text(args.out / TABLE, page)
    print(page)
    return 0


def _processor() -> str:
    """A name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(content: Mapping[str, Any]) -> str:
    """Markdown: every row with its share of the whole model's."""
    count, weights = content["visual_tokens"], content["weights"]
    lines = [
        f"# {content['lvlm']}: {count} visual tokens, {weights} weights",
        "",
        f"{content['device']}, {content['dtype']}; medians of {content['samples']} runs after "
        f"{content['warmup']}; in brackets the share of the row with all tokens.",
        "",
        "| reducer | tokens | text | batch | tower ms | reducer ms | prefill ms "
        "| to first token ms | decode ms/token | prefill GFLOPs | reducer GFLOPs | KV MB |",
        "|" + " --- |" * 12,
    ]
    for row in content["rows"]:
        full = _whole(content["rows"], row)
        ms, reducer = row["ms"], row["ms"].get("reducer", {"median": 0.0})
        both = ms["prefill"]["median"] + reducer["median"]
        cells = [
            row["reducer"],
            f"{row['average_tokens']:g}",
            str(row["text_tokens"]),
            str(row["batch"]),
            f"{ms['tower']['median']:.2f}",
            f"{reducer['median']:.2f}",
            f"{ms['prefill']['median']:.2f} ({_share(both, full['ms']['prefill']['median'])} with "
            f"the reducer)",
            f"{row['ms_to_first_token']:.2f} "
            f"({_share(row['ms_to_first_token'], full['ms_to_first_token'])})",
            f"{ms['decode_per_token']['median']:.3f}",
            f"{row['flops']['counted_prefill'] / 1e9:.3f} "
            f"({_share(row['flops']['counted_prefill'], full['flops']['counted_prefill'])})",
            f"{row['flops']['counted_reducer'] / 1e9:.3f}",
            f"{row['kv_bytes']['visual'] / 1e6:.2f} "
            f"({_share(row['kv_bytes']['visual'], full['kv_bytes']['visual'])})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Made by `{content['command']}`."]) + "\n"


def _whole(rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with all tokens of the same prompt and batch."""
    keys = ("text_tokens", "batch")
    return next(
        one
        for one in rows
        if one["reducer"] == "all tokens" and all(one[key] == row[key] for key in keys)
    )


def _share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.0f} %" if whole else "-"


def add_efficiency(commands: Any) -> None:
    """The sub-command."""
    sub = commands.add_parser(
        "efficiency", help="memory, operations and time of reducers, part by part"
    )
    sub.add_argument(
        "config", type=place,
        help="a published shape with random weights (llava-1.5-7b, llava-1.5-13b, llava-next-7b, "
        "qwen2.5-vl-3b, qwen2.5-vl-7b; small and tiny for CPUs), builtin:crowded, a folder or a "
        "hub id",
    )  # fmt: skip
    sub.add_argument("--reducers", type=reducer_names, help="names (default: divprune)")
    sub.add_argument(
        "--budgets", type=budgets, default=(0.3333, 0.2222, 0.1111),
        help="counts or shares (default: 0.3333,0.2222,0.1111: 192, 128 and 64 of 576)",
    )  # fmt: skip
    sub.add_argument("--text", type=counts, default=(35, 107), help="text tokens (default: 35,107)")
    sub.add_argument("--batch", type=counts, default=(1,), help="prompts per pass (default: 1)")
    sub.add_argument("--new-tokens", type=int, default=16, help="decoded behind the first")
    sub.add_argument("--warmup", type=int, default=10, help="runs before the clock starts")
    sub.add_argument("--samples", type=int, default=100, help="runs that are timed")
    sub.add_argument("--largest", action="store_true", help="on a GPU: also the largest batch")
    sub.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")
    sub.add_argument("--dtype", help="number type (default: bfloat16 on a GPU, else float32)")
    sub.add_argument("--out", type=path, required=True, help="folder of the tables")
    sub.set_defaults(run=efficiency)
