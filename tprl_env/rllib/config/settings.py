"""The parts of a `TrainConfig`: frozen dataclasses that refuse wrong values when they are made.

The MDP's part is `tprl_env.env.rules.EpisodeRules`, those of the algorithms are in `algorithm.py`.
Messages begin with the field's name; `TrainConfig` puts the part's before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from tprl_env.rllib.config.values import (
    check_at_least,
    check_fraction,
    check_positive,
    read_fields,
)

__all__ = [
    "ImitationSettings",
    "Limits",
    "PolicySettings",
    "ResourceSettings",
    "RolloutSettings",
    "ScoringSettings",
]


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """The policy network and the distribution of its masks.

    What it reads of the question is ``rules.query``, how many steps there are ``rules.max_steps``;
    the widths of tokens and query come from the source.

    Attributes:
        distribution: "bernoulli" (TPRL eq. 14, 15) or "exact" (conditional Bernoulli, which keeps
            exactly the wanted count).
        discount: lambda_disc of TPRL eq. 14, for "bernoulli".
        width: Width of the network, None for the codes' own.
        layers: Attention blocks.
        heads: Attention heads; they must divide the width.
        hidden: Width inside the residual MLPs, None for four times the width.
        architecture: "attention" between tokens, or "mlp" on each token alone.
        question_heads: Bilinear heads with rules.query "tokens".
        fusion: "concat", or "gated" to give the policy head the product of token and mean query.
        budget_input: Show the wanted count to actor and critic.
        step_input: Show the step to actor and critic.
        token_norm: LayerNorm on the codes.
        query_norm: Normalisation of the query: "none", "rms" or "layer".
        query_scale: Factor on the query after its normalisation.
        positions: Learn an embedding per token index. Where the pictures of the source have no
            grid in common, the policy is told where each token is in its picture instead.
        value_query: Let the critic see the query.
        value_input_detach: Stop the critic's gradient before the shared features.
        initial_keep: Keep-probability of an untrained policy.
    """

    distribution: Literal["exact", "bernoulli"] = "exact"
    discount: float = 1.0
    width: int | None = 64
    layers: int = 1
    heads: int = 4
    hidden: int | None = None
    architecture: Literal["attention", "mlp"] = "attention"
    question_heads: int = 8
    fusion: Literal["concat", "gated"] = "concat"
    budget_input: bool = True
    step_input: bool = False
    token_norm: bool = True
    query_norm: Literal["none", "rms", "layer"] = "rms"
    query_scale: float = 1.0
    positions: bool = False
    value_query: bool = True
    value_input_detach: bool = False
    initial_keep: float = 0.5

    def __post_init__(self) -> None:
        """Refuse values that no policy can be built from."""
        read_fields(self)
        check_at_least(self, 1, "layers", "heads", "question_heads")
        check_at_least(self, 1, *(n for n in ("width", "hidden") if getattr(self, n) is not None))
        check_positive(self, "query_scale")
        check_fraction(self, "discount")
        if not 0.0 < self.initial_keep < 1.0:
            raise ValueError(f"initial_keep must lie in (0, 1), got {self.initial_keep!r}")
        if self.architecture == "attention" and self.width is not None and self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide the width {self.width}")
        if self.distribution == "exact" and self.discount != 1.0:
            raise ValueError(
                f"discount applies to distribution='bernoulli' only, got {self.discount}; remove it"
            )


@dataclass(frozen=True, kw_only=True)
class ImitationSettings:
    """Imitation of a demonstrator before reinforcement (TPRL eq. 7, 8).

    Attributes:
        demonstrator: What is imitated: "none"; a heuristic, "vispruner" or "divprune", at budgets
            as drawn, or nested at keep-rates .75 and .5 where there is no budget (TPRL eq. 7, 8);
            or the name of a per-sample channel such as "question_attention".
        steps: Gradient steps.
        batch_size: Transitions per step.
        lr: Adam learning rate.
        class_weights: Weight of kept tokens in the cross-entropy: "none" is 1, "balanced" the
            ratio of dropped to kept tokens, "sqrt" its square root.
    """

    demonstrator: str = "none"
    steps: int = 900
    batch_size: int = 48
    lr: float = 3e-3
    class_weights: Literal["none", "sqrt", "balanced"] = "sqrt"

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        read_fields(self)
        check_at_least(self, 1, "steps", "batch_size")
        check_positive(self, "lr")


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """The episodes of one iteration.

    Attributes:
        samples: Distinct samples per iteration.
        draws: Episodes per sample (a group).
        rounds: Parts an iteration's rollout is cut into; one part is scored while the next is
            rolled out.
        group_baseline: Subtract the group's mean advantage per step (PPO).
        count_regression_baseline: Subtract from the advantage what log K explains inside groups
            (for Bernoulli actions, where one more token always helps).
        fixed_budgets: A sample has one budget in the whole run, drawn from its number. MAPO's
            memory holds masks of one count, so it only helps where a count comes again.
        shared_budget: Draw one budget per round instead of one per sample.
        runner: "fast" rolls out whole episodes without gymnasium, "default" is RLlib's runner on
            the vector environment.
    """

    samples: int = 32
    draws: int = 8
    rounds: int = 1
    group_baseline: bool = False
    count_regression_baseline: bool = False
    fixed_budgets: bool = False
    shared_budget: bool = False
    runner: Literal["fast", "default"] = "fast"

    def __post_init__(self) -> None:
        """Refuse values that do not go together."""
        read_fields(self)
        check_at_least(self, 1, "samples", "draws", "rounds")
        if self.shared_budget and self.fixed_budgets:
            raise ValueError("shared_budget and fixed_budgets exclude each other")
        if self.samples % self.rounds:
            raise ValueError(f"rounds={self.rounds} must divide samples={self.samples}")
        if self.draws < 2 and (self.group_baseline or self.count_regression_baseline):
            raise ValueError(
                "group_baseline and count_regression_baseline need draws of at least 2, got "
                f"{self.draws}"
            )
        options = ("group_baseline", "count_regression_baseline", "shared_budget", "fixed_budgets")
        if self.runner == "default" and any(getattr(self, name) for name in options):
            raise ValueError(f"{', '.join(options[:3])} and {options[3]} need runner='fast'")

    @property
    def episodes(self) -> int:
        """Episodes of an iteration."""
        return self.samples * self.draws


@dataclass(frozen=True, kw_only=True)
class ResourceSettings:
    """Processes of a run and what each of them gets.

    Attributes:
        num_env_runners: Remote env runners; 0 rolls out in the driver.
        num_learners: Remote learners; 0 learns in the driver.
        gpus_per_learner: GPUs of each learner.
        num_scorers: Scorer actors; 0 scores in each env runner's own process.
        scorer_cpus: CPUs, and torch threads, of each scorer.
        scorer_gpus: GPUs of each scorer: a part of one, or several for an LVLM that one cannot
            hold, which is then spread over them.
        scorer_resources: Custom resources of each scorer, name to amount.
        torch_threads: Threads of the driver.
        start_timeout: Seconds for the scorers to load and for the cluster to make room.
        sample_timeout: Seconds for one iteration's rollouts on remote env runners.
    """

    num_env_runners: int = 0
    num_learners: int = 0
    gpus_per_learner: float = 0.0
    num_scorers: int = 2
    scorer_cpus: float = 1.0
    scorer_gpus: float = 0.0
    scorer_resources: dict[str, float] = field(default_factory=dict)
    torch_threads: int = 1
    start_timeout: float = 600.0
    sample_timeout: float = 1800.0

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        read_fields(self)
        check_at_least(self, 0, "num_env_runners", "num_learners", "gpus_per_learner")
        check_at_least(self, 0, "num_scorers", "scorer_cpus", "scorer_gpus")
        if self.scorer_gpus > 1 and self.scorer_gpus % 1:
            raise ValueError(
                f"scorer_gpus must be a part of one GPU or a whole number, got {self.scorer_gpus:g}"
            )
        check_at_least(self, 1, "torch_threads")
        check_positive(self, "start_timeout", "sample_timeout")


@dataclass(frozen=True, kw_only=True)
class ScoringSettings:
    """The scorer that every mask is sent to; what it scores is ``rules.score_kind``.

    Attributes:
        scorer: "lvlm" (the frozen LVLM), "toy" (the rule of a toy source) or "import" (what
            scoring.factory builds).
        factory: "module:function" that builds a scorer from a `ScorerSpec`, for "import".
        options: JSON values for scoring.factory.
        batch_size: Rows of one forward pass.
        device: torch device of the LVLM, None for the best there is.
        dtype: torch dtype of the LVLM, None for its default.
        max_outstanding: Requests under way per client and scorer.
        max_crashes_per_row: Scorer processes that one row may crash before the run fails.
        cache_size: Masks whose scores are remembered per client.
    """

    scorer: Literal["lvlm", "toy", "import"] = "lvlm"
    factory: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 128
    device: str | None = None
    dtype: str | None = None
    max_outstanding: int = 4
    max_crashes_per_row: int = 3
    cache_size: int = 200_000

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        read_fields(self)
        check_at_least(self, 1, "batch_size", "max_outstanding", "max_crashes_per_row")
        check_at_least(self, 0, "cache_size")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """When a run stops, saves and reports; a run needs at least one of the first three.

    Attributes:
        iterations: Stop after this many iterations, None for no limit.
        max_scores: Stop after this many requested scores, None for no limit.
        max_seconds: Stop after this many seconds of training, None for no limit.
        checkpoint_every: Iterations between checkpoints.
        checkpoint_seconds: Least seconds between checkpoints.
        report_every: Iterations between progress lines.
    """

    iterations: int | None = None
    max_scores: int | None = None
    max_seconds: float | None = None
    checkpoint_every: int = 20
    checkpoint_seconds: float = 30.0
    report_every: int = 5

    def __post_init__(self) -> None:
        """Refuse a value outside its range."""
        read_fields(self)
        check_at_least(self, 1, "checkpoint_every", "report_every")
        given = ("iterations", "max_scores", "max_seconds")
        check_positive(self, *(name for name in given if getattr(self, name) is not None))
        check_at_least(self, 0, "checkpoint_seconds")
