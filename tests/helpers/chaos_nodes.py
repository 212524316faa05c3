"""Run as a script: scores while one of two nodes is lost; prints JSON.

chaos_nodes.py LOG                kills one of two scorer nodes of a cluster of its own
chaos_nodes.py LOG ADDRESS IP     joins a cluster, says when somebody else may cut a node off
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray
from chaos_scorers import in_a_pass, rows
from ray.cluster_utils import Cluster

from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import ToyScorer
from tprl_env.scoring.pool import ScorerPool
from tprl_env.scoring.spec import ScorerSpec

SOURCE = "toy:samples=32,tokens=20,seed=3"
DEADLINE = 200.0


def node_of(pool: ScorerPool, number: int) -> str | None:
    """Node id of one scorer actor, None while it is not alive."""
    for actor in ray._private.state.actors().values():
        if actor["Name"] == pool.address.names[number] and actor["State"] == "ALIVE":
            return str(actor["Address"]["NodeID"])
    return None


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def score_while(lose: Callable[[list[str | None]], str], log: Path, **resources: float) -> dict:
    """Ask for scores, call ``lose`` (returns the lost node) in the middle of both scorers' passes.

    Args:
        lose: Gets the node of each scorer.
        log: Folder of the traces.
        resources: Custom resources of each scorer.
    """
    options = {"log": str(log), "seconds": 0.5}
    spec = ScorerSpec(
        SOURCE, kind="import", factory="chaos_scorers:traced", options=options, batch_size=8
    )
    pool = ScorerPool.start(spec, 2, num_cpus=0.5, resources=resources)
    generator = np.random.default_rng(0)
    samples, keep = generator.integers(0, 32, 64), generator.random((64, 20)) < 0.5
    pids, before = pool.pids(), [node_of(pool, number) for number in range(2)]
    assert len(set(before)) == 2, "the scorers are not spread"
    pending = pool.submit(samples, keep)
    until(lambda: all(in_a_pass(log, pid) for pid in pids))
    waiting = not pending.done
    victim = lose(before)
    start = time.monotonic()
    scores = pending.result()
    seconds = time.monotonic() - start

    def nodes() -> set[str | None]:
        return {node_of(pool, number) for number in range(2)}

    until(lambda: not {None, victim} & nodes())  # Ray may notice later
    started, ended = rows(log, "started"), rows(log, "ended")
    right = ToyScorer(open_source(SOURCE))(samples, keep)
    report = {
        "waiting": waiting,
        "right": bool((scores == right).all()),
        "pids changed": pool.pids() != pids,
        "distinct": len(set(ended)),
        "repeated": len(started) - len(set(ended)),
        "counters": pool.counters(),
        "seconds": seconds,
        "until all are back": time.monotonic() - start,
    }
    pool.close()
    return report


def kill_a_node(log: Path) -> dict:
    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    nodes = [cluster.add_node(num_cpus=2, resources={"scorer": 2}, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes(60)

    def lose(places: list[str | None]) -> str:
        victim = next(node for node in nodes if node.node_id == places[0])
        cluster.remove_node(victim, allow_graceful=False)
        return victim.node_id

    report = score_while(lose, log, scorer=1)
    ray.shutdown()
    cluster.shutdown()
    return report


def join(log: Path, address: str, ip: str) -> dict:
    ray.init(address=address, _node_ip_address=ip, log_to_driver=False)
    here = ray.get_runtime_context().get_node_id()

    def lose(places: list[str | None]) -> str:
        print("CUT NOW", flush=True)
        sys.stdin.readline()  # it is done
        return next(place for place in places if place != here)

    return score_while(lose, log)


if __name__ == "__main__":
    folder, *cluster = sys.argv[1:]
    found = join(Path(folder), *cluster) if cluster else kill_a_node(Path(folder))
    print(json.dumps(found))
