"""Checks that the cluster can hold a run's actors, with a timeout.

Ray queues an actor that fits on no node without a timeout, and only logs it. Before RLlib starts
its runners and learners, the same resources are reserved once, with a deadline; a pending
reservation also makes an autoscaler add nodes.
"""

from __future__ import annotations

from typing import Any

from ray.util.placement_group import placement_group, remove_placement_group

from tprl_env.ray_session import requested_and_available
from tprl_env.rllib.config import TrainConfig

__all__ = ["PlacementError", "actor_bundles", "actor_cpus", "check_room"]


class PlacementError(TimeoutError):
    """The cluster lacks the resources for the actors of a run."""


def actor_cpus(config: TrainConfig) -> float:
    """CPUs that the actors of a run request together: scorers, env runners and learners."""
    wanted = config.resources
    return wanted.num_scorers * wanted.scorer_cpus + wanted.num_env_runners + wanted.num_learners


def actor_bundles(config: Any) -> dict[str, list[dict[str, float]]]:
    """Resources of each remote actor that RLlib will start for an AlgorithmConfig, by kind.

    Raises:
        ValueError: An actor would ask for no resource at all, so that nothing limits their number.
    """
    runner = {
        "CPU": config.num_cpus_per_env_runner,
        "GPU": config.num_gpus_per_env_runner,
        **config.custom_resources_per_env_runner,
    }
    cpus = config.num_cpus_per_learner
    if cpus == "auto":  # as LearnerGroup reads it
        cpus = 0 if config.num_gpus_per_learner else 1
    learner = {
        "CPU": cpus,
        "GPU": config.num_gpus_per_learner,
        **(config.custom_resources_per_learner or {}),
    }
    wanted = {
        "env runners": [runner] * config.num_env_runners,
        "learners": [learner] * config.num_learners,
    }
    found = {}
    for kind, bundles in wanted.items():
        found[kind] = [{n: float(a) for n, a in bundle.items() if a} for bundle in bundles]
        if not all(found[kind]):
            raise ValueError(f"{kind} must ask for at least one resource, got {bundles[0]}")
    return found


def check_room(config: Any, timeout: float) -> None:
    """Wait until the cluster has the resources for the remote actors of an AlgorithmConfig.

    Args:
        config: AlgorithmConfig.
        timeout: Seconds; with an autoscaler, the time that new nodes may take.

    Raises:
        PlacementError: On a timeout; compares requested with available resources.
    """
    kinds = actor_bundles(config)
    bundles = [bundle for kind in kinds.values() for bundle in kind]
    if not bundles:
        return
    group = placement_group(bundles, strategy="PACK")
    try:
        if not group.wait(timeout):
            counts = " and ".join(f"{len(kind)} {name}" for name, kind in kinds.items() if kind)
            raise PlacementError(
                f"the cluster had no room for {counts} within {timeout:g} s "
                f"({requested_and_available(bundles)}); ask for fewer, add nodes, or raise "
                "resources.start_timeout if the autoscaler needs longer"
            )
    finally:
        remove_placement_group(group)
