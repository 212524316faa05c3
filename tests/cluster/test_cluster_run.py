"""Training over several nodes: who runs where, what does not fit is said, configs stay small."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")

import ray
from ray_heads import (
    BIN,
    ROOT,
    RayNode,
    clean_environment,
    free_port,
    start_head,
    stop_node,
)
from two_hosts import two_hosts  # noqa: F401  a fixture

from tprl_env.data.features.store import open_source
from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.config import load_config, scorer_spec
from tprl_env.rllib.run.placement import actor_bundles
from tprl_env.scoring.routing import ActorState, Limits, Request, Router
from tprl_env.scoring.spec import PoolAddress

HELPERS = Path(__file__).parents[1] / "helpers"


def test_configs_hold_names_and_never_tensors(tmp_path: Path):
    config = load_config("smoke", {"resources.num_env_runners": 8, "resources.num_scorers": 64})
    names = tuple(f"tprl-scorer-0123abcd-{number}" for number in range(64))
    pool = PoolAddress(names, "default", vars(scorer_spec(config)), {})
    settings = algorithm_config(config, pool=pool, init_policy=str(tmp_path))
    size = len(ray.cloudpickle.dumps(settings))
    assert size < 100_000, size
    assert len(ray.cloudpickle.dumps(scorer_spec(config))) < 2_000


def test_every_actor_asks_for_something():
    config = load_config("smoke", {"resources.num_env_runners": 4, "resources.num_learners": 2})
    settings = algorithm_config(config)
    assert actor_bundles(settings) == {
        "env runners": [{"CPU": 1.0}] * 4,
        "learners": [{"CPU": 1.0}] * 2,
    }
    settings.learners(num_gpus_per_learner=0.5)
    assert actor_bundles(settings)["learners"] == [{"GPU": 0.5}] * 2
    settings.env_runners(num_cpus_per_env_runner=0)
    with pytest.raises(ValueError, match="env runners must ask for at least one resource"):
        actor_bundles(settings)


def test_a_sample_has_the_same_scorer_in_every_client_and_request():
    source = open_source("toy:samples=64,tokens=16,seed=0")
    homes: dict[int, set[int]] = {}
    for seed in range(6):  # clients of equal load, requests in any order
        actors = [ActorState(str(number), None) for number in range(4)]
        router = Router(actors, source, 128, Limits())
        generator = np.random.default_rng(seed)
        samples = np.repeat(generator.permutation(64), 8)  # groups of eight draws
        keep = np.zeros((len(samples), 16), bool)
        for chunk in router._cut(Request(samples, keep, np.packbits(keep, axis=1))):
            for sample in chunk.samples:
                homes.setdefault(int(sample), set()).add(chunk.preferred)
    assert len(homes) == 64 and all(len(places) == 1 for places in homes.values())
    assert {next(iter(places)) for places in homes.values()} == {0, 1, 2, 3}


@pytest.fixture(scope="module")
def three_nodes(tmp_path_factory) -> dict:
    home = tmp_path_factory.mktemp("home")
    environment = clean_environment(home, RAY_AUTH_MODE="token", PYTHONPATH=str(ROOT))
    subprocess.run([str(BIN / "tprl"), "token"], env=environment, check=True, cwd=home)
    done = subprocess.run(
        [sys.executable, str(HELPERS / "three_nodes.py"), str(home)],
        env=environment, capture_output=True, text=True, timeout=280, cwd=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_scorers_and_runners_run_on_their_own_nodes(three_nodes: dict):
    places = three_nodes["places"]
    assert places["ScorerActor"] == [three_nodes["scorers"]] * 2
    assert places["TokenPruningRunner"] == [three_nodes["runners"]] * 2
    assert all(three_nodes["head"] not in where for where in places.values())
    assert three_nodes["scores"] == 3 * 256 and three_nodes["answered"] == 2


@pytest.mark.slow
def test_what_does_not_fit_ends_with_requested_against_available(three_nodes: dict):
    runners = three_nodes["too many runners"]
    assert runners.startswith(
        "PlacementError: the cluster had no room for 4 env runners within 3 s"
    )
    assert "CPU: 4 requested, 4 in the cluster, 2 free" in runners  # the scorers hold two
    scorers = three_nodes["too many scorers"]
    assert "2 of 3 scorer actors were ready" in scorers
    assert "scorer: 3 requested, 2 in the cluster, 0 free" in scorers
    learner = three_nodes["no gpu"]
    assert "2 env runners and 1 learners" in learner
    assert "GPU: 1 requested, 0 in the cluster, 0 free" in learner


# Slurm with one stand-in: srun ---------------------------------------------------------------

SRUN = """#!/usr/bin/env bash
# srun between two network namespaces; bash is the first process of each and buries the dead
while [[ $1 == --* ]]; do [[ $1 == --ntasks=* ]] && tasks=${1#--ntasks=}; shift; done
if [[ $1 == hostname ]]; then echo "$FIRST_IP"; exit; fi
start='mount -t tmpfs none "$STATE_DIR" && mount -t tmpfs none /dev/shm && "$@"; exit $?'
hosts=("$FIRST" "$SECOND")
for ((task = 0; task < tasks; task++)); do
  ip netns exec "${hosts[task]}" unshare --pid --fork --kill-child --mount-proc \\
    bash -c "$start" task "$@" &
done
wait -n  # the first to end is the head; then, as with --wait=30, the others must
code=$?
for ((second = 0; second < 30; second++)); do [[ -z $(jobs -pr) ]] && break; sleep 1; done
for job in $(jobs -pr); do kill "$job"; done
exit "$code"
"""


@pytest.mark.netns
@pytest.mark.timeout(600)
def test_the_batch_script_trains_on_two_hosts(two_hosts, tmp_path: Path):
    """Real `ray symmetric-run`; its `ray stop` sees the processes of its own host only."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    (first, first_ip), (second, _) = two_hosts.items()
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/bash\necho node1\necho node2\n")):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    number = str(100_000 + os.getpid())
    folder = Path(f"/tmp/tprl-ray-{number}")
    folder.mkdir()
    environment = clean_environment(
        tmp_path, SLURM_JOB_ID=number, SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="node[1-2]",
        FIRST=first, SECOND=second, FIRST_IP=first_ip, STATE_DIR=str(folder),
        PYTHONPATH=str(ROOT),
    )  # fmt: skip
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    words = ["--limits.iterations", "2", "--resources.num_env_runners=1"]
    words += ["--resources.scorer_cpus=1", "--resources.num-scorers=2"]
    try:
        done = subprocess.run(
            ["bash", str(ROOT / "cluster/slurm/train.sbatch"), "smoke", f"{tmp_path}/run", *words],
            env=environment, capture_output=True, text=True, timeout=580, cwd=tmp_path,
        )  # fmt: skip
    finally:
        folder.rmdir()
    assert done.returncode == 0, done.stdout + done.stderr
    history = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["scores"] for line in history] == [256, 512]
    assert "On worker node. Connecting to Ray cluster" in done.stdout + done.stderr
    assert not (tmp_path / ".tprl-jobs" / number / "auth_token").exists()


