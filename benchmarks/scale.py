"""How scoring grows with the number of scorer actors, and a large store, both without a GPU.

    python -m benchmarks.scale calibrate   CPU seconds of real passes of the built-in LVLM
    python -m benchmarks.scale scorers     1 to 64 simulated scorers, scores per second
    python -m benchmarks.scale store       50 000 samples of 576 tokens: open, memory, reading

The scorers are simulated: a pass sleeps as long as a model's pass would take. Everything else is
real: the pool's client with its routing, checks and cache, Ray's calls, and `ScorerActor`. With
``--processes`` fewer than scorers, one process holds several `ScorerActor` objects, each with its
own queue and thread and addressed on its own; 64 processes take minutes to start on two cores.
Each part replaces its section of ``benchmarks/results/scale.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.scoring.spec import ScorerSpec

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
TOKENS = 576
BATCH = 128
SOURCE = f"toy:samples=2048,tokens={TOKENS},width=4,seed=0"
KEPT = (4, 48)
DRAWS = 8
AHEAD = 2  # requests under way at once, as many as the runner has
PIECES = 4  # passes per actor and request
MODELS: dict[str, dict[str, Any]] = {
    "built-in": {
        "origin": "measured here by `calibrate`: CPU seconds of one thread, built-in LVLM, float32",
        "seconds": 0.0, "per_row": 0.0, "per_token": 0.0,
    },
    "7B": {
        "origin": "ASSUMED, not measured: LLaVA-1.5-7B, 2 x 6.74e9 FLOP per token, 125 TFLOP/s "
        "sustained (40 % of an A100's 312 in bf16), 60 text tokens per row, 20 ms per pass",
        "seconds": 0.02, "per_row": 60 * 13.48e9 / 125e12, "per_token": 13.48e9 / 125e12,
    },
}  # fmt: skip


def simulated(spec: ScorerSpec) -> Callable[..., np.ndarray]:
    """A scorer that sleeps: ``seconds + rows * per_row + kept tokens * per_token``.

    The three numbers are read from a file at each pass, so that one set of processes serves
    several models.
    """
    file = Path(spec.options["file"])

    def score(samples: np.ndarray, keep: np.ndarray) -> np.ndarray:
        model = json.loads(file.read_text())
        work = len(samples) * model["per_row"] + int(keep.sum()) * model["per_token"]
        time.sleep(model["seconds"] + work)
        return keep.mean(axis=1).astype(np.float32)

    return score


def draw(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups of eight random masks of 4 to 48 of 576 tokens."""
    samples = np.repeat(rng.integers(0, 2048, rows // DRAWS), DRAWS)
    kept = rng.integers(KEPT[0], KEPT[1] + 1, rows)
    places = rng.random((rows, TOKENS)).argpartition(KEPT[1], axis=1)[:, : KEPT[1]]
    keep = np.zeros((rows, TOKENS), bool)
    chosen = np.arange(KEPT[1]) < kept[:, None]
    keep[np.repeat(np.arange(rows), kept), places[chosen]] = True
    return samples, keep


class ScorerHost:
    """Several `ScorerActor` in one process, each addressed by its number."""

    def __init__(self, spec: ScorerSpec, count: int) -> None:
        from tprl_env.scoring.actor import ScorerActor

        self._scorers = [ScorerActor(spec, TOKENS, 1) for _ in range(count)]

    async def score(self, number: int, *request: Any) -> Any:
        """`ScorerActor.score` of one of them."""
        return await self._scorers[number].score(*request)

    async def ready(self) -> int:
        """Process id."""
        return os.getpid()


@dataclass(frozen=True)
class Lodger:
    """What the router takes for an actor's handle: one scorer of a host."""

    method: Any
    number: int

    @property
    def score(self) -> Lodger:
        """The only method that is called without faults."""
        return self

    def options(self, **options: Any) -> Lodger:
        """As of an actor's method."""
        return Lodger(self.method.options(**options), self.number)

    def remote(self, *request: Any) -> Any:
        """Call it."""
        return self.method.remote(self.number, *request)


@dataclass(frozen=True)
class Hosts:
    """All simulated scorers.

    Attributes:
        spec: What each of them builds.
        names: Of the host processes' actors.
        each: Scorers per process.
    """

    spec: ScorerSpec
    names: list[str]
    each: int

    def client(self, scorers: int) -> Any:
        """A pool's client of the first scorers, spread over the processes."""
        import ray

        from tprl_env.scoring.pool import ScorerPool
        from tprl_env.scoring.spec import PoolAddress

        names = [self.names[number % len(self.names)] for number in range(scorers)]
        namespace = ray.get_runtime_context().namespace
        client = ScorerPool.connect(PoolAddress(tuple(names), namespace, asdict(self.spec), {}))
        for number, state in enumerate(client._router.actors):
            state.handle = Lodger(state.handle.score, number // len(self.names))
        return client


def measure(hosts: Hosts, actors: int, passes: int) -> dict[str, float]:
    """One client and ``actors`` scorers, kept busy with two requests at a time."""
    client = hosts.client(actors)
    rng = np.random.default_rng(actors)
    rows = actors * BATCH * PIECES
    asked = [draw(rng, rows) for _ in range(passes // PIECES)]
    depths, waiting = [], deque()
    before, start = time.process_time(), time.monotonic()
    for number, (samples, keep) in enumerate(asked):
        waiting.append((number, client.submit(samples, keep)))
        depths.append(client.counters()["queue_depth"])
        if len(waiting) == AHEAD:
            check(asked, *waiting.popleft())
    while waiting:
        check(asked, *waiting.popleft())
    wall, cpu = time.monotonic() - start, time.process_time() - before
    counters = client.counters()
    scores = rows * len(asked)
    assert counters["scores"] == scores and counters["retries"] == 0
    return {
        "actors": actors,
        "scores": scores,
        "seconds": round(wall, 2),
        "scores_per_second": round(scores / wall, 1),
        "busy_share": round(counters["busy_seconds"] / (wall * actors), 4),
        "batch_fill": round(counters["batch_rows"] / max(counters["batches"], 1) / BATCH, 3),
        "queue_mean": round(float(np.mean(depths)), 1),
        "queue_peak": counters["queue_peak"],
        "client_cpu_share": round(cpu / wall, 3),
        "client_cpu_us_per_score": round(1e6 * cpu / scores, 2),
    }


def check(asked: list[tuple[np.ndarray, np.ndarray]], number: int, pending: Any) -> None:
    """Every score is that of its own mask."""
    wanted = asked[number][1].mean(axis=1).astype(np.float32)
    np.testing.assert_allclose(pending.result(), wanted, rtol=1e-6)


def memory(pids: Sequence[int]) -> dict[str, float]:
    """Resident and proportional memory of processes, MB each."""
    import psutil

    full = [psutil.Process(pid).memory_full_info() for pid in pids]
    return {
        "resident_mb": round(float(np.mean([part.rss for part in full])) / 1e6, 1),
        "proportional_mb": round(float(np.mean([part.pss for part in full])) / 1e6, 1),
    }


def scorers(args: argparse.Namespace) -> dict[str, Any]:
    """Scores per second of 1 to ``--actors`` scorers, for each model."""
    import ray

    models = {**MODELS, **load().get("models", {})}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}},
    )
    found: dict[str, Any] = dict(load().get("scorers", {}))  # other models keep their rows
    most = args.actors[-1]
    processes = min(args.processes or most, most)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.json"
        spec = ScorerSpec(
            SOURCE,
            kind="import",
            factory="benchmarks.scale:simulated",
            options={"file": str(file)},
            batch_size=BATCH,
        )
        start = time.monotonic()
        hosts = Hosts(spec, [f"host-{n}" for n in range(processes)], -(-most // processes))
        remote = ray.remote(num_cpus=0, max_concurrency=1000)(ScorerHost)
        handles = [remote.options(name=n).remote(spec, hosts.each) for n in hosts.names]
        pids = ray.get([handle.ready.remote() for handle in handles])
        started = {"processes": processes, "scorers_each": hosts.each}
        started["start_seconds"] = round(time.monotonic() - start, 1)
        found["processes"] = started | memory(pids)
        print(json.dumps(found["processes"]), flush=True)
        for name in args.models:
            replace(file, json.dumps(models[name]))
            found[name] = {"model": models[name], "rows": grow(hosts, args)}
    ray.shutdown()
    return {"scorers": found}


def grow(hosts: Hosts, args: argparse.Namespace) -> list[dict[str, float]]:
    """One row for each number of scorers, with its efficiency S(n) / (n S(1))."""
    measure(hosts, args.actors[-1], PIECES)  # connections
    rows: list[dict[str, float]] = []
    for actors in args.actors:
        row = measure(hosts, actors, args.passes)
        alone = rows[0] if rows else row
        rate = row["scores_per_second"] / alone["scores_per_second"]
        rows.append(row | {"efficiency": round(rate / actors * alone["actors"], 4)})
        rows[-1]["load_average"] = round(os.getloadavg()[0], 1)
        print(json.dumps(rows[-1]), flush=True)
    return rows


def replace(path: Path, text: str) -> None:
    """Write a file in one piece."""
    draft = path.with_suffix(".writing")
    draft.write_text(text)
    draft.replace(path)


def calibrate(args: argparse.Namespace) -> dict[str, Any]:
    """Fit seconds = fixed + rows * per_row + tokens * per_token to passes of the built-in LVLM."""
    import torch

    from tprl_env.data import load_dataset
    from tprl_env.lvlm import load_lvlm
    from tprl_env.lvlm.encoding.encode import encode_dataset
    from tprl_env.scoring.lvlm_scorer import LVLMScorer

    torch.set_num_threads(1)
    lvlm = load_lvlm("builtin:crowded", device="cpu", dtype="float32")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        samples = load_dataset("scenes-crowded", "test", limit=64)
        store = encode_dataset(lvlm, samples, Path(folder) / "store", tower=False, progress=False)
        scorer = LVLMScorer(lvlm, store)
        points = []
        for rows, kept in [(r, k) for r in (8, 32, 64, 128) for k in (4, 14, 29, 48)]:
            numbers = rng.integers(0, len(store), rows)
            order = rng.random((rows, store.max_tokens)).argsort(axis=1)
            keep = order < kept
            scorer(numbers, keep)
            times = []
            for _ in range(5):
                start = time.thread_time()
                scorer(numbers, keep)
                times.append(time.thread_time() - start)
            points.append((rows, kept, float(np.median(times))))
    table = np.array(points)
    inputs = np.stack([np.ones(len(table)), table[:, 0], table[:, 0] * table[:, 1]], axis=1)
    weights = 1.0 / table[:, 2]  # relative errors
    fit, *_ = np.linalg.lstsq(inputs * weights[:, None], table[:, 2] * weights, rcond=None)
    worst = float(np.abs(inputs @ fit * weights - 1.0).max())
    names = ("seconds", "per_row", "per_token")
    model = {"origin": MODELS["built-in"]["origin"]}
    model |= {name: float(f"{value:.4g}") for name, value in zip(names, fit, strict=True)}
    model |= {"worst_relative_error": round(worst, 3), "points": points}
    print(json.dumps(model))
    return {"models": {"built-in": model}}


def store(args: argparse.Namespace) -> dict[str, Any]:
    """The part that needs no scorers."""
    from benchmarks.scale_store import large_store

    return {"store": large_store(args.folder, args.samples, args.images)}


def load() -> dict[str, Any]:
    """What earlier runs have recorded."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("calibrate", "scorers", "store"))
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--processes", type=int, default=None, help="one per scorer by default")
    parser.add_argument("--models", nargs="+", default=["built-in", "7B"])
    parser.add_argument("--passes", type=int, default=48, help="per actor")
    parser.add_argument("--folder", type=Path, default=None, help="keep the store here")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=2_500)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args(argv)
    parts = {"calibrate": calibrate, "scorers": scorers, "store": store}
    found = parts[args.part](args)
    machine = {
        "cores": os.cpu_count(),
        "load_average": [round(part, 1) for part in os.getloadavg()],
        "python": platform.python_version(),
    }
    if not args.no_record:
        table = load() | found
        table["machine"] = {**table.get("machine", {}), args.part: machine}
        replace(RESULTS, json.dumps(table, indent=1) + "\n")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
