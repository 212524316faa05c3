"""A made store of 50 000 samples with 576 tokens each: opening, memory of a runner, reading.

Written by `encode_dataset`, with a stand-in for the LVLM whose features are noise;
20 questions share an image, as in GQA. Nothing is downloaded. Run by ``benchmarks.scale store``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.scale import KEPT, TOKENS, load
from tprl_env.data.features.store import CODES, FeatureStore
from tprl_env.data.sample import Sample
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.protocol import LVLMScores, Prompt, Visual
from tprl_env.scoring.spec import ScorerSpec

WIDTH = 1024  # LLaVA-1.5-7B has 4096; the disk would need four times the room
CODE_WIDTH = 64
QUESTION = 10
SIDE = 24
BATCHES = 40
ROWS = 256


class MadeLVLM:
    """Noise in the shapes of an LVLM's features; equal inputs give equal features."""

    name, fingerprint, model_type = "made", "made-1", "made"
    token_width = query_width = WIDTH

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._noise = rng.standard_normal((2 * TOKENS, WIDTH)).astype(np.float16)

    def encode_images(self, images: list[np.ndarray]) -> list[Visual]:
        """A window of the noise, by the image's content."""
        starts = [int(image.sum()) % TOKENS for image in images]
        return [Visual(self._noise[s : s + TOKENS], None, None, (SIDE, SIDE)) for s in starts]

    def prompt(self, question: str) -> Prompt:
        """One id per word."""
        words = tuple(3 + len(word) for word in question.split())
        return Prompt((1, 2, *words), (1,), (2, 2 + len(words)), question)

    def answer_ids(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        """One id per character."""
        return (*map(ord, answer), 0)

    def question_embeddings(self, prompt: Prompt) -> np.ndarray:
        """Noise, one row per word."""
        return self._noise[: len(prompt.ids) - 2]

    def score(self, prompts: list[Prompt], *_: Any) -> LVLMScores:
        """All right."""
        ones = np.ones(len(prompts), np.float32)
        return LVLMScores(ones, ones)


def made_samples(samples: int, images: int) -> Iterator[Sample]:
    """Questions of ten words; consecutive ones share an image."""
    each = -(-samples // images)
    for number in range(samples):
        image = number // each
        picture = np.full((SIDE, SIDE, 3), image % 251, np.uint8)
        picture[0, 0] = (image // 251, image % 251, 7)
        words = " ".join("x" * (1 + (number + place) % 9) for place in range(QUESTION))
        yield Sample(f"s{number}", picture, words, ("yes",), f"i{image}")


def write(folder: Path, samples: int, images: int) -> None:
    """Encode, then add codes."""
    store = encode_dataset(
        MadeLVLM(), made_samples(samples, images), folder, tower=False, progress=False,
        description="made",
    )  # fmt: skip
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((2 * TOKENS, CODE_WIDTH)).astype(np.float32)
    starts = rng.integers(0, TOKENS, store.num_images)
    codes = (noise[start : start + TOKENS] for start in starts)
    store.write_channel(CODES, codes, dtype="float16", meta={"fingerprint": "made"})


def instant(spec: ScorerSpec) -> Any:
    """A scorer that needs nothing."""
    return lambda samples, keep: keep.mean(axis=1).astype(np.float32)


def resident() -> dict[str, float]:
    """MB of this process: in total, and of it pages of mapped files, which the kernel may drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    table = {line.partition(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    own, mapped = (int(table[name]) / 1e3 for name in ("RssAnon", "RssFile"))
    return {"total": own + mapped, "own": own, "mapped": mapped}


def beyond(before: dict[str, float]) -> dict[str, float]:
    return {name: round(value - before[name], 1) for name, value in resident().items()}


def forget(folder: Path) -> None:
    """Drop the store's pages from the page cache, so that opening reads the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def opening(folder: Path) -> dict[str, Any]:
    """In a fresh process: open thrice, then read random batches as a runner does.

    The first opening also imports what pyarrow imports on its first use; before the "cold" one the
    store's pages are dropped from the page cache.
    """
    import pyarrow.ipc  # noqa: F401  an import, not a part of opening

    found: dict[str, Any] = {}
    before = resident()
    for name in ("first", "cold", "warm"):
        if name == "cold":
            forget(folder)
        start, cpu = time.perf_counter(), time.process_time()
        store = FeatureStore.open(folder)
        found[f"open_{name}_seconds"] = round(time.perf_counter() - start, 3)
        found[f"open_{name}_cpu_seconds"] = round(time.process_time() - cpu, 3)
    found["open_mb"] = beyond(before)
    rng = np.random.default_rng(0)
    for name, read in (("codes", store.codes), ("query_tokens", store.query_tokens)):
        batches = [rng.integers(0, len(store), ROWS) for _ in range(BATCHES)]
        for label in ("first", "again"):
            start, cpu = time.perf_counter(), time.thread_time()
            for batch in batches:
                read(batch)
            rate = BATCHES * ROWS / (time.perf_counter() - start)
            per_cpu = BATCHES * ROWS / (time.thread_time() - cpu)
            found[f"{name}_{label}_samples_per_second"] = round(rate)
            found[f"{name}_{label}_samples_per_cpu_second"] = round(per_cpu)
    found["read_mb"] = beyond(before)
    return found


def runner(folder: Path) -> dict[str, Any]:
    """In a fresh process: a whole env runner, four iterations of 256 episodes."""
    import torch

    from tprl_env.rllib.algorithms import algorithm_config
    from tprl_env.rllib.config import load_config
    from tprl_env.rllib.rollout.runner import TokenPruningRunner

    torch.set_num_threads(1)
    settings = {
        "source": str(folder),
        "scoring.scorer": "import",
        "resources.num_scorers": 0,
        "rules.budget": KEPT,
        "scoring.factory": "benchmarks.scale_store:instant",
        "imitation.demonstrator": "none",
    }
    before = resident()
    config = load_config("recommended", settings)
    made = TokenPruningRunner(config=algorithm_config(config), worker_index=0, num_workers=0)
    found: dict[str, Any] = {"imports_mb": round(before["total"]), "built_mb": beyond(before)}
    start, cpu = time.perf_counter(), time.process_time()
    iterations = [made.sample() for _ in range(4)]
    steps = sum(len(part) for stores in iterations for part in stores)
    found["steps_per_second"] = round(steps / (time.perf_counter() - start), 1)
    found["steps_per_cpu_second"] = round(steps / (time.process_time() - cpu), 1)
    del iterations
    found["sampled_mb"] = beyond(before)
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e3
    found["peak_mb"] = round(peak - before["total"], 1)
    return found


def fresh(part: str, folder: Path) -> dict[str, Any]:
    """Run one part in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.scale_store", part, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def large_store(folder: Path | None, samples: int, images: int) -> dict[str, Any]:
    """Write the store unless ``folder`` holds it, and measure it."""
    root = Path(tempfile.mkdtemp(prefix="tprl-store-")) if folder is None else folder
    try:
        seconds = load().get("store", {}).get("written_in_seconds")
        if not (root / f"channel-{CODES}.json").is_file():
            start = time.monotonic()
            write(root, samples, images)
            seconds = round(time.monotonic() - start, 1)
        found: dict[str, Any] = {
            "samples": samples, "images": images, "tokens": TOKENS, "token_width": WIDTH,
            "code_width": CODE_WIDTH, "written_in_seconds": seconds,
            "gigabytes": round(sum(p.stat().st_size for p in root.iterdir()) / 1e9, 2),
        }  # fmt: skip
        found["reading"] = fresh("opening", root)
        found["runner"] = fresh("runner", root)
        return found
    finally:
        if folder is None:
            shutil.rmtree(root)


if __name__ == "__main__":
    part, place = sys.argv[1:]
    print(json.dumps({"opening": opening, "runner": runner}[part](Path(place))))