SCRIPT = """
import json, sys
import ray
from tprl_env.rllib.config import load_config
from tprl_env.rllib.run.train import train
places = {}
def note(row, policy):
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE":
            name = actor["ActorClassName"].split(".")[-1]
            places.setdefault(name, set()).add(nodes[actor["Address"]["NodeID"]])
fields = {
    "limits.iterations": 3, "resources.num_env_runners": 1,
    "resources.scorer_resources": {"scorer": 1.0},
}
train(load_config("smoke", fields), sys.argv[1], progress=False, on_iteration=note)
print("PLACES", json.dumps({name: sorted(where) for name, where in places.items()}))
"""


@pytest.mark.netns
def test_two_hosts_with_token_authentication(two_hosts, tmp_path: Path):
    (first, first_ip), (second, second_ip) = two_hosts.items()
    inside = {name: ("ip", "netns", "exec", name) for name in two_hosts}
    head = start_head(tmp_path / "home", cpus=0, ip=first_ip, prefix=inside[first])
    workers = []
    try:

        def join(home: Path, **more: str) -> tuple[RayNode, Path]:
            words = [
                f"--address={head.gcs}", f"--node-ip-address={second_ip}", "--num-cpus=3",
                '--resources={"scorer": 2}', "--object-store-memory=100000000",
                f"--dashboard-agent-listen-port={free_port()}", "--disable-usage-stats",
                f"--temp-dir={tempfile.mkdtemp(prefix='tprl-node-', dir='/tmp')}",
            ]  # fmt: skip
            home.mkdir(exist_ok=True)
            environment = clean_environment(home, RAY_AUTH_MODE="token", **more)
            node = RayNode(words, environment, inside[second])
            workers.append(node)
            node.start(home / "worker.log")
            return node, home / "worker.log"

        stranger, log = join(tmp_path / "stranger", RAY_AUTH_TOKEN="ff" * 32)
        assert stranger.process.wait(120) != 0
        assert "InvalidAuthToken" in log.read_text() or "Authentication" in log.read_text()
        worker, log = join(head.home)
        worker.wait_for(log, "Ray runtime started")
        (tmp_path / "job").mkdir()
        (tmp_path / "job" / "two_hosts.py").write_text(SCRIPT)
        done = subprocess.run(
            [
                *inside[first], str(BIN / "tprl"), "submit", "--address", head.address, "--",
                "python", "two_hosts.py", str(tmp_path / "run"),
            ],
            env=head.environment(PYTHONPATH=str(ROOT)), cwd=tmp_path / "job",
            capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        line = next(line for line in done.stdout.splitlines() if line.startswith("PLACES "))
        places = json.loads(line.removeprefix("PLACES "))
        assert places["ScorerActor"] == places["TokenPruningRunner"] == [second_ip]
        assert places["JobSupervisor"] == [first_ip]
    finally:
        for node in workers:
            stop_node(node)
        stop_node(head.node)
