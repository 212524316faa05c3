"""Settings of the token-pruning MDP, and what the environments accept from their user."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from tprl_env.checks import check_choice, check_integer, quoted
from tprl_env.data.features.source import TokenSource
from tprl_env.env import rewards
from tprl_env.env.budgets import is_share, tokens_of
from tprl_env.env.observations import observation_space

__all__ = [
    "QUERIES",
    "SCORE_KINDS",
    "EpisodeRules",
    "Query",
    "ScoreKind",
    "ScoreSteps",
    "check_options",
    "coerce_action",
]

ScoreKind = Literal["exact", "likelihood", "graded"]
Query = Literal["mean", "tokens"]
ScoreSteps = Literal["all", "final"]
SCORE_KINDS: tuple[str, ...] = get_args(ScoreKind)
QUERIES: tuple[str, ...] = get_args(Query)


@dataclass(frozen=True)
class EpisodeRules:
    """Settings of the MDP; the arguments of the environments under the same names.

    The environments write them out again instead of taking ``**rules``, so that ``help`` and
    editors show users each argument with its default; a test compares the two.

    Attributes:
        max_steps: T, steps per episode.
        alpha: Weight of the task term of the reward.
        beta: Weight of the pruning term of the reward.
        score_steps: "all" scores the mask of every step, "final" the last one only (1/T of the
            work, the same undiscounted return).
        reward_batch_size: This many consecutive episodes share the mean of their rewards.
        min_tokens: An episode terminates once at most this many tokens are kept.
        budget: Wanted count, or (low, high) to draw it log-uniformly per sample; None without. A
            float in (0, 1], or two of them, are shares of the sample's tokens.
        score_kind: "exact" (0 or 1) or "likelihood" of the reference answer, or "graded": the
            written answer by the sample's own grader.
        query: What is observed of the question: its "mean" vector or its "tokens".

    Raises:
        ValueError: For a value outside its range, naming the argument.
    """

    max_steps: int = 3
    alpha: float = 1.0
    beta: float = 0.1
    score_steps: ScoreSteps = "all"
    reward_batch_size: int = 1
    min_tokens: int = 1
    budget: int | float | tuple[int, int] | tuple[float, float] | None = None
    score_kind: ScoreKind = "exact"
    query: Query = "mean"

    def __post_init__(self) -> None:
        """Validate every field once."""
        check_integer("max_steps", self.max_steps, 1)
        check_integer("min_tokens", self.min_tokens, 0)
        check_integer("reward_batch_size", self.reward_batch_size, 1)
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ValueError(f"{name} must be a finite number, got {quoted(value)}")
        check_choice("score_steps", self.score_steps, rewards.SCORE_STEPS)
        check_choice("score_kind", self.score_kind, SCORE_KINDS)
        check_choice("query", self.query, QUERIES)
        if self.budget is not None:
            object.__setattr__(self, "budget", _check_budget(self.budget))

    def check_source(self, source: TokenSource) -> None:
        """Refuse rules that do not fit the token source.

        Raises:
            ValueError: It is no source or an empty one, or a count is beyond its tokens.
        """
        if not all(hasattr(source, name) for name in ("location", "max_tokens", "__len__")):
            raise ValueError(
                f"source must be the folder of a feature store, a text like "
                f"'toy:samples=64,tokens=16', or a TokenSource, got {quoted(source)}"
            )
        if len(source) < 1:
            raise ValueError(
                f"the source {source.location!r} holds no samples, expected at least one"
            )
        if self.min_tokens >= source.max_tokens:
            raise ValueError(
                f"min_tokens must be below the {source.max_tokens} tokens of the source "
                f"{source.location!r}, got {self.min_tokens}"
            )
        if self.budget is not None and np.max(self.budget) > source.max_tokens:
            raise ValueError(
                f"budget must be at most the {source.max_tokens} tokens of the source "
                f"{source.location!r}, got {self.budget}"
            )

    def observation_space(self, source: TokenSource) -> spaces.Dict:
        """Space of one observation for tokens of this source."""
        return observation_space(source, self.query, self.max_steps, self.budget is not None)

    @property
    def shares(self) -> bool:
        """Whether the budget is a share of a sample's tokens."""
        first = self.budget[0] if isinstance(self.budget, tuple) else self.budget
        return isinstance(first, float)

    def draw_budget(self, generator: np.random.Generator, tokens: int = 0) -> int:
        """One wanted count, log-uniform over the integers of the range (docs/method.md, "Budgets").

        P(k) = log((k + 1) / k) / log((high + 1) / low); a fixed budget draws nothing. A share is
        log-uniform over its range, then rounded to the nearest count of at least one.

        Args:
            generator: What draws.
            tokens: Tokens of the sample; only shares need them.
        """
        if self.budget is None:
            raise ValueError("this environment has no budget; pass budget=k or budget=(low, high)")
        if not isinstance(self.budget, tuple):
            return tokens_of(self.budget, tokens) if self.shares else int(self.budget)
        low, high = self.budget
        if self.shares:
            draw = generator.uniform(math.log(low), math.log(high))
            return tokens_of(min(max(math.exp(draw), low), high), tokens)
        draw = generator.uniform(math.log(low), math.log(high + 1))
        return min(max(int(math.exp(draw)), int(low)), int(high))

    def counts(self, tokens: int) -> tuple[int, int] | None:
        """Least and most wanted of ``tokens``; None without a budget."""
        if self.budget is None:
            return None
        ends = self.budget if isinstance(self.budget, tuple) else (self.budget, self.budget)
        low, high = (tokens_of(end, tokens) if self.shares else int(end) for end in ends)
        return low, high


def _check_budget(budget: object) -> Any:
    if is_share(budget):
        return float(budget)  # type: ignore[arg-type]
    if not isinstance(budget, (tuple, list)):
        return check_integer("budget", budget, 1)
    if len(budget) != 2:
        raise ValueError(f"budget must be a count or a pair (low, high), got {quoted(budget)}")
    low: float
    high: float
    if all(map(is_share, budget)):
        low, high = (float(bound) for bound in budget)
    else:
        low, high = (check_integer("budget", bound, 1) for bound in budget)
    if high < low:
        raise ValueError(f"budget (low, high) must have low <= high, got {quoted(budget)}")
    return low, high


def coerce_action(action: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.bool_]:
    """Turn an action of 0 and 1 into booleans; bool, integer and float arrays are accepted.

    Raises:
        ValueError: For another shape or type, or for values other than 0 and 1.
    """
    array = np.asarray(action)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"action must be an array of bool, int or float 0/1, got {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"action must have shape {shape}, got {array.shape}")
    if array.dtype == np.bool_:
        return array
    wrong = (array != 0) & (array != 1)  # NaN differs from both
    if wrong.any():
        place = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"action must hold only 0 (prune) and 1 (keep), got {array[place]} at index "
            f"{place if len(place) > 1 else place[0]}"
        )
    return array.astype(bool)


def check_options(
    options: Mapping[str, object] | None, rules: EpisodeRules, extra: tuple[str, ...] = ()
) -> dict[str, object]:
    """Refuse reset options that the environment does not know, with the nearest names.

    Raises:
        ValueError: It is no dict, has an unknown name, or a budget where there is none.
    """
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(
            f"the options of reset must be a dict such as {{'sample': 3}}, got {quoted(options)}"
        )
    given = dict(options or {})
    for name in given:
        check_choice("an option of reset", name, ("sample", "budget", *extra))
    if given.get("budget") is not None and rules.budget is None:
        raise ValueError(
            "the reset option 'budget' needs an environment made with budget=k or (low, high)"
        )
    return given
