"""What a `TrainConfig` means to the other layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tprl_env.data.features.source import TokenSource
from tprl_env.env.rules import EpisodeRules
from tprl_env.policy.network import PolicyConfig
from tprl_env.scoring.spec import ScorerSpec

if TYPE_CHECKING:
    from tprl_env.rllib.config import TrainConfig

__all__ = ["policy_config", "policy_fields", "rules", "scorer_spec"]


def rules(config: TrainConfig) -> EpisodeRules:
    """The MDP's settings as the environments take them."""
    names = "max_steps alpha beta score_steps reward_batch_size min_tokens budget score_kind query"
    table: dict[str, Any] = {name: getattr(config, name) for name in names.split()}
    return EpisodeRules(**table)


def policy_fields(config: TrainConfig) -> dict[str, Any]:
    """Fields of the `PolicyConfig` except the widths, which the source decides, and the steps.

    What two runs must share to start from the same imitation: nothing here depends on T unless
    the policy is shown the step.

    Raises:
        ValueError: if no policy can be built from them.
    """
    names = "width layers heads hidden architecture query question_heads fusion step_input"
    names += " token_norm query_norm query_scale value_query value_input_detach initial_keep"
    if config.step_input:  # else the weights do not depend on it, and serve any number of steps
        names += " max_steps"
    table = {name: getattr(config, name) for name in names.split()}
    table["budget"] = config.budget_input
    table["position_slots"] = int(config.positions)  # the source decides how many
    PolicyConfig(token_width=table["width"] or table["heads"], query_width=1, **table)
    return table


def policy_config(config: TrainConfig, source: TokenSource) -> PolicyConfig:
    """The policy of a run on this source, trained in the run's steps."""
    table = policy_fields(config) | {"position_slots": source.max_tokens if config.positions else 0}
    table |= {"token_width": source.code_width, "query_width": source.query_width}
    return PolicyConfig(**table, trained_steps=config.max_steps)


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
        score_kind=config.score_kind,
        kind=config.scorer,
        lvlm=config.lvlm,
        batch_size=config.scorer_batch_size,
        device=config.scorer_device,
        dtype=config.scorer_dtype,
        factory=config.scorer_factory,
        options=config.scorer_options,
    )
