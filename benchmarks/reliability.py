"""What each kind of fault costs: seconds until work goes on, steps lost, scores computed twice.

    python -m benchmarks.reliability [KIND ...]

Prints a table and writes ``benchmarks/results/reliability.json``; kinds that were not asked for
keep their old rows. The faults are those of the tests marked ``chaos``, with their scorers, which
note every row they begin and end. Times hold for the machine and its load, and are upper bounds
on a busy one. ``partition`` needs root and network namespaces.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))  # the faults live there

RESULTS = Path(__file__).parent / "results" / "reliability.json"
SOURCE = "toy:samples=32,tokens=20,seed=3"
EPISODES = 256  # of an iteration of the smoke preset; one score and one step each
DEADLINE = 300.0


@dataclass
class Row:
    """One line of the table.

    Attributes:
        fault: what was done.
        goes_on: seconds until the caller had its scores, or training its next iteration.
        whole: seconds until everything that was lost is back.
        steps: environment steps whose work was thrown away, at most: an iteration under way counts
            as whole.
        repeated: rows that a scorer began more than once; None where it was not counted.
        lost: scores that were asked for and never delivered.
        note: how it ended.
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


# Scorers -------------------------------------------------------------------------------------


def scorers(folder: Path, fault: str, victims: int = 0, **options: Any) -> Row:
    """96 distinct rows through two scorers of half a second per pass of eight."""
    from chaos_scorers import in_a_pass

    from tprl_env.features import open_source
    from tprl_env.rllib.scorer_pool import ScorerPool
    from tprl_env.rllib.scorer_spec import ScorerSpec
    from tprl_env.scoring import ScoringError
    from tprl_env.toy import ToyScorer

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
        [*words, str(TESTS / "test_chaos_nodes.py")], cwd=ROOT, capture_output=True, text=True
    )
    found = re.search(r"^CUT (\{.*\})$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-2000:]
    return node_row("scorer node cut off", json.loads(found[1]))


# Training ------------------------------------------------------------------------------------


def config(log: Path, **changes: Any) -> Any:
    from tprl_env.rllib.config import load_config

    options = {"log": str(log), "seconds": 0.25}
    return load_config(
        "smoke",
        {
            "algorithm": "grpo", "num_scorers": 1, "checkpoint_every": 1, "scorer": "import",
            "scorer_factory": "chaos_scorers:traced", "scorer_options": options, **changes,
        },
    )  # fmt: skip


def history(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def env_runner(folder: Path) -> Row:
    import ray

    from tprl_env.rllib.train import train

    times: dict[str, float] = {}
    victim: list[int] = []

    def pids() -> list[int]:
        actors = ray._private.state.actors().values()
        alive = [actor for actor in actors if actor["State"] == "ALIVE"]
        return [a["Pid"] for a in alive if "TokenPruningRunner" in a["ActorClassName"]]

    def kill() -> None:
        os.kill(victim[0], signal.SIGKILL)
        times["killed"] = time.monotonic()

    def hook(row: dict[str, Any], policy: Any) -> None:
        if row["iteration"] == 2:
            victim.append(pids()[0])
            threading.Timer(0.3, kill).start()
        if "killed" in times:
            times.setdefault("next", time.monotonic())
            if row["runners"] == 2 and victim[0] not in pids():
                times.setdefault("whole", time.monotonic())

    with local_ray():
        run = config(folder, num_env_runners=2, iterations=16)
        result = train(run, folder / "run", progress=False, on_iteration=hook)
    assert result.progress.scores == result.progress.env_steps == result.progress.episodes
    return Row(
        "env runner killed",
        round(times["next"] - times["killed"], 1),
        round(times["whole"] - times["killed"], 1) if "whole" in times else None,
        steps=EPISODES // 2,  # what it had rolled out; the other runner fills the batch
        note="whole groups in every batch; nothing of the dead runner is counted",
    )


def crash_once(setting: dict[str, Any]) -> None:
    """A Tune trial that dies after its third iteration, before the checkpoint of it."""
    from ray import tune

    from tprl_env.rllib.config import TrainConfig
    from tprl_env.rllib.train import train

    out = Path(setting["out"])

    def hook(row: dict[str, Any], policy: Any) -> None:
        tune.report({"iteration": row["iteration"]})
        if (out / "crashed").exists():
            (out / "next").touch(exist_ok=True)
        elif row["iteration"] == 3:
            (out / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (out / "next").exists():
            os.utime(out / "next", (0, os.stat(out / "next").st_mtime))

    run = TrainConfig.from_dict(setting["train"])
    train(run, out, resume="auto", progress=False, on_iteration=hook)


def trial(folder: Path) -> Row:
    from ray import tune

    run, out = config(folder, iterations=4), folder / "run"
    bundles = tune.PlacementGroupFactory([{"CPU": 1.0}, {"CPU": run.scorer_cpus}])
    with local_ray():
        results = tune.Tuner(
            tune.with_resources(crash_once, bundles),
            param_space={"train": run.as_dict(), "out": str(out)},
            run_config=tune.RunConfig(
                storage_path=str(folder / "tune"),
                failure_config=tune.FailureConfig(max_failures=1),
                verbose=0,
            ),
        ).fit()
    assert not results.errors
    assert [row["scores"] for row in history(out)] == [EPISODES * n for n in range(1, 5)]
    goes_on = os.stat(out / "next").st_mtime - os.stat(out / "crashed").st_mtime
    note = "Tune starts the trial again, from its newest checkpoint"
    return Row("learner (Tune trial) killed", round(goes_on, 1), steps=EPISODES, note=note)


DRIVER = """
import sys
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.train import train
import json
config = TrainConfig.from_dict(json.loads(sys.argv[1]))
train(config, sys.argv[2], resume="auto", progress=False, iterations=int(sys.argv[3]))
"""


def restarted(folder: Path, fault: str, kill_head: bool) -> Row:
    """Kill the driver alone or with its head, start what is missing and the same command again."""
    from ray_heads import psutil, start_head, stop_node

    from tprl_env.rllib.run_folder import RunFolder

    out = folder / "run"
    run = config(folder, scorer="toy")  # the head's workers do not see the tests' folder
    words = [sys.executable, "-c", DRIVER, json.dumps(run.as_dict()), str(out)]
    head = start_head(folder / "first", cpus=3)
    try:

        def start(iterations: int) -> subprocess.Popen:
            more = {"RAY_ADDRESS": head.gcs, "PYTHONPATH": f"{ROOT}:{TESTS}"}
            command = [*words, str(iterations)]
            return subprocess.Popen(command, env=head.environment(**more), cwd=head.home)

        driver = start(10_000)
        until(lambda: driver.poll() is not None or len(RunFolder(out).checkpoints()) >= 3)
        assert driver.poll() is None, "the driver ended by itself"
        if kill_head:
            tree = psutil.Process(head.node.process.pid).children(recursive=True)
            for each in [head.node.process, *tree]:
                each.send_signal(signal.SIGKILL)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        killed = time.monotonic()
        _, saved = RunFolder(out).newest()
        undone = history(out)[-1]["iteration"] - saved.iteration
        if kill_head:
            stop_node(head.node)
            head = start_head(folder / "second", cpus=3)
        driver = start(saved.iteration + 2)
        target = saved.iteration + 1
        until(lambda: driver.poll() is not None or history(out)[-1]["iteration"] >= target)
        goes_on = time.monotonic() - killed
        assert driver.wait(DEADLINE) == 0
    finally:
        stop_node(head.node)
    counted = [row["scores"] for row in history(out)]
    assert counted == [EPISODES * n for n in range(1, saved.iteration + 3)]
    note = "the same command again; includes the start of its processes"
    # an iteration under way, and those after the newest checkpoint
    return Row(fault, round(goes_on, 1), steps=EPISODES * (undone + 1), note=note)


def object_store(folder: Path) -> Row:
    import ray

    from tprl_env.rllib.train import train

    times: list[float] = []
    pinned = []

    def hook(row: dict[str, Any], policy: Any) -> None:
        times.append(row["iteration_seconds"])
        if row["iteration"] == 4:
            pinned.extend(ray.put(np.zeros(10 << 20, np.uint8)) for _ in range(16))

    with local_ray():
        run = config(folder, num_env_runners=1, iterations=8)
        result = train(run, folder / "run", progress=False, on_iteration=hook)
    assert result.progress.scores == 8 * EPISODES
    before, after = np.median(times[1:4]), np.median(times[4:])
    note = f"spilled to disk; an iteration takes {after:.1f} s, before {before:.1f} s"
    return Row("object store full twice over", note=note)


def disk(folder: Path) -> Row:
    from tprl_env.policy import PruningPolicy
    from tprl_env.rllib.run_folder import RunFolder
    from tprl_env.rllib.train import train

    out, save = folder / "run", PruningPolicy.save_pretrained

    def full(self: Any, path: Any) -> None:
        if "writing" in str(path) and len(RunFolder(out).checkpoints()) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path)

    run = config(folder, num_scorers=0, iterations=4)
    with local_ray():
        PruningPolicy.save_pretrained = full
        try:
            train(run, out, progress=False)
        except OSError as error:
            note = f"stops with {os.strerror(error.errno or 0)!r}; the same command goes on"
        finally:
            PruningPolicy.save_pretrained = save
        _, saved = RunFolder(out).newest()
        undone = history(out)[-1]["iteration"] - saved.iteration
        start = time.monotonic()
        train(run, out, resume="auto", progress=False)
    goes_on = round(time.monotonic() - start, 1)
    return Row("disk full at a checkpoint", goes_on, steps=EPISODES * undone, note=note)


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
