"""What may change when a run resumes; everything else makes another run of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tprl_env.data.features import shared_source
from tprl_env.rllib.config import TrainConfig

__all__ = ["MAY_CHANGE", "SOURCE", "check_changes", "has_effect"]

_LIMITS = ("iterations", "max_scores", "max_seconds", "checkpoint_every", "checkpoint_seconds")

MAY_CHANGE = (
    *(f"limits.{name}" for name in (*_LIMITS, "report_every")),
    *("resources.torch_threads", "resources.start_timeout", "resources.sample_timeout"),
    *("resources.num_scorers", "resources.scorer_cpus", "resources.scorer_gpus"),
    *("resources.scorer_resources", "resources.gpus_per_learner"),
    *("resources.num_env_runners", "resources.num_learners"),
    *("scoring.device", "scoring.batch_size", "scoring.max_outstanding"),
    *("scoring.max_crashes_per_row", "scoring.cache_size"),
    *("rollout.samples", "rollout.draws", "rollout.rounds"),
    *("algorithm.lr", "algorithm.epochs", "algorithm.minibatch_size", "algorithm.grad_clip"),
    *("algorithm.clip", "algorithm.entropy", "algorithm.kl_coefficient"),
    *("algorithm.value_coefficient", "algorithm.value_clip"),
)
"""Settings that a run may change between its starts; they act from the next iteration on."""

SOURCE = "source_fingerprint"
_WITHOUT_EFFECT = ("limits.", "resources.start_timeout", "resources.sample_timeout")


def check_changes(
    where: str, old: TrainConfig, new: TrainConfig, last_start: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Refuse another policy, another experiment, other data; what else changed is returned.

    Args:
        where: The run, for messages.
        old: Its settings.
        new: Those of this start.
        last_start: Its entry in ``run.json``: the same samples may have moved to another place.

    Returns:
        Old and new value of each setting that changed.

    Raises:
        ValueError: A setting changed that is not in `MAY_CHANGE`; it is named.
    """
    before, now = _shape(old), _shape(new)
    different = [name for name in before if before[name] != now[name]]
    if different:
        table = ", ".join(f"{name} {before[name]!r}, now {now[name]!r}" for name in different)
        raise ValueError(
            f"the run in {where!r} trains a policy of another shape ({table}); resume "
            "with its own settings, or choose another out"
        )
    old_table, new_table = old.flat(), new.flat()
    changed = {
        name: (old_table.get(name), value)
        for name, value in new_table.items()
        if old_table.get(name) != value
    }
    samples = last_start.get(SOURCE)
    if samples is not None:
        if samples != shared_source(new.source).fingerprint:
            changed.setdefault("source", (old.source, f"{new.source} with other samples"))
        else:
            changed.pop("source", None)
    refused = [name for name in changed if name not in MAY_CHANGE]
    if refused:
        table = ", ".join(
            f"{name} {changed[name][0]!r}, now {changed[name][1]!r}" for name in refused
        )
        raise ValueError(
            f"the run in {where!r} would become another one ({table}); resume with its own "
            "settings, or choose another out; what may change is listed in docs/reliability.md"
        )
    return changed


def has_effect(name: str) -> bool:
    """Whether a changed setting makes what follows differ from the undisturbed run."""
    return not name.startswith(_WITHOUT_EFFECT)


def _shape(config: TrainConfig) -> dict[str, Any]:
    """What a policy's weights and their meaning, and the learner's state, depend on."""
    table = {name: value for name, value in config.flat().items() if name.startswith("policy.")}
    del table["policy.initial_keep"]
    table |= {"rules.query": config.rules.query, "algorithm": config.algorithm.name}
    # without the step as input the weights serve any number of steps
    return table | {"rules.max_steps": config.policy.step_input and config.rules.max_steps}
