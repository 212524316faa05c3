"""Equality and speed on a machine with a GPU, without Ray, hub or network.

    python -m benchmarks.gpu --out DIR

Runs the tests marked ``gpu``, then scores and encodes on random weights of true shapes
(LLaVA-1.5-7B, Qwen2.5-VL-7B), runs ``tprl efficiency`` on them, and writes DIR/gpu.json. ``--tiny``
runs the same code on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from tprl_env.cli import main as tprl
from tprl_env.files import write_json
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.tiny.families import Sizes, build_random

_WORDS = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32}
_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
_QWEN = {"num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
TRUE_SHAPES = {
    "llava": Sizes(
        {**_WORDS, "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32064},
        {**_CLIP, "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    ),
    "qwen2_5_vl": Sizes(
        {
            **{**_QWEN, "hidden_size": 3584, "intermediate_size": 18944, "vocab_size": 152064},
            "rope_parameters": _MROPE,
        },
        {
            **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
            **{"out_hidden_size": 3584, "window_size": 112, "patch_size": 14},
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    ),
}
ANSWER = (40, 41, 2)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --tiny runs the same code on the CPU")
    device = "cpu" if args.tiny else "cuda"
    record: dict[str, Any] = {
        "command": "python -m benchmarks.gpu " + ("--tiny" if args.tiny else ""),
        "ran_on_gpu": not args.tiny,
        "device": platform.machine() if args.tiny else torch.cuda.get_device_name(),
        "versions": {
            **{"python": platform.python_version(), "torch": torch.__version__},
            "transformers": transformers.__version__,
        },
        "setting": {"rows": args.rows, "repeats": args.repeats},
        "tests": None if args.tiny else _tests(),
        "shapes": {
            name: _measure(name, Sizes() if args.tiny else sizes, device, args.rows, args.repeats)
            for name, sizes in TRUE_SHAPES.items()
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / "gpu.json", record)  # kept if the longest part fails
    record["efficiency"] = _efficiency(args.out, args.tiny)
    write_json(args.out / "gpu.json", record)
    print(json.dumps(record))
    return 0


def _tests() -> dict[str, Any]:
    """The tests marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/lvlm"]
    done = subprocess.run(command, capture_output=True, text=True)
    return {"exit_status": done.returncode, "last_line": done.stdout.strip().splitlines()[-1]}


def _efficiency(out: Path, tiny: bool) -> dict[str, str]:
    """``tprl efficiency``: the goals' settings, at 192 of 576 and 320 of 2 880 tokens."""
    runs = {
        "llava-1.5-7b": ["--budgets=192,64", "--reducers=divprune,fastv", "--new-tokens=4"],
        "llava-next-7b": ["--budgets=320", "--reducers=divprune", "--text=107", "--samples=30"],
    }
    if tiny:
        runs = {"tiny": ["--budgets=8", "--reducers=divprune", "--samples=2", "--warmup=1"]}
    found = {}
    for name, options in runs.items():
        place = out / name
        code = tprl(["efficiency", name, *options, f"--out={place}"])
        found[name] = str(place.name) if code == 0 else f"failed with exit status {code}"
        if not tiny:
            torch.cuda.empty_cache()
    return found


def _measure(name: str, sizes: Sizes, device: str, rows: int, repeats: int) -> dict[str, Any]:
    """Rates of one family at one size."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as folder:
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                parts = build_random(name, sizes)
        finally:
            torch.set_default_dtype(torch.float32)
        if name == "qwen2_5_vl":  # the tiny checkpoint's processor stops at 24 tokens
            parts[2].size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}
        for part in parts:
            part.save_pretrained(folder)
        del parts
        lvlm: Any = load_lvlm(folder, device=device, dtype=dtype)
    picture = np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8)
    (visual,) = lvlm.encode_images([picture])
    prompts = [lvlm.prompt("what color is the 7 ?", [visual])] * rows
    draw = np.random.default_rng(1)
    keep = [draw.random(len(visual.tokens)) < 1 / 3 for _ in range(rows)]
    answers, tokens = [[ANSWER]] * rows, [visual.tokens] * rows

    def one_by_one() -> None:
        for row in range(rows):
            lvlm.score(prompts[:1], answers[:1], tokens[:1], keep[row : row + 1])

    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "scores_batched": (rows, lambda: lvlm.score(prompts, answers, tokens, keep)),
        "scores_one_by_one": (rows, one_by_one),
        "pictures_encoded": (4, lambda: lvlm.encode_images([picture] * 4)),
    }
    rates = {f"{key}_per_second": _rate(*call, device, repeats) for key, call in calls.items()}
    peak = None if device == "cpu" else torch.cuda.max_memory_allocated()
    return {"visual_tokens": len(visual.tokens), "peak_bytes": peak, "dtype": str(dtype), **rates}


def _rate(count: int, call: Callable[[], Any], device: str, repeats: int) -> float:
    """Median of several runs after one that warms up."""
    rates = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        rates.append(count / (time.perf_counter() - began))
    return round(float(np.median(rates[1:])), 2)


if __name__ == "__main__":
    raise SystemExit(main())
