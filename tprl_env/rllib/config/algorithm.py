"""Settings of the three algorithms: what all have in one class, what one has in its own.

No ray and no torch here, so that a config can be read and explained without loading them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from tprl_env.checks import check_choice
from tprl_env.rllib.config.values import (
    check_at_least,
    check_fraction,
    check_positive,
    read_fields,
)

__all__ = [
    "SETTINGS",
    "AlgorithmSettings",
    "AnyAlgorithm",
    "GrpoSettings",
    "MapoSettings",
    "PpoSettings",
    "with_algorithm",
]


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """The clipped surrogate and its optimiser, which all algorithms share.

    Attributes:
        name: The algorithm: "ppo" (with a critic), "grpo" (group-relative advantages, KL penalty
            towards the initial policy) or "mapo" (a memory of the best episodes). Another name
            given to ``replace`` or on the command line keeps the settings that both have.
        lr: Adam learning rate.
        epochs: Passes over a batch.
        minibatch_size: Rows per gradient step, 0 for the whole batch.
        clip: Epsilon of the clipped ratio.
        ratio: "joint" ratio of whole masks (TPRL) or one per "token".
        per_token: Divide policy loss and entropy bonus by the tokens kept (distribution "exact")
            or alive ("bernoulli") of the row.
        entropy: Coefficient of the exact entropy.
        logit_l2: Coefficient of the mean square of the alive tokens' logits.
        count_loss: Coefficient of mean(log(sum p / count_target))^2, for Bernoulli actions.
        count_target: Tokens expected to be kept after the last step.
        gamma: Discount of the rewards per step.
        grad_clip: Largest norm of the gradient.
    """

    name: str = ""
    lr: float = 1e-3
    epochs: int = 2
    minibatch_size: int = 0
    clip: float = 0.2
    ratio: Literal["joint", "token"] = "joint"
    per_token: bool = True
    entropy: float = 0.003
    logit_l2: float = 1e-4
    count_loss: float = 0.0
    count_target: float | None = None
    gamma: float = 1.0
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        read_fields(self)
        check_at_least(self, 1, "epochs")
        check_at_least(self, 0, "minibatch_size", "entropy", "logit_l2", "count_loss")
        check_positive(self, "lr", "clip", "grad_clip")
        check_fraction(self, "gamma")


@dataclass(frozen=True, kw_only=True)
class PpoSettings(AlgorithmSettings):
    """PPO: a critic, and generalised advantage estimation.

    Attributes:
        gae_lambda: lambda of generalised advantage estimation (PPO).
        value_coefficient: Weight of the critic's squared error (PPO).
        value_clip: Largest squared error of the critic per row (PPO).
        normalize_advantages: Scale advantages to deviation 1 per iteration, with PPO also to mean 0
            (PPO, MAPO; GRPO normalises in its groups instead).
    """

    name: Literal["ppo"] = "ppo"
    gae_lambda: float = 0.95
    value_coefficient: float = 0.5
    value_clip: float = 1e6
    normalize_advantages: bool = True

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        super().__post_init__()
        check_at_least(self, 0, "value_coefficient")
        check_positive(self, "value_clip")
        check_fraction(self, "gae_lambda")


@dataclass(frozen=True, kw_only=True)
class GrpoSettings(AlgorithmSettings):
    """GRPO: no critic, advantages from the group, a KL penalty towards the initial policy.

    Attributes:
        kl_coefficient: Of the k3 estimate of KL(policy || initial policy) (GRPO).
    """

    name: Literal["grpo"] = "grpo"
    kl_coefficient: float = 0.04

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        super().__post_init__()
        check_at_least(self, 0, "kl_coefficient")


@dataclass(frozen=True, kw_only=True)
class MapoSettings(AlgorithmSettings):
    """MAPO: no critic, a memory of the best episodes of each sample.

    Attributes:
        memory_weight: w_min, least weight of a sample's remembered episodes (MAPO).
        memory_size: Episodes remembered per sample and budget (MAPO).
        memory_limit: Episodes remembered in total (MAPO).
        normalize_advantages: Scale advantages to deviation 1 per iteration, with PPO also to mean 0
            (PPO, MAPO; GRPO normalises in its groups instead).
    """

    name: Literal["mapo"] = "mapo"
    memory_weight: float = 0.1
    memory_size: int = 4
    memory_limit: int = 100_000
    normalize_advantages: bool = True

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        super().__post_init__()
        check_at_least(self, 1, "memory_size", "memory_limit")
        if not 0.0 <= self.memory_weight < 1.0:
            raise ValueError(f"memory_weight must lie in [0, 1), got {self.memory_weight!r}")
        if self.memory_limit < self.memory_size:
            raise ValueError(
                f"memory_limit={self.memory_limit} must be at least memory_size={self.memory_size}"
            )


AnyAlgorithm = PpoSettings | GrpoSettings | MapoSettings

SETTINGS: dict[str, type[AnyAlgorithm]] = {
    "ppo": PpoSettings,
    "grpo": GrpoSettings,
    "mapo": MapoSettings,
}


def with_algorithm(settings: AlgorithmSettings, name: object) -> AnyAlgorithm:
    """Settings of another algorithm; those that both have keep their values.

    Raises:
        ValueError: For an unknown name.
    """
    check_choice("algorithm", name, SETTINGS)
    other = SETTINGS[str(name)]
    if isinstance(settings, other):
        return settings
    both = {field.name for field in fields(settings)} & {field.name for field in fields(other)}
    return other(**{field: getattr(settings, field) for field in both - {"name"}})
