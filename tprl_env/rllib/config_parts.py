"""What a `TrainConfig` means to the other layers, and the range of its fields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tprl_env.policy import PolicyConfig
from tprl_env.rllib.scorer_spec import KINDS, ScorerSpec
from tprl_env.rules import EpisodeRules, check_choice
from tprl_env.token_source import TokenSource

if TYPE_CHECKING:
    from tprl_env.rllib.config import TrainConfig

__all__ = ["check_ranges", "policy_config", "policy_fields", "rules", "scorer_spec"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "scorer": KINDS,
    "distribution": ("bernoulli", "exact"),
    "ratio": ("joint", "token"),
    "runner": ("fast", "default"),
    "lfd_weights": ("none", "sqrt", "balanced"),
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
    "lfd_steps": 1,
    "lfd_batch_size": 1,
    "entropy": 0,
    "logit_l2": 0,
    "count_loss": 0,
    "value_coefficient": 0,
    "checkpoint_every": 1,
    "checkpoint_seconds": 0,
    "report_every": 1,
    "torch_threads": 1,
    "seed": 0,
}
_POSITIVE = ("lr", "lfd_lr", "clip", "value_clip", "grad_clip", "sample_timeout", "start_timeout")
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


def rules(config: TrainConfig) -> EpisodeRules:
    """The MDP's settings as the environments take them."""
    names = "max_steps alpha beta score_steps reward_batch_size min_tokens budget metric query"
    table: dict[str, Any] = {name: getattr(config, name) for name in names.split()}
    return EpisodeRules(**table)


def policy_fields(config: TrainConfig) -> dict[str, Any]:
    """Fields of the `PolicyConfig` except the widths that the source decides.

    Raises:
        ValueError: if no policy can be built from them.
    """
    names = "width layers heads hidden architecture query question_heads fusion step_input"
    names += " token_norm query_norm query_scale value_query value_input_detach initial_keep"
    names += " max_steps"
    table = {name: getattr(config, name) for name in names.split()}
    table["budget"] = config.budget_input
    table["position_slots"] = int(config.positions)  # the source decides how many
    PolicyConfig(token_width=table["width"] or table["heads"], query_width=1, **table)
    return table


def policy_config(config: TrainConfig, source: TokenSource) -> PolicyConfig:
    """The policy of a run on this source."""
    table = policy_fields(config) | {"position_slots": source.max_tokens if config.positions else 0}
    return PolicyConfig(token_width=source.code_width, query_width=source.query_width, **table)


def scorer_spec(config: TrainConfig) -> ScorerSpec:
    """What each scorer actor of a run builds.

    Raises:
        ValueError: if source or LVLM are missing.
    """
    if not config.source:
        raise ValueError("source is empty; pass --source STORE, a folder made by `tprl encode`")
    if config.scorer == "lvlm" and not config.lvlm:
        raise ValueError(
            "lvlm is empty; pass --lvlm with the LVLM the store was encoded with, such as "
            "builtin:crowded"
        )
    return ScorerSpec(
        source=config.source,
        metric=config.metric,
        kind=config.scorer,
        lvlm=config.lvlm,
        batch_size=config.scorer_batch_size,
        device=config.scorer_device,
        dtype=config.scorer_dtype,
        factory=config.scorer_factory,
        options=config.scorer_options,
    )
