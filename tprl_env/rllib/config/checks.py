"""Which values of a `TrainConfig` make a run, alone and together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tprl_env.env.rules import check_choice
from tprl_env.scoring.spec import KINDS

if TYPE_CHECKING:
    from tprl_env.rllib.config import TrainConfig

__all__ = ["check_combinations", "check_ranges"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "scorer": KINDS,
    "distribution": ("bernoulli", "exact"),
    "ratio": ("joint", "token"),
    "runner": ("fast", "default"),
    "algorithm": ("ppo", "grpo", "mapo"),
    "imitation_class_weights": ("none", "sqrt", "balanced"),
}
_AT_LEAST: dict[str, float] = {
    "samples": 1,
    "draws": 1,
    "rounds": 1,
    "epochs": 1,
    "minibatch_size": 0,
    "num_env_runners": 0,
    "num_learners": 0,
    "gpus_per_learner": 0,
    "num_scorers": 0,
    "scorer_cpus": 0,
    "scorer_gpus": 0,
    "scorer_batch_size": 1,
    "cache_size": 0,
    "imitation_steps": 1,
    "imitation_batch_size": 1,
    "entropy": 0,
    "logit_l2": 0,
    "count_loss": 0,
    "value_coefficient": 0,
    "kl_coefficient": 0,
    "memory_size": 1,
    "memory_limit": 1,
    "checkpoint_every": 1,
    "checkpoint_seconds": 0,
    "report_every": 1,
    "torch_threads": 1,
    "seed": 0,
}
_POSITIVE = (
    "lr",
    "imitation_lr",
    "clip",
    "value_clip",
    "grad_clip",
    "sample_timeout",
    "start_timeout",
)
_FRACTIONS = ("discount", "gamma", "gae_lambda", "initial_keep")


def check_ranges(config: TrainConfig) -> None:
    """Refuse a field outside its range.

    Raises:
        ValueError: naming the field.
    """
    for name, choices in _CHOICES.items():
        check_choice(name, getattr(config, name), choices)
    for name, least in _AT_LEAST.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least:g}, got {getattr(config, name)!r}")
    for name in _POSITIVE:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)!r}")
    for name in _FRACTIONS:
        if not 0.0 < getattr(config, name) <= 1.0:
            raise ValueError(f"{name} must lie in (0, 1], got {getattr(config, name)!r}")
    if not 0.0 <= config.memory_weight < 1.0:
        raise ValueError(f"memory_weight must lie in [0, 1), got {config.memory_weight!r}")


# Fields that only one algorithm reads, set by mistake when that algorithm is not the run's.
_ONLY_FOR = {
    "kl_coefficient": "grpo",
    "memory_weight": "mapo",
    "memory_size": "mapo",
    "memory_limit": "mapo",
}


def check_combinations(config: TrainConfig) -> None:
    """Refuse what each field alone cannot tell.

    Raises:
        ValueError: naming the fields.
    """
    for message, wrong in (_problems(config) | _group_problems(config)).items():
        if wrong:
            raise ValueError(message)
    for field in dataclasses.fields(config):
        wanted = _ONLY_FOR.get(field.name, config.algorithm)
        if wanted != config.algorithm and getattr(config, field.name) != field.default:
            raise ValueError(
                f"{field.name} applies to algorithm={wanted!r} only, got "
                f"algorithm={config.algorithm!r}; leave {field.name} away"
            )


def _problems(config: TrainConfig) -> dict[str, bool]:
    """Message -> whether it applies: budgets, sizes and what they must divide."""
    exact = config.distribution == "exact"
    episodes = config.samples * config.draws
    share = config.samples // config.rounds
    return {
        "distribution='exact' needs budget=k or budget=(low, high)": exact
        and config.budget is None,
        "budget_input=True needs a budget": config.budget_input and config.budget is None,
        "ratio='token' has no meaning for distribution='exact', whose tokens are not "
        "independent; use ratio='joint'": exact and config.ratio == "token",
        "count_loss needs distribution='bernoulli' and count_target": config.count_loss > 0
        and (exact or not config.count_target),
        "discount applies to distribution='bernoulli' only": exact and config.discount != 1.0,
        "min_tokens must be below the smallest budget": config.budget is not None
        and config.min_tokens >= _smallest(config.budget),
        "shared_budget and fixed_budgets exclude each other": config.shared_budget
        and config.fixed_budgets,
        f"rounds={config.rounds} must divide samples={config.samples}": bool(
            config.samples % config.rounds
        ),
        f"reward_batch_size={config.reward_batch_size} must divide the {episodes} episodes of "
        "an iteration, and of each round": bool(
            episodes // config.rounds % config.reward_batch_size
        ),
        f"num_env_runners={config.num_env_runners} must divide samples/rounds={share}": (
            config.num_env_runners > 1 and share % config.num_env_runners != 0
        ),
        "num_learners > 1 needs minibatch_size where episodes end at different steps": (
            config.num_learners > 1 and config.max_steps > 1 and not exact
        )
        and not config.minibatch_size,
        f"minibatch_size={config.minibatch_size} must be at most the {episodes} episodes of an "
        "iteration over the learners": config.minibatch_size * max(1, config.num_learners)
        > episodes,
    }


def _group_problems(config: TrainConfig) -> dict[str, bool]:
    """Message -> whether it applies: what needs whole groups of draws."""
    name, relative = config.algorithm, config.algorithm != "ppo"
    default = config.runner == "default"
    return {
        "group_baseline and count_regression_baseline need draws of at least 2": config.draws < 2
        and (config.group_baseline or config.count_regression_baseline),
        "group_baseline, count_regression_baseline, shared_budget and fixed_budgets need "
        "runner='fast'": default
        and (
            config.group_baseline
            or config.count_regression_baseline
            or config.shared_budget
            or config.fixed_budgets
        ),
        f"algorithm={name!r} compares the draws of a sample; draws must be at least 2": relative
        and config.draws < 2,
        f"algorithm={name!r} needs runner='fast', which knows the groups": relative and default,
        f"algorithm={name!r} needs reward_batch_size=1; a shared reward cannot be compared "
        "inside a group": relative and config.reward_batch_size > 1,
        f"group_baseline has no meaning for algorithm={name!r}, which has a baseline per group; "
        "set it to false": relative and config.group_baseline,
        "count_regression_baseline is not defined for algorithm='mapo', whose memory holds plain "
        "returns; set it to false": name == "mapo" and config.count_regression_baseline,
        f"memory_limit={config.memory_limit} must be at least memory_size={config.memory_size}": (
            config.memory_limit < config.memory_size
        ),
        "algorithm='mapo' with num_learners > 1 needs minibatch_size, because its batches differ "
        "in length": name == "mapo" and config.num_learners > 1 and not config.minibatch_size,
    }


def _smallest(budget: int | tuple[int, int]) -> int:
    return budget if isinstance(budget, int) else budget[0]
