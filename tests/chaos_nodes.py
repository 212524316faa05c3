"""Run as a script: kills one of two scorer nodes in the middle of a pass; prints JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import ray
from chaos_scorers import in_a_pass, rows
from ray.cluster_utils import Cluster

from tprl_env.features import open_source
from tprl_env.rllib.scorer_pool import ScorerPool
from tprl_env.rllib.scorer_spec import ScorerSpec
from tprl_env.toy import ToyScorer

SOURCE = "toy:samples=32,tokens=20,seed=3"
DEADLINE = 200.0


def node_of(pool: ScorerPool, number: int) -> str | None:
    """Node id of one scorer actor, None while it is not alive."""
    for actor in ray._private.state.actors().values():
        if actor["Name"] == pool.address.names[number] and actor["State"] == "ALIVE":
            return str(actor["Address"]["NodeID"])
    return None


def main(out: str) -> None:
    log = Path(out)
    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
    nodes = [cluster.add_node(num_cpus=2, resources={"scorer": 2}, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes(60)
    options = {"log": out, "seconds": 0.5}
    spec = ScorerSpec(
        SOURCE, kind="import", factory="chaos_scorers:traced", options=options, batch_size=8
    )
    pool = ScorerPool.start(spec, 2, num_cpus=0.5, resources={"scorer": 1})
    generator = np.random.default_rng(0)
    samples, keep = generator.integers(0, 32, 64), generator.random((64, 20)) < 0.5
    pids, before = pool.pids(), [node_of(pool, number) for number in range(2)]
    pending = pool.submit(samples, keep)
    deadline = time.monotonic() + DEADLINE
    while not all(in_a_pass(log, pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting = not pending.done
    victim = next(node for node in nodes if node.node_id == before[0])
    cluster.remove_node(victim, allow_graceful=False)
    start = time.monotonic()
    scores = pending.result()
    seconds = time.monotonic() - start
    after = [node_of(pool, number) for number in range(2)]
    while {None, before[0]} & set(after) and time.monotonic() < deadline:  # Ray notices later
        time.sleep(0.1)
        after = [node_of(pool, number) for number in range(2)]
    started, ended = rows(log, "started"), rows(log, "ended")
    report = {
        "waiting": waiting,
        "right": bool((scores == ToyScorer(open_source(SOURCE))(samples, keep)).all()),
        "before": before,
        "after": after,
        "victim": before[0],
        "pids changed": pool.pids()[0] != pids[0],
        "distinct": len(set(ended)),
        "passes repeated": len(started) - len(set(ended)),
        "counters": pool.counters(),
        "seconds": seconds,
    }
    print(json.dumps(report))
    pool.close()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
