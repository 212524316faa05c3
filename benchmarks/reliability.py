"""Cost of each kind of fault: seconds to recovery, steps lost, scores computed twice.

    python -m benchmarks.reliability [KIND ...]

Prints a table and writes ``benchmarks/results/reliability.json``; kinds that were not asked for
keep their old rows. The faults are those of the tests marked ``chaos``, with their scorers, which
note every row they begin and end. Times hold for the machine and its load, and are upper bounds
on a busy one. ``partition`` needs root and network namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.faults_of_runs import disk, env_runner, object_store, restarted, trial
from benchmarks.faults_of_scorers import Row, partition, scorer_node, scorers

RESULTS = Path(__file__).parent / "results" / "reliability.json"

KINDS: dict[str, Callable[[Path], Row]] = {
    "scorer": lambda folder: scorers(folder, "scorer process killed, 1 of 2", 1),
    "all_scorers": lambda folder: scorers(folder, "all scorer processes killed", 2),
    "scorer_node": scorer_node,
    "partition": partition,
    "slow": lambda folder: scorers(folder, "scorer 5 s late", late=5.0),
    "poison": lambda folder: scorers(folder, "row that always kills its scorer", poison=7),
    "env_runner": env_runner,
    "trial": trial,
    "driver": lambda folder: restarted(folder, "driver killed, started again", False),
    "head": lambda folder: restarted(folder, "head and driver killed, new head", True),
    "object_store": object_store,
    "disk": disk,
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""

    def cell(value: Any) -> str:
        return "-" if value is None else str(value)

    titles = ("fault", "goes on after, s", "all back after, s", "steps lost")
    titles += ("scores computed again", "scores lost", "how it ends")
    lines = ["| " + " | ".join(titles) + " |", "| --- |" + " ---: |" * 5 + " --- |"]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row.values())) + " |" for row in rows)])


def alone(kind: str, attempts: int = 4) -> dict[str, Any]:
    """One kind in a process of its own; again if Ray, not the fault, ran out of its 30 s."""
    words = [sys.executable, "-m", "benchmarks.reliability", "--here", kind]
    for _ in range(attempts):
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        if "timed out during startup" not in done.stderr + done.stdout:
            break
        print(f"{kind}: Ray did not start in time, again", flush=True)
    raise RuntimeError(f"{kind} failed: {done.stderr[-3000:]}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--here", action="store_true", help="one kind, in this process")
    args = parser.parse_args(argv)
    unknown = set(args.kinds) - set(KINDS)
    if unknown:
        parser.error(f"unknown kinds {sorted(unknown)}; known: {', '.join(KINDS)}")
    if args.here:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asdict(KINDS[args.kinds[0]](Path(folder)))))
        return 0
    found = json.loads(RESULTS.read_text())["rows"] if RESULTS.is_file() else {}
    for kind in args.kinds:
        row = alone(kind)
        row_load = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
        found[kind] = {"row": row, "machine": {**row_load, "python": platform.python_version()}}
        print(json.dumps(row), flush=True)
        ordered = {name: found[name] for name in KINDS if name in found}
        draft = RESULTS.with_suffix(".writing")
        draft.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")
        draft.replace(RESULTS)
    print(table([entry["row"] for entry in ordered.values()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
