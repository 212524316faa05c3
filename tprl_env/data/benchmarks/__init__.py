"""Published benchmarks: one file each, read through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Mapping

from tprl_env.data.benchmarks import (
    ai2d,
    flickr30k,
    gqa,
    mathvista,
    mmbench,
    mme,
    pope,
    refcoco,
    science_qa,
    seed_bench,
    textvqa,
    vizwiz,
    vqa_v2,
)
from tprl_env.data.benchmarks.benchmark import Benchmark, Item
from tprl_env.data.benchmarks.loading import BenchmarkDataset

__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkDataset", "Item", "load_benchmark"]

BENCHMARKS: Mapping[str, Benchmark] = {
    "gqa": gqa.BENCHMARK,
    "vqa_v2": vqa_v2.BENCHMARK,
    "textvqa": textvqa.BENCHMARK,
    "vizwiz": vizwiz.BENCHMARK,
    "pope": pope.BENCHMARK,
    "mme": mme.BENCHMARK,
    "mmbench": mmbench.BENCHMARK,
    "seed_bench": seed_bench.BENCHMARK,
    "science_qa": science_qa.BENCHMARK,
    "ai2d": ai2d.BENCHMARK,
    "mathvista": mathvista.BENCHMARK,
    "refcoco": refcoco.BENCHMARK,
    "flickr30k": flickr30k.BENCHMARK,
}


def load_benchmark(
    name: str,
    split: str = "test",
    *,
    place: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    streaming: bool = False,
    grader: str | None = None,
) -> BenchmarkDataset:
    """A split of a benchmark as samples; rows are read while iterating.

    Args:
        name: A name in :data:`BENCHMARKS`.
        split: ``"test"``, the one that papers report; ``"train"`` where the benchmark has one.
        place: Folder of a copy (as ``datasets`` saves it, or parquet files), or another hub id.
        limit: Only the first this many questions.
        skip_bad: Leave out rows that cannot be used, and count them.
        streaming: Read rows from the hub one after the other instead of downloading all.
        grader: Another grader than the benchmark's; ``"exact"`` is what training computes.

    Raises:
        ValueError: There is no such benchmark, split or grader, or a column is missing.
        FileNotFoundError: The folder or the hub's dataset is out of reach.
        ImportError: The ``datasets`` library is not installed.
    """
    from tprl_env.checks import check_choice

    check_choice("benchmark", name, BENCHMARKS)
    known = BENCHMARKS[name]
    if split not in known.splits:
        trainable = [other for other, one in BENCHMARKS.items() if "train" in one.splits]
        cure = f"; train on {', '.join(trainable)}" if split == "train" else ""
        raise ValueError(
            f"benchmark {name!r} has no split {split!r}, its splits are {', '.join(known.splits)}"
            f"{cure}"
        )
    return BenchmarkDataset(
        name, known, split, place, limit, skip_bad, streaming, grader or known.grader
    )
