"""TrainConfig: the settings of a training run, made of the parts that exist.

The files of ``rllib_configs/`` are literals of it. Changes are named by part and field
(``policy.width``) and are checked by name, type and range before anything starts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tprl_env.checks import did_you_mean
from tprl_env.env.rules import EpisodeRules
from tprl_env.rllib.config.algorithm import (
    SETTINGS,
    AlgorithmSettings,
    AnyAlgorithm,
    PpoSettings,
    with_algorithm,
)
from tprl_env.rllib.config.old_names import OLD_NAMES
from tprl_env.rllib.config.settings import (
    ImitationSettings,
    Limits,
    PolicySettings,
    ResourceSettings,
    RolloutSettings,
    ScoringSettings,
)
from tprl_env.rllib.config.values import check_at_least, read_fields, read_value, type_hints

__all__ = ["TrainConfig"]

_RULES = EpisodeRules(
    max_steps=1,
    alpha=1.0,
    beta=0.0,
    score_steps="final",
    reward_batch_size=1,
    min_tokens=0,
    budget=(3, 48),
    score_kind="likelihood",
    query="tokens",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run; the defaults are those of the ``ppo`` preset.

    Attributes:
        source: The samples: a store folder or "toy:...".
        lvlm: The LVLM that scores, for scoring.scorer "lvlm": a folder, a hub id, "builtin:crowded"
            or "builtin:sparse".
        seed: Of policy, draws and demonstrations.
        rules: The MDP. A literal names every rule, because `EpisodeRules` by itself has the
            defaults of the paper.
        policy: Network and distribution.
        imitation: What is imitated before reinforcement.
        rollout: The episodes of an iteration.
        algorithm: PPO, GRPO or MAPO: `PpoSettings`, `GrpoSettings` or `MapoSettings`.
        scoring: The scorer.
        resources: Processes and what each gets.
        limits: When to stop, save and report.
    """

    source: str = ""
    lvlm: str = ""
    seed: int = 0
    rules: EpisodeRules = _RULES
    policy: PolicySettings = field(default_factory=PolicySettings)
    imitation: ImitationSettings = field(default_factory=ImitationSettings)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    algorithm: AnyAlgorithm = field(default_factory=PpoSettings)
    scoring: ScoringSettings = field(default_factory=ScoringSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        """Refuse parts that do not go together; each part has checked itself."""
        read_fields(self)
        check_at_least(self, 0, "seed")
        self._check_budget()
        self._check_batches()
        self._check_learners()
        self._check_groups()

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with other values; strings are read as the fields' types.

        Args:
            **changes: By name, such as ``**{"policy.width": 64}``, or whole parts. ``algorithm``
                may be a name; the settings that both algorithms have keep their values.

        Raises:
            ValueError: For an unknown name, naming the nearest, or a value that does not fit.
        """
        if "algorithm.name" in changes:
            changes["algorithm"] = changes.pop("algorithm.name")
        own = {name: changes.pop(name) for name in type_hints(TrainConfig) if name in changes}
        if not isinstance(own.get("algorithm", self.algorithm), AlgorithmSettings):
            own["algorithm"] = with_algorithm(self.algorithm, own["algorithm"])
        parts: dict[str, dict[str, Any]] = {}
        for name, value in changes.items():
            part, _, key = name.partition(".")
            settings = own.get(part, getattr(self, part, None))
            if key not in getattr(settings, "__dataclass_fields__", ()):
                raise ValueError(_unknown(name, own.get("algorithm", self.algorithm), self.flat()))
            parts.setdefault(part, {})[key] = value
        for part, values in parts.items():
            own[part] = _replaced(part, own.get(part, getattr(self, part)), values)
        return dataclasses.replace(self, **own)

    def flat(self) -> dict[str, Any]:
        """Every setting by its whole name, such as ``policy.width``."""
        table: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if not dataclasses.is_dataclass(value):
                table[each.name] = value
                continue
            for inner in dataclasses.fields(value):
                table[f"{each.name}.{inner.name}"] = getattr(value, inner.name)
        return table

    def as_dict(self) -> dict[str, Any]:
        """JSON-able settings, part by part."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TrainConfig:
        """Inverse of `as_dict`, also after a trip through JSON.

        A table of the flat config that came before, such as an old run's ``config.json``, is read
        through `OLD_NAMES`.
        """
        if "max_steps" in table:
            return cls().replace(**_renamed(table))
        flat: dict[str, Any] = {}
        for part, value in table.items():
            inner = value.items() if isinstance(value, Mapping) else ()
            flat |= {f"{part}.{name}": each for name, each in inner} or {part: value}
        return cls().replace(**flat)

    def _check_budget(self) -> None:
        """Refuse a budget that does not fit distribution, policy or rules."""
        budget, exact = self.rules.budget, self.policy.distribution == "exact"
        if exact and budget is None:
            raise ValueError(
                "policy.distribution='exact' needs rules.budget=k or rules.budget=(low, high)"
            )
        if self.policy.budget_input and budget is None:
            raise ValueError("policy.budget_input=True needs a rules.budget")
        if exact and self.algorithm.ratio == "token":
            raise ValueError(
                "algorithm.ratio='token' has no meaning for policy.distribution='exact', whose "
                "tokens are not independent; use algorithm.ratio='joint'"
            )
        if self.algorithm.count_loss > 0 and (exact or not self.algorithm.count_target):
            raise ValueError(
                "algorithm.count_loss needs policy.distribution='bernoulli' and "
                "algorithm.count_target"
            )
        smallest = budget[0] if isinstance(budget, tuple) else budget
        if self.rules.shares:
            smallest = 1  # what a small share is rounded to
        if smallest is not None and self.rules.min_tokens >= smallest:
            raise ValueError(
                f"rules.min_tokens must be below the smallest budget {smallest}, got "
                f"{self.rules.min_tokens}"
            )

    def _check_batches(self) -> None:
        """Refuse sizes that do not divide what they share out."""
        rollout, episodes = self.rollout, self.rollout.episodes
        runners, shared = self.resources.num_env_runners, self.rules.reward_batch_size
        share = rollout.samples // rollout.rounds
        if episodes // rollout.rounds % shared:
            raise ValueError(
                f"rules.reward_batch_size={shared} must divide the {episodes} episodes of an "
                "iteration, and of each round"
            )
        if runners > 1 and share % runners:
            raise ValueError(
                f"resources.num_env_runners={runners} must divide rollout.samples/rollout.rounds="
                f"{share}"
            )

    def _check_learners(self) -> None:
        """Refuse minibatches that learners cannot share, and one device for several GPUs."""
        learners, minibatch = self.resources.num_learners, self.algorithm.minibatch_size
        differ = self.rules.max_steps > 1 and self.policy.distribution != "exact"
        if learners > 1 and differ and not minibatch:
            raise ValueError(
                "resources.num_learners > 1 needs algorithm.minibatch_size where episodes end at "
                "different steps"
            )
        if self.resources.scorer_gpus > 1 and self.scoring.device:
            raise ValueError(
                f"scoring.device={self.scoring.device!r} is one device, but resources.scorer_gpus="
                f"{self.resources.scorer_gpus:g} spreads the LVLM over several; remove one of them"
            )
        if learners > 1 and self.algorithm.name == "mapo" and not minibatch:
            raise ValueError(
                "algorithm='mapo' with resources.num_learners > 1 needs algorithm.minibatch_size, "
                "because its batches differ in length"
            )
        if minibatch * max(1, learners) > self.rollout.episodes:
            raise ValueError(
                f"algorithm.minibatch_size={minibatch} must be at most the "
                f"{self.rollout.episodes} episodes of an iteration over the learners"
            )

    def _check_groups(self) -> None:
        """Refuse what an algorithm that compares the draws of a sample cannot use."""
        name, rollout = self.algorithm.name, self.rollout
        if name == "ppo":
            return
        if rollout.draws < 2:
            raise ValueError(
                f"algorithm={name!r} compares the draws of a sample; rollout.draws must be at "
                f"least 2, got {rollout.draws}"
            )
        if rollout.runner == "default":
            raise ValueError(
                f"algorithm={name!r} needs rollout.runner='fast', which knows the groups"
            )
        if self.rules.reward_batch_size > 1:
            raise ValueError(
                f"algorithm={name!r} needs rules.reward_batch_size=1; a shared reward cannot be "
                "compared inside a group"
            )
        if rollout.group_baseline:
            raise ValueError(
                f"rollout.group_baseline has no meaning for algorithm={name!r}, which has a "
                "baseline per group; set it to false"
            )
        if name == "mapo" and rollout.count_regression_baseline:
            raise ValueError(
                "rollout.count_regression_baseline is not defined for algorithm='mapo', whose "
                "memory holds plain returns; set it to false"
            )


def _replaced(part: str, settings: Any, values: Mapping[str, Any]) -> Any:
    """A part with other values; messages name the part."""
    hints = type_hints(settings)
    read = {name: read_value(f"{part}.{name}", each, hints[name]) for name, each in values.items()}
    try:
        return dataclasses.replace(settings, **read)
    except ValueError as error:
        raise ValueError(f"{part}.{error}") from error


def _unknown(name: str, algorithm: AlgorithmSettings, known: Iterable[str]) -> str:
    """Why there is no such name, and which is meant."""
    part, _, key = name.partition(".")
    owners = [each for each, kind in SETTINGS.items() if key in kind.__dataclass_fields__]
    if part == "algorithm" and owners:
        return (
            f"{name} applies to algorithm={' or '.join(map(repr, owners))} only, got "
            f"algorithm={algorithm.name!r}; remove {name}"
        )
    if name in OLD_NAMES:
        return f"TrainConfig has no field {name!r}; it is now {OLD_NAMES[name]!r}"
    return f"TrainConfig has no field {name!r}{did_you_mean(name, known)}"


def _renamed(table: Mapping[str, Any]) -> dict[str, Any]:
    """The flat config of an old run by today's names, without what its algorithm never read."""
    renamed = {OLD_NAMES.get(name, name): value for name, value in table.items()}
    settings = SETTINGS[renamed.get("algorithm.name", "ppo")]
    every = {name for kind in SETTINGS.values() for name in kind.__dataclass_fields__}
    unread = {f"algorithm.{name}" for name in every - set(settings.__dataclass_fields__)}
    return {name: value for name, value in renamed.items() if name not in unread}
