"""Seconds of each reducer before the LLM, against the LLM's prefill of the full image.

    python -m benchmarks.reducers --out benchmarks/results/reducers.json

Tower and LLM have the built-in LVLM's sizes and random weights; a picture has 144 or 576 tokens,
of which a third stay (of `pooled` a quarter). What a method reads of the tower's own pass is there
before the clock starts; passes that it adds count. Reducers inside the LLM are in
`benchmarks.inside`. Methods and prefill take turns. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, CLIPVisionModel

from tprl_env.files import write_json
from tprl_env.lvlm.loading.signals import TowerSignals
from tprl_env.lvlm.tiny import builtin_path
from tprl_env.reducers import REDUCERS, Merger, PruneInputs, Pruner, make_reducer

TEXT, CLIP_WIDTH = 20, 64


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = {str(side * side): _measure(side, args.repeats) for side in args.sides}
    for tokens, rows in found.items():
        for name, row in sorted(rows.items(), key=lambda item: item[1]["to_prefill"]):
            ms = 1000 * row["seconds"]
            print(f"{tokens:>4} tokens {name:20} {ms:8.2f} ms, {row['to_prefill']:.2f} prefills")
    setting = {"sides": args.sides, "repeats": args.repeats, "threads": args.threads}
    result = {"setting": setting, "tokens": found}
    if args.out is not None:
        write_json(args.out, result)
    print(json.dumps(result))
    return 0


@torch.inference_mode()
def _measure(side: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of the prefill and of every method, and their ratio."""
    calls = _calls(side)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - began)
    median = {name: float(np.median(every)) for name, every in seconds.items()}
    return {
        name: {"seconds": round(one, 6), "to_prefill": round(one / median["prefill"], 3)}
        for name, one in median.items()
    }


def _calls(side: int) -> dict[str, Callable[[], object]]:
    config = AutoConfig.from_pretrained(builtin_path("crowded"))
    vision, text = config.vision_config, config.text_config
    vision.image_size = side * vision.patch_size
    llm = AutoModel.from_config(text, attn_implementation="sdpa").eval().float()
    tower = CLIPVisionModel(vision).eval().float()
    tower.set_attn_implementation("sdpa")
    projector = torch.nn.Linear(vision.hidden_size, text.hidden_size)
    pixels = torch.randn(1, vision.num_channels, vision.image_size, vision.image_size)
    signals = TowerSignals(tower, projector, pixels, [-2], True, -2)
    tokens = side * side
    features = signals.features()[1:]
    one = PruneInputs(
        tokens=signals.project(features),
        tower=features,
        cls_attention=signals.block(-2).cls_attention().mean(0),
        grid=(side, side),
        query_tokens=torch.randn(6, text.hidden_size),
        relevance=torch.rand(tokens).round(),
        question_attention=torch.rand(tokens),
        question_rows=torch.rand(tokens),
        vision=signals,
        clip_image=torch.randn(tokens, CLIP_WIDTH),
        clip_text=torch.randn(1, CLIP_WIDTH),
    )
    embedded = torch.randn(1, tokens + TEXT, text.hidden_size)
    calls: dict[str, Callable[[], object]] = {"prefill": lambda: llm(inputs_embeds=embedded)}
    for name in REDUCERS:
        budget = tokens // 4 if name == "pooled" else tokens // 3
        method = make_reducer(name)
        if isinstance(method, Merger):
            calls[name] = lambda method=method, budget=budget: method.merge(one, budget)
        elif isinstance(method, Pruner):
            calls[name] = lambda method=method, budget=budget: method.prune(one, budget)
    return calls


if __name__ == "__main__":
    raise SystemExit(main())
