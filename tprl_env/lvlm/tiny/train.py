"""Train one of the built-in models from nothing: ``tprl tiny-lvlm train``.

Every stage counts steps, never seconds, and draws from its own seeded streams: the same arguments
give the same weights on one machine with one thread count.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tprl_env.checks import check_choice
from tprl_env.lvlm.tiny.language import Phase, align_projector, train_language
from tprl_env.lvlm.tiny.model import build_model, build_processor, build_tokenizer
from tprl_env.lvlm.tiny.recipe import RECIPES, Recipe
from tprl_env.lvlm.tiny.tower import train_cls_head, train_tower

Measure = Callable[[Path, str, int], Mapping[str, Any]]


def train_tiny_lvlm(
    task: str,
    out: str | Path,
    *,
    measure: Measure | None = None,
    seed: int = 0,
    scale: float = 1.0,
    threads: int = 1,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train a built-in model and write it as an ordinary Hugging Face LLaVA checkpoint.

    The folder appears at ``out`` complete or not at all.

    Args:
        task: ``"crowded"`` or ``"sparse"``.
        out: Folder to create; must not exist or be empty.
        measure: Called with the checkpoint's folder, the task and a number of scenes; what it
            returns goes into ``training.json``
            (`tprl_env.evaluation.tiny_lvlm.measure_tiny_lvlm`).
        seed: Seed of initial weights and training scenes (train split only).
        scale: Multiplies every step count; smoke tests use a tiny one.
        threads: Torch threads; the weights are reproducible for a fixed number.
        log: Called with progress lines.

    Returns:
        What ``training.json`` holds: seed, step counts, seconds and what was measured.

    Raises:
        ValueError: Unknown task, ``scale`` or ``threads`` not positive, or ``out`` is not empty.
    """
    check_choice("task", task, RECIPES)
    recipe = RECIPES[task].scaled(scale)
    scenes = max(4, round(500 * min(1.0, scale)))
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out must be a new or empty folder, got {out}; remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / "model"
            report = _train_into(folder, recipe, seed, threads, log)
            if measure is not None:
                start = time.perf_counter()
                report |= measure(folder, task, scenes)
                report["seconds"]["evaluate"] = round(time.perf_counter() - start, 1)
            text = json.dumps(report, indent=2)
            (folder / "training.json").write_text(text + "\n")
            os.replace(folder, out)  # atomic: an empty folder is replaced, a full one refused
    finally:
        torch.set_num_threads(before)
    return dict(json.loads(text))


def _train_into(
    folder: Path, recipe: Recipe, seed: int, threads: int, log: Callable[[str], None]
) -> dict[str, Any]:
    """Run all stages and write the checkpoint to ``folder``."""
    start = time.perf_counter()
    seconds: dict[str, float] = {}

    def say(line: str) -> None:
        log(f"[{time.perf_counter() - start:7.1f} s] {line}")

    def done(stage: str) -> None:
        seconds[stage] = round(time.perf_counter() - start - sum(seconds.values()), 1)

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, recipe.attend, seed)
    digits = train_tower(model, recipe, 10_000 * seed, say)
    done("tower")
    train_cls_head(model, recipe, 10_000 * seed, say)
    done("cls")
    align_projector(model, tokenizer, recipe, 10_000 * seed, say)
    done("align")
    phases = (
        Phase("language", recipe.language_steps, 1.5e-3, recipe.short_share, 0.0),
        Phase("pruned", recipe.pruned_steps, 6e-4, 0.0, recipe.pruned_share),
    )
    for i, phase in enumerate(phases):
        train_language(model, tokenizer, recipe, phase, 10_000 * seed + 400 + 100 * i, say)
        done(phase.name)
    model.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    return {
        "recipe": asdict(recipe),
        "seed": seed,
        "threads": threads,
        "torch": torch.__version__,
        "seconds": seconds,
        "tower_digit_accuracy_train": digits,
    }
