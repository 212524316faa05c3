"""Faults of scorers and their nodes, each timed once: see `benchmarks.reliability`."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "helpers"
sys.path.insert(0, str(TESTS))  # the faults live there

SOURCE = "toy:samples=32,tokens=20,seed=3"
DEADLINE = 300.0


@dataclass
class Row:
    """One line of the table.

    Attributes:
        fault: What was done.
        goes_on: Seconds until the caller had its scores, or training its next iteration.
        whole: Seconds until everything that was lost is back.
        steps: Environment steps whose work was thrown away, at most: an iteration under way counts
            as whole.
        repeated: Rows that a scorer began more than once; None where it was not counted.
        lost: Scores that were asked for and never delivered.
        note: How it ended.
    """

    fault: str
    goes_on: float | None = None
    whole: float | None = None
    steps: int = 0
    repeated: int | None = None
    lost: int = 0
    note: str = ""


def until(true: Callable[[], bool], step: float = 0.02) -> float:
    """Wait; returns the seconds it took."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < DEADLINE
        time.sleep(step)
    return time.monotonic() - start


@contextmanager
def local_ray() -> Iterator[None]:
    import ray

    ray.init(
        address="local",
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=80 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": f"{ROOT}:{TESTS}"}},
    )
    try:
        yield
    finally:
        ray.shutdown()


def repeated(log: Path) -> int:
    """Rows that were begun again."""
    from chaos_scorers import rows

    started = rows(log, "started")
    return len(started) - len(set(started))


def scorers(folder: Path, fault: str, victims: int = 0, **options: Any) -> Row:
    """96 distinct rows through two scorers of half a second per pass of eight."""
    from chaos_scorers import in_a_pass

    from tprl_env.data.features.store import open_source
    from tprl_env.data.features.toy import ToyScorer
    from tprl_env.env.scorer import ScoringError
    from tprl_env.scoring.pool import ScorerPool
    from tprl_env.scoring.spec import ScorerSpec

    options = {"log": str(folder), "seconds": 0.5, **options}
    factory = "chaos_scorers:traced"
    spec = ScorerSpec(SOURCE, kind="import", factory=factory, options=options, batch_size=8)
    rng = np.random.default_rng(0)
    samples, keep = rng.integers(0, 32, 96), rng.random((96, 20)) < 0.5
    with local_ray():
        pool = ScorerPool.start(spec, 2, num_cpus=0.5)
        pids = pool.pids()
        started = time.monotonic()
        pending = pool.submit(samples, keep)
        until(lambda: all(in_a_pass(folder, pid) for pid in pids))
        for pid in pids[:victims]:
            os.kill(pid, signal.SIGKILL)
        row, killed = Row(fault), time.monotonic()
        if "poison" in options:
            try:
                pending.result()
                raise RuntimeError("the poison was not met")
            except ScoringError as error:
                row.note = str(error).partition(": ")[2].partition(", the last")[0]
            row.lost = int(np.isnan(pending.request.scores).sum())
        else:
            without = 96 / 8 / 2 * 0.5  # seconds that the passes themselves take
            right = ToyScorer(open_source(SOURCE))(samples, keep)
            np.testing.assert_array_equal(pending.result(), right)
            row.note = "same scores as without the fault"
            since = started if "late" in options else killed
            row.goes_on = round(max(time.monotonic() - since - without, 0.0), 1)
        if victims:
            until(lambda: not set(pids[:victims]) & set(pool.pids()))
            row.whole = round(time.monotonic() - killed, 1)
        row.repeated = repeated(folder)
        pool.close()
    return row


def scorer_node(folder: Path) -> Row:
    from ray_heads import clean_environment

    more = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{TESTS}"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "chaos_nodes.py"), str(folder)],
        env=clean_environment(folder, **more), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    return node_row("scorer node killed", json.loads(done.stdout.splitlines()[-1]))


def node_row(fault: str, found: dict[str, Any]) -> Row:
    assert found["right"] and found["counters"]["scores"] == 64
    goes_on = max(found["seconds"] - 64 / 8 / 2 * 0.5, 0.0)
    whole, again = found["until all are back"], found["repeated"]
    note = "same scores as without the fault"
    return Row(fault, round(goes_on, 1), round(whole, 1), repeated=again, note=note)


def partition(folder: Path) -> Row:
    if os.geteuid() or shutil.which("ip") is None:
        return Row("scorer node cut off", note="not measured: needs root and network namespaces")
    words = [sys.executable, "-m", "pytest", "-q", "-s", "-m", "netns", "--timeout", "900"]
    done = subprocess.run(
        [*words, str(ROOT / "tests" / "scoring" / "test_chaos_nodes.py")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = re.search(r"^CUT (\{.*\})$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:]
    return node_row("scorer node cut off", json.loads(found[1]))
