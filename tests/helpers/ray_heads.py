"""Real Ray processes for the tests: a head with its own home, ports and folder; ended by pid."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray  # noqa: F401  it brings psutil along

import psutil  # isort: skip

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def clean_environment(home: Path, **more: str) -> dict[str, str]:
    """What a fresh shell of another user would have: no Ray variables, its own home."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TPRL_"))}
    path = os.pathsep.join([str(BIN), kept.get("PATH", "")])
    return {
        **kept, "HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", **more,
    }  # fmt: skip


@dataclass
class RayNode:
    """``ray start --block`` in a process of its own, and all it has started."""

    words: Sequence[str]
    environment: dict[str, str]
    prefix: Sequence[str] = ()
    process: subprocess.Popen | None = None
    children: set[int] = field(default_factory=set)

    def start(self, log: Path) -> None:
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*self.prefix, str(BIN / "ray"), "start", *self.words, "--block"],
                env=self.environment, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True, cwd=self.environment["HOME"],
            )  # fmt: skip

    def wait_for(self, log: Path, text: str, seconds: float = 120.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)

    def stop(self) -> None:
        """End exactly the processes that this node has started."""
        if self.process is None:
            return
        try:
            tree = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            tree = []
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        _, alive = psutil.wait_procs(tree, timeout=10)
        for each in alive:
            each.kill()
        psutil.wait_procs(alive, timeout=10)


@dataclass
class Head:
    """A running head with token authentication."""

    node: RayNode
    home: Path
    address: str
    gcs: str
    token: str

    def environment(self, **more: str) -> dict[str, str]:
        """A shell of the head's user."""
        return clean_environment(self.home, RAY_AUTH_MODE="token", **more)


def start_head(
    home: Path, cpus: int = 2, ip: str = "127.0.0.1", prefix: Sequence[str] = ()
) -> Head:
    """Start a head whose token file ``tprl token`` has made."""
    home.mkdir(parents=True, exist_ok=True)
    environment = clean_environment(home, RAY_AUTH_MODE="token")
    subprocess.run([str(BIN / "tprl"), "token"], env=environment, check=True, cwd=home)
    port, dashboard = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="tprl-head-", dir="/tmp")  # sockets need a short path
    words = [
        "--head", f"--node-ip-address={ip}", f"--port={port}", f"--num-cpus={cpus}",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={folder}",
        f"--dashboard-agent-listen-port={free_port()}",
        f"--ray-client-server-port={free_port()}",
        "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    node = RayNode(words, environment, prefix)
    log = home / "head.log"
    node.start(log)
    try:
        node.wait_for(log, "Ray runtime started")
    except AssertionError:
        node.stop()
        raise
    token = (home / ".ray" / "auth_token").read_text()
    return Head(node, home, f"http://127.0.0.1:{dashboard}", f"{ip}:{port}", token)


def stop_node(node: RayNode) -> None:
    """End a node and remove its folder."""
    node.stop()
    for word in node.words:
        if word.startswith("--temp-dir="):
            shutil.rmtree(word.partition("=")[2], ignore_errors=True)
