"""Faults of whole training runs, each timed once: see `benchmarks.reliability`."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults_of_scorers import (
    DEADLINE,
    ROOT,
    TESTS,
    Row,
    local_ray,
    until,
)
from tprl_env.files import JsonLog

EPISODES = 256  # of an iteration of the smoke preset; one score and one step each


def config(log: Path, **changes: Any) -> Any:
    from tprl_env.rllib.config import load_config

    options = {"log": str(log), "seconds": 0.25}
    return load_config(
        "smoke",
        {
            "algorithm": "grpo",
            "resources.num_scorers": 1,
            "limits.checkpoint_every": 1,
            "scoring.scorer": "import",
            "scoring.factory": "chaos_scorers:traced",
            "scoring.options": options,
            **changes,
        },
    )


def history(out: Path) -> list[dict[str, Any]]:
    return JsonLog(out / "metrics.jsonl").read()


def env_runner(folder: Path) -> Row:
    import ray

    from tprl_env.rllib.run.train import train

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
        run = config(folder, **{"resources.num_env_runners": 2, "limits.iterations": 16})
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
    from tprl_env.rllib.run.train import train

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

    run, out = config(folder, **{"limits.iterations": 4}), folder / "run"
    bundles = tune.PlacementGroupFactory([{"CPU": 1.0}, {"CPU": run.resources.scorer_cpus}])
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
from tprl_env.rllib.run.train import train
import json
config = TrainConfig.from_dict(json.loads(sys.argv[1]))
train(config, sys.argv[2], resume="auto", progress=False, iterations=int(sys.argv[3]))
"""


def restarted(folder: Path, fault: str, kill_head: bool) -> Row:
    """Kill the driver alone or with its head, start what is missing and the same command again."""
    from ray_heads import psutil, start_head, stop_node

    from tprl_env.rllib.run.folder import RunFolder

    out = folder / "run"
    # the head's workers do not see the tests' folder
    run = config(folder, **{"scoring.scorer": "toy"})
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

    from tprl_env.rllib.run.train import train

    times: list[float] = []
    pinned = []

    def hook(row: dict[str, Any], policy: Any) -> None:
        times.append(row["iteration_seconds"])
        if row["iteration"] == 4:
            pinned.extend(ray.put(np.zeros(10 << 20, np.uint8)) for _ in range(16))

    with local_ray():
        run = config(folder, **{"resources.num_env_runners": 1, "limits.iterations": 8})
        result = train(run, folder / "run", progress=False, on_iteration=hook)
    assert result.progress.scores == 8 * EPISODES
    before, after = np.median(times[1:4]), np.median(times[4:])
    note = f"spilled to disk; an iteration takes {after:.1f} s, before {before:.1f} s"
    return Row("object store full twice over", note=note)


def disk(folder: Path) -> Row:
    from tprl_env.policy.network import PruningPolicy
    from tprl_env.rllib.run.folder import RunFolder
    from tprl_env.rllib.run.train import train

    out, save = folder / "run", PruningPolicy.save_pretrained

    def full(self: Any, path: Any) -> None:
        if "writing" in str(path) and len(RunFolder(out).checkpoints()) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path)

    run = config(folder, **{"resources.num_scorers": 0, "limits.iterations": 4})
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
