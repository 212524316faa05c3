"""The token-pruning MDP for a batch of episodes, used by the environment and its vector form.

The single environment is a batch of one, so both forms give the same numbers by construction.

Legend: B episodes, N = ``max_tokens``, d code width, Q question tokens, d_q query width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tprl_env.data.features.source import TokenSource
from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.env import rewards
from tprl_env.env.rules import EpisodeRules, check_integer
from tprl_env.env.scorer import NamedFailures, check_scores

__all__ = ["Episodes", "choose_episode", "open_environment"]

ScorerLike = Callable[[NDArray[np.int64], NDArray[np.bool_]], ArrayLike]
Observation = dict[str, NDArray[Any]]


def open_environment(
    source: str | Path | TokenSource, scorer: ScorerLike | None, rules: EpisodeRules
) -> tuple[TokenSource, ScorerLike]:
    """Open the source, choose the scorer, and check that the three fit together.

    Args:
        source: a token source, or what `tprl_env.data.features.store.open_source` opens.
        scorer: a callable (samples, keep) -> scores; None only for the toy source.
        rules: the settings.

    Raises:
        ValueError: if they do not fit, for instance a scorer of another score_kind.
    """
    opened = open_source(source) if isinstance(source, (str, Path)) else source
    rules.check_source(opened)
    if scorer is None:
        if not isinstance(opened, ToyStore):
            raise ValueError(
                f"scorer must be given for the source {opened.location!r}; only the toy source has "
                "one built in"
            )
        scorer = ToyScorer(opened, rules.score_kind)
    if not callable(scorer):
        raise ValueError(f"scorer must be a callable (samples, keep) -> scores, got {scorer!r}")
    score_kind = getattr(scorer, "score_kind", None)
    if score_kind is not None and score_kind != rules.score_kind:
        raise ValueError(
            f"the scorer measures {score_kind!r} but the environment {rules.score_kind!r}; rewards "
            "are differences of scores, so both must use one score_kind"
        )
    return opened, scorer


def choose_episode(
    generator: np.random.Generator,
    source: TokenSource,
    rules: EpisodeRules,
    sample: object = None,
    budget: object = None,
) -> tuple[int, int]:
    """Sample number and wanted count of a new episode: given by the user, else drawn.

    Args:
        generator: only draws what is not given; first the sample (uniform), then the budget.
        source: where samples come from.
        rules: settings; without a budget the count is 0.
        sample: reset option, in [0, S), or None.
        budget: reset option, in [1, tokens of the sample], or None.

    Raises:
        ValueError: if an option is outside its range.
    """
    if sample is None:
        number = int(generator.integers(len(source)))
    else:
        number = _check_sample(sample, source)
    if rules.budget is None:
        return number, 0
    if budget is None:
        return number, rules.draw_budget(generator)
    return number, _check_count(budget, number, source)


def _check_sample(sample: object, source: TokenSource) -> int:
    """A sample number given by the user, in [0, S)."""
    number = check_integer("the reset option 'sample'", sample, 0)
    if number >= len(source):
        raise ValueError(
            f"the reset option 'sample' must be below the {len(source)} samples of "
            f"{source.location!r}, got {number}"
        )
    return number


def _check_count(budget: object, sample: int, source: TokenSource) -> int:
    """A wanted count given by the user, in [1, tokens of the sample]."""
    count = check_integer("the reset option 'budget'", budget, 1)
    total = int(np.sum(source.exists(np.array([sample]))))
    if count > total:
        raise ValueError(
            f"the reset option 'budget' must be at most the {total} tokens of sample "
            f"{source.id(sample)!r}, got {count}"
        )
    return count


class Episodes:
    """State of B episodes over one token source.

    Args:
        source: where samples come from.
        scorer: callable (samples int64 (b,), keep bool (b, N)) -> (b,) scores in [0, 1].
        rules: settings of the MDP.
        count: B.

    Attributes:
        samples: int64 (B,), sample numbers.
        alive: bool (B, N), m_t.
        step: int64 (B,), steps taken.
        score: float32 (B,), the newest score, NaN where the last step was not scored.
        live: bool (B,), episodes that may take a step.
    """

    def __init__(
        self, source: TokenSource, scorer: ScorerLike, rules: EpisodeRules, count: int
    ) -> None:
        self.source, self.scorer, self.rules, self.count = source, scorer, rules, count
        self._full_scores = source.full_scores(rules.score_kind)
        tokens = source.max_tokens
        self.samples = np.zeros(count, np.int64)
        self.existing = np.zeros((count, tokens), bool)
        self.alive = np.zeros((count, tokens), bool)
        self.step = np.zeros(count, np.int64)
        self.full = np.zeros(count, np.float32)
        self.score = np.zeros(count, np.float32)
        self.budget = np.zeros(count, np.int64)
        self.live = np.zeros(count, bool)
        self._codes = np.zeros((count, tokens, source.code_width), np.float32)
        shape: tuple[int, ...] = (source.query_width,)
        if rules.query == "tokens":
            shape = (source.max_question_tokens, source.query_width)
        self._query = np.zeros((count, *shape), np.float32)
        self._query_mask = np.zeros((count, source.max_question_tokens), np.int8)

    def start(
        self, slots: NDArray[np.int64], samples: NDArray[np.int64], budgets: NDArray[np.int64]
    ) -> None:
        """Begin new episodes.

        Args:
            slots: int64 (b,), which of the B episodes.
            samples: int64 (b,), their samples.
            budgets: int64 (b,), wanted counts, cut to the tokens that exist; without effect
                where the rules have no budget.

        Raises:
            ValueError: if a sample has no tokens at all.
        """
        existing = np.asarray(self.source.exists(samples), bool)
        totals = existing.sum(axis=1)
        if np.any(totals < 1):
            empty = int(samples[np.argmin(totals)])
            raise ValueError(
                f"sample {self.source.id(empty)!r} of {self.source.location!r} has no visual tokens"
            )
        full = check_scores(
            self._full_scores[samples], samples, self.source, scorer="full_scores of the source"
        )
        self._codes[slots] = self.source.codes(samples)
        if self.rules.query == "mean":
            self._query[slots] = self.source.query(samples)
        else:
            self._query[slots], self._query_mask[slots] = self.source.query_tokens(samples)
        self.samples[slots] = samples
        self.existing[slots] = self.alive[slots] = existing
        self.step[slots] = 0
        self.full[slots] = self.score[slots] = full
        self.budget[slots] = np.minimum(budgets, totals)
        self.live[slots] = True

    def advance(
        self, keep: NDArray[np.bool_], live: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """One step of the live episodes, with one request to the scorer (TPRL eq. 2-6).

        Args:
            keep: bool (B, N), actions.
            live: bool (B,), episodes that take the step; the others are left untouched.

        Returns:
            Rewards float32 (B,) and terminated bool (B,), zero and False where not live.

        Raises:
            ScoringError: if the scorer fails; the state is then as before the call.
        """
        rules = self.rules
        alive = np.where(live[:, None], rewards.advance(self.alive, keep), self.alive)
        kept, before = alive.sum(axis=1), self.alive.sum(axis=1)
        step = self.step + live
        ended = live & rewards.is_terminal(kept, step, rules.max_steps, rules.min_tokens)
        scored = live if rules.score_steps == "all" else ended
        score = np.where(live, np.float32(np.nan), self.score)
        if scored.any():
            score[scored] = self._ask_scorer(self.samples[scored], alive[scored])
        previous = self.score if rules.score_steps == "all" else self.full
        gained = rewards.step_reward(
            np.where(scored, score, 0.0),
            np.where(scored, previous, 0.0),
            np.where(live, kept, 1),
            np.where(live, before, 1),
            rules.alpha,
            rules.beta,
        )
        self.alive, self.step, self.score = alive, step, score
        self.live = self.live & ~ended
        return np.where(live, gained, np.float32(0.0)), ended

    def _ask_scorer(
        self, samples: NDArray[np.int64], keep: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Scores of one request; whatever the scorer raises arrives as a `ScoringError`."""
        name = getattr(self.scorer, "__name__", type(self.scorer).__name__)
        with NamedFailures(samples, self.source, name):
            scores = self.scorer(samples, keep)
        return check_scores(scores, samples, self.source, scorer=name)

    def observation(self) -> Observation:
        """Observations of all episodes, (B, ...) arrays that the caller owns."""
        parts: Observation = {"tokens": self._codes.copy(), "query": self._query.copy()}
        if self.rules.query == "tokens":
            parts["query_mask"] = self._query_mask.copy()
        parts["alive"] = self.alive.astype(np.int8)
        parts["step"] = self.step.astype(np.float32)[:, None]
        if self.rules.budget is not None:
            parts["budget"] = self.budget.astype(np.float32)[:, None]
        return parts

    def info(self) -> dict[str, tuple[NDArray[Any], NDArray[np.bool_]]]:
        """Information of all episodes: name -> (values (B, ...), bool (B,) where it is known)."""
        everywhere = np.ones(self.count, bool)
        kept = self.alive.sum(axis=1)
        names = np.array([self.source.id(int(sample)) for sample in self.samples], object)
        known = ~np.isnan(self.score)
        table = {
            "sample": (self.samples.copy(), everywhere),
            "id": (names, everywhere),
            "kept": (kept, everywhere),
            "keep_ratio": (kept / self.existing.sum(axis=1), everywhere),
            "score": (np.where(known, self.score, 0.0).astype(np.float64), known),
            "full_score": (self.full.astype(np.float64), everywhere),
            "mask": (self.alive.copy(), everywhere),
        }
        if self.rules.budget is not None:
            table["budget"] = (self.budget.copy(), everywhere)
        return table
