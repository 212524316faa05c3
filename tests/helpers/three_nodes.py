"""Run as a script: trains on three nodes of one machine and prints who ran where, as JSON.

The head has no CPU, one node has the resource ``scorer`` and just enough CPUs for its scorers, the
other node has CPUs only.
"""

from __future__ import annotations

import json
import sys

import ray
from ray.cluster_utils import Cluster

from tprl_env.data.features.store import open_source
from tprl_env.env.scorer import ScoringError
from tprl_env.rllib.config import load_config, scorer_spec
from tprl_env.rllib.run.placement import PlacementError
from tprl_env.rllib.run.train import train
from tprl_env.scoring.pool import ScorerPool

FIELDS = {
    "limits.iterations": 3,
    "resources.num_env_runners": 2,
    "resources.num_scorers": 2,
    "resources.scorer_cpus": 1.0,
    "resources.scorer_resources": {"scorer": 1.0},
    "resources.start_timeout": 60.0,
}


def who_runs_where() -> dict[str, list[str]]:
    """Node ids of the living actors by class."""
    places: dict[str, list[str]] = {}
    for actor in ray._private.state.actors().values():
        if actor["State"] == "ALIVE":
            name = actor["ActorClassName"].split(".")[-1]
            places.setdefault(name, []).append(actor["Address"]["NodeID"])
    return places


def refusal(config, out: str) -> str:
    try:
        train(config, out, progress=False)
    except (PlacementError, ScoringError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def main(out: str) -> None:
    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    scorers = cluster.add_node(num_cpus=2, resources={"scorer": 2}, **small)
    runners = cluster.add_node(num_cpus=2, **small)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes(60)
    found: list[dict] = []
    config = load_config("smoke", FIELDS)
    result = train(
        config, f"{out}/run", progress=False, on_iteration=lambda *_: found.append(who_runs_where())
    )
    pool = ScorerPool.start(scorer_spec(config), 1, num_cpus=1, resources={"scorer": 1})
    source = open_source(config.source)
    answered = len(pool([0, 1], source.exists([0, 1])))
    pool.close()
    print(
        json.dumps(
            {
                "head": cluster.head_node.node_id,
                "scorers": scorers.node_id,
                "runners": runners.node_id,
                "places": found[-1],
                "scores": result.progress.scores,
                "answered": answered,
                "too many runners": refusal(
                    config.replace(
                        **{"resources.num_env_runners": 4, "resources.start_timeout": 3.0}
                    ),
                    f"{out}/a",
                ),
                "too many scorers": refusal(
                    config.replace(
                        **{
                            "resources.num_scorers": 3,
                            "resources.scorer_cpus": 0.5,
                            "resources.start_timeout": 8.0,
                        }
                    ),
                    f"{out}/b",
                ),
                "no gpu": refusal(
                    config.replace(
                        **{
                            "resources.num_learners": 1,
                            "resources.gpus_per_learner": 1.0,
                            "resources.start_timeout": 3.0,
                        }
                    ),
                    f"{out}/c",
                ),
            }
        )
    )
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
