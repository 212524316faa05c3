"""What a run's config means to policy and scorer: builds `PolicyConfig` and `ScorerSpec`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tprl_env.data.features.source import TokenSource
from tprl_env.env.observations import has_areas
from tprl_env.rllib.config.train_config import TrainConfig
from tprl_env.scoring.spec import ScorerSpec

if TYPE_CHECKING:
    from tprl_env.policy.network import PolicyConfig

__all__ = ["policy_config", "policy_fields", "scorer_spec"]


def policy_fields(config: TrainConfig) -> dict[str, Any]:
    """Fields of the `PolicyConfig` except the widths, which the source decides, and the steps.

    What two runs must share to start from the same imitation: nothing here depends on T unless
    the policy is shown the step.
    """
    table = asdict(config.policy)
    for name in ("distribution", "discount"):
        del table[name]  # of the actions, not of the network
    table["budget"] = table.pop("budget_input")
    table["position_slots"] = int(table.pop("positions"))  # the source decides how many
    table["query"] = config.rules.query
    if config.policy.step_input:  # else the weights do not depend on it, and serve any number
        table["max_steps"] = config.rules.max_steps
    return table


def policy_config(config: TrainConfig, source: TokenSource) -> PolicyConfig:
    """The policy of a run on this source, trained in the run's steps.

    Raises:
        ValueError: If no policy can be built for the source's widths.
    """
    from tprl_env.policy.network import PolicyConfig  # torch: a config alone never needs it

    table = policy_fields(config)
    # an index says where a token is only where all pictures have one grid
    table["coordinates"] = has_areas(source)
    slots = config.policy.positions and not table["coordinates"]
    table["position_slots"] = source.max_tokens if slots else 0
    table |= {"token_width": source.code_width, "query_width": source.query_width}
    return PolicyConfig(**table, trained_steps=config.rules.max_steps)


def scorer_spec(config: TrainConfig) -> ScorerSpec:
    """What each scorer actor of a run builds.

    Raises:
        ValueError: If source or LVLM are missing.
    """
    if not config.source:
        raise ValueError("source is empty; pass source=STORE, a folder made by `tprl encode`")
    scoring = config.scoring
    if scoring.scorer == "lvlm" and not config.lvlm:
        raise ValueError(
            "lvlm is empty; pass lvlm=LVLM, the one that the store was encoded with, such as "
            "builtin:crowded"
        )
    return ScorerSpec(
        source=config.source,
        score_kind=config.rules.score_kind,
        kind=scoring.scorer,
        lvlm=config.lvlm,
        batch_size=scoring.batch_size,
        device=scoring.device,
        dtype=scoring.dtype,
        factory=scoring.factory,
        options=scoring.options,
        device_map="auto" if config.resources.scorer_gpus > 1 else None,
    )
