"""Nodes lost on purpose: a scorer node, the head, a node that is cut off from the others."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray  # noqa: F401  it brings psutil along

import psutil  # isort: skip

from ray_heads import ROOT, Head, RayNode, clean_environment, free_port, start_head, stop_node
from two_hosts import two_hosts  # noqa: F401  a fixture

from tprl_env.rllib.run.folder import RunFolder

pytestmark = pytest.mark.chaos

HELPERS = Path(__file__).parents[1] / "helpers"
DEADLINE = 200.0


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def test_a_lost_scorer_node_changes_no_score(tmp_path: Path, log: Path):
    environment = clean_environment(
        tmp_path, RAY_AUTH_MODE="disabled", PYTHONPATH=f"{ROOT}:{HELPERS}"
    )
    done = subprocess.run(
        [sys.executable, str(HELPERS / "chaos_nodes.py"), str(log)],
        env=environment, capture_output=True, text=True, timeout=280, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    check_report(found)


def check_report(found: dict) -> None:
    assert found["waiting"] and found["right"] and found["pids changed"]
    counters = found["counters"]
    assert counters["scores"] == counters["computed"] == found["distinct"] == 64
    assert counters["retries"] >= 1 and found["repeated"] <= 32  # what the lost scorer had


def join(worker: RayNode, log: Path) -> None:
    """Start a node; Ray gives up after 30 s, which a busy machine may need."""
    for attempt in range(4):
        worker.start(log)
        try:
            worker.wait_for(log, "Ray runtime started")
            return
        except AssertionError:
            worker.stop()
            if attempt == 3:
                raise


@pytest.mark.netns
@pytest.mark.timeout(900)
def test_a_node_that_is_cut_off_changes_no_score(two_hosts, tmp_path: Path, log: Path):
    (first, first_ip), (second, second_ip) = two_hosts.items()
    inside = {name: ("ip", "netns", "exec", name) for name in two_hosts}
    head = start_head(tmp_path / "home", cpus=2, ip=first_ip, prefix=inside[first])
    environment = head.environment(PYTHONPATH=f"{ROOT}:{HELPERS}")
    words = [
        f"--address={head.gcs}", f"--node-ip-address={second_ip}", "--num-cpus=2",
        "--object-store-memory=100000000", f"--dashboard-agent-listen-port={free_port()}",
        "--disable-usage-stats",
    ]  # fmt: skip
    worker = RayNode(words, environment, inside[second])
    driver = None
    try:
        join(worker, tmp_path / "worker.log")
        driver = subprocess.Popen(
            [
                *inside[first], sys.executable, str(HELPERS / "chaos_nodes.py"), str(log), head.gcs,
                first_ip,
            ],
            env=environment, cwd=tmp_path, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=(tmp_path / "driver.log").open("w"),
        )  # fmt: skip
        said = next((line for line in driver.stdout if "CUT NOW" in line), "")
        assert said, (tmp_path / "driver.log").read_text()
        down = [*inside[second], "ip", "link", "set", f"{second}v", "down"]
        subprocess.run(down, check=True)
        output, _ = driver.communicate("done\n", timeout=280)
        assert driver.returncode == 0, (tmp_path / "driver.log").read_text()
        found = json.loads(output.splitlines()[-1])
        print("CUT", json.dumps(found))  # benchmarks/reliability.py reads it
        check_report(found)
    finally:
        if driver is not None:
            driver.kill()
        worker.stop()
        stop_node(head.node)


DRIVER = """
import sys
from tprl_env.rllib.config import load_config
from tprl_env.rllib.run.train import train
changes = {"limits.checkpoint_every": 1, "resources.num_scorers": 1, "algorithm": "grpo"}
iterations = int(sys.argv[2])
result = train(
    load_config("smoke", changes), sys.argv[1], resume="auto", progress=False, iterations=iterations
)
print(result.progress.iteration, result.progress.scores)
"""


def start_driver(head: Head, out: Path, iterations: int) -> subprocess.Popen:
    more = {"RAY_gcs_rpc_server_reconnect_timeout_s": "5", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(out), str(iterations)],
        env=head.environment(RAY_ADDRESS=head.gcs, **more), cwd=head.home,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def kill_head(head: Head) -> None:
    """The machine of the head is gone: everything on it dies at once."""
    tree = psutil.Process(head.node.process.pid).children(recursive=True)
    for each in [head.node.process, *tree]:
        each.send_signal(signal.SIGKILL)
    head.node.process.wait(30)


def test_a_new_head_goes_on_with_the_same_storage(tmp_path: Path):
    out = tmp_path / "run"
    head = start_head(tmp_path / "first", cpus=3)
    driver = start_driver(head, out, 10_000)
    try:
        deadline = time.monotonic() + DEADLINE
        while len(RunFolder(out).checkpoints()) < 2:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        kill_head(head)
        driver.wait(DEADLINE)  # it ends by itself, and not well
        assert driver.returncode != 0
    finally:
        driver.kill()
        stop_node(head.node)
    _, saved = RunFolder(out).newest()
    goal = saved.iteration + 2
    head = start_head(tmp_path / "second", cpus=3)
    try:
        driver = start_driver(head, out, goal)
        output, errors = driver.communicate(timeout=DEADLINE)
    finally:
        driver.kill()
        stop_node(head.node)
    assert driver.returncode == 0, errors
    assert output.splitlines()[-1] == f"{goal} {256 * goal}"
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["scores"] for row in history] == [256 * n for n in range(1, goal + 1)]
