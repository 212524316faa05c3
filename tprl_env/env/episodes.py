"""The token-pruning MDP for a batch of episodes: the one loop of the whole package.

The single environment is a batch of one, the vector environment a batch of B, and the fast runner
of `tprl_env.rllib.rollout` a batch that is scored later, so all give the same numbers by
construction.

Legend: B episodes, N = ``max_tokens``, d code width, Q question tokens, d_q query width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.source import TokenSource
from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import ToyScorer, ToyStore
from tprl_env.env import rewards
from tprl_env.env.observations import Observation, look_up, progress
from tprl_env.env.rules import EpisodeRules, check_integer
from tprl_env.env.scorer import NamedFailures, check_scores

__all__ = ["Episodes", "Transition", "choose_episode", "open_environment"]

ScorerLike = Callable[[npt.NDArray[np.int64], npt.NDArray[np.bool_]], npt.ArrayLike]


def open_environment(
    source: str | Path | TokenSource, scorer: ScorerLike | None, rules: EpisodeRules
) -> tuple[TokenSource, ScorerLike]:
    """Open the source, choose the scorer, and check that the three fit together.

    Args:
        source: A token source, or what `tprl_env.data.features.store.open_source` opens.
        scorer: A callable (samples, keep) -> scores; None only for the toy source.
        rules: The settings.

    Raises:
        ValueError: If they do not fit, for instance a scorer of another score_kind.
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
        generator: Only draws what is not given; first the sample (uniform), then the budget.
        source: Where samples come from.
        rules: Settings; without a budget the count is 0.
        sample: Reset option, in [0, S), or None.
        budget: Reset option, in [1, tokens of the sample], or None.

    Raises:
        ValueError: If an option is outside its range.
    """
    if sample is None:
        number = int(generator.integers(len(source)))
    else:
        number = _check_sample(sample, source)
    if rules.budget is None:
        return number, 0
    if budget is None:
        tokens = int(np.sum(source.exists(np.array([number])))) if rules.shares else 0
        return number, rules.draw_budget(generator, tokens)
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


class Transition(NamedTuple):
    """One step of B episodes, worked out but not yet taken.

    Attributes:
        alive: bool (B, N), m_{t+1}.
        kept: int64 (B,), K_{t+1}.
        step: int64 (B,), steps taken after it.
        live: bool (B,), episodes that take it.
        ended: bool (B,), those of them that it ends.
        wanted: bool (B,), those whose mask ``alive`` must be scored.
    """

    alive: npt.NDArray[np.bool_]
    kept: npt.NDArray[np.int64]
    step: npt.NDArray[np.int64]
    live: npt.NDArray[np.bool_]
    ended: npt.NDArray[np.bool_]
    wanted: npt.NDArray[np.bool_]


class Episodes:
    """State of B episodes over one token source.

    `transition` says what a step does, `take` does it; `advance` is both with the scores between
    them. Who scores later, as the fast runner does, calls the first two. Arrays of the state are
    replaced and never changed, so a caller may keep the ones it has seen.

    Args:
        source: Where samples come from.
        scorer: Callable (samples int64 (b,), keep bool (b, N)) -> (b,) scores in [0, 1]; only
            `advance` asks it.
        rules: Settings of the MDP.
        count: B.

    Attributes:
        samples: int64 (B,), sample numbers.
        existing: bool (B, N), m_0.
        alive: bool (B, N), m_t.
        kept: int64 (B,), K_t.
        step: int64 (B,), steps taken.
        full: float32 (B,), score with all tokens.
        score: float32 (B,), the newest score, NaN where the last step was not scored.
        budget: int64 (B,), wanted counts, 0 where the rules have no budget.
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
        self.kept = np.zeros(count, np.int64)
        self.step = np.zeros(count, np.int64)
        self.full = np.zeros(count, np.float32)
        self.score = np.zeros(count, np.float32)
        self.budget = np.zeros(count, np.int64)
        self.live = np.zeros(count, bool)
        self._looked_up: Observation = {}  # filled by `observation`
        self._unseen = np.ones(count, bool)  # began after the last `observation`

    def start(
        self,
        slots: npt.NDArray[np.int64],
        samples: npt.NDArray[np.int64],
        budgets: npt.NDArray[np.int64],
    ) -> None:
        """Begin new episodes.

        Args:
            slots: int64 (b,), which of the B episodes.
            samples: int64 (b,), their samples.
            budgets: int64 (b,), wanted counts, cut to the tokens that exist; without effect
                where the rules have no budget.

        Raises:
            ValueError: If a sample has no tokens at all.
            ScoringError: If the source holds something else than a score of a sample.
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
        self.samples = _replaced(self.samples, slots, samples)
        self.existing = _replaced(self.existing, slots, existing)
        self.alive = _replaced(self.alive, slots, existing)
        self.kept = _replaced(self.kept, slots, totals)
        self.step = _replaced(self.step, slots, 0)
        self.full = _replaced(self.full, slots, full)
        self.score = _replaced(self.score, slots, full)
        self.budget = _replaced(self.budget, slots, np.minimum(budgets, totals))
        self.live = _replaced(self.live, slots, True)
        self._unseen[slots] = True

    def transition(self, keep: npt.NDArray[np.bool_]) -> Transition:
        """What one step of the live episodes does (TPRL eq. 2, 3); nothing is changed or scored.

        Args:
            keep: bool (B, N), actions; those of episodes that are not live have no effect.
        """
        rules, live = self.rules, self.live
        alive = rewards.advance(self.alive, keep | ~live[:, None])
        kept, step = alive.sum(axis=1), self.step + live
        ended = live & rewards.is_terminal(kept, step, rules.max_steps, rules.min_tokens)
        wanted = rewards.needs_score(live, ended, rules.score_steps)
        return Transition(alive, kept, step, live, ended, wanted)

    def take(self, taken: Transition, score: npt.NDArray[np.float32] | None = None) -> None:
        """Take a step.

        Args:
            taken: From `transition`, of the present state.
            score: float32 (B,), newest scores, NaN where there are none; None while they are asked
                for elsewhere.
        """
        if score is None:
            score = np.where(taken.live, np.float32(np.nan), self.score)
        self.alive, self.kept, self.step, self.score = taken.alive, taken.kept, taken.step, score
        self.live = taken.live & ~taken.ended

    def advance(
        self, keep: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """One step of the live episodes, with one request to the scorer (TPRL eq. 2-6).

        Args:
            keep: bool (B, N), actions; episodes that are not live are left untouched.

        Returns:
            Rewards float32 (B,) and terminated bool (B,), zero and False where not live.

        Raises:
            ScoringError: If the scorer fails; the state is then as before the call.
        """
        rules, taken = self.rules, self.transition(keep)
        live, wanted = taken.live, taken.wanted
        score = np.where(live, np.float32(np.nan), self.score)
        if wanted.any():
            score[wanted] = self._ask_scorer(self.samples[wanted], taken.alive[wanted])
        previous = self.score if rules.score_steps == "all" else self.full
        gained = rewards.step_reward(
            np.where(wanted, score, 0.0),
            np.where(wanted, previous, 0.0),
            np.where(live, taken.kept, 1),
            np.where(live, self.kept, 1),
            rules.alpha,
            rules.beta,
        )
        self.take(taken, score)
        return np.where(live, gained, np.float32(0.0)), taken.ended

    def _ask_scorer(
        self, samples: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Scores of one request; whatever the scorer raises arrives as a `ScoringError`."""
        name = getattr(self.scorer, "__name__", type(self.scorer).__name__)
        with NamedFailures(samples, self.source, name):
            scores = self.scorer(samples, keep)
        return check_scores(scores, samples, self.source, scorer=name)

    def observation(self) -> Observation:
        """Observations of all episodes, (B, ...) arrays that the caller owns.

        Codes and questions are looked up here, once per episode: a rollout that only needs masks
        does not pay for them.
        """
        if self._unseen.any():
            self._look_up(np.flatnonzero(self._unseen))
        budget = None if self.rules.budget is None else self.budget
        parts = {name: part.copy() for name, part in self._looked_up.items()}
        return parts | progress(self.alive, self.step, budget, masks=np.int8)

    def _look_up(self, slots: npt.NDArray[np.int64]) -> None:
        """Read codes and questions of episodes that began after the last observation."""
        found = look_up(self.source, self.samples[slots], self.rules.query, masks=np.int8)
        for name, part in found.items():
            if name not in self._looked_up:
                self._looked_up[name] = np.zeros((self.count, *part.shape[1:]), part.dtype)
            self._looked_up[name][slots] = part
        self._unseen[slots] = False

    def info(self) -> dict[str, tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]:
        """Information of all episodes: name -> (values (B, ...), bool (B,) where it is known)."""
        everywhere = np.ones(self.count, bool)
        names = np.array([self.source.id(int(sample)) for sample in self.samples], object)
        known = ~np.isnan(self.score)
        table = {
            "sample": (self.samples.copy(), everywhere),
            "id": (names, everywhere),
            "kept": (self.kept.copy(), everywhere),
            "keep_ratio": (self.kept / self.existing.sum(axis=1), everywhere),
            "score": (np.where(known, self.score, 0.0).astype(np.float64), known),
            "full_score": (self.full.astype(np.float64), everywhere),
            "mask": (self.alive.copy(), everywhere),
        }
        if self.rules.budget is not None:
            table["budget"] = (self.budget.copy(), everywhere)
        return table


def _replaced(
    old: npt.NDArray[Any], slots: npt.NDArray[np.int64], new: npt.ArrayLike
) -> npt.NDArray[Any]:
    """A copy with other values in some rows."""
    changed = old.copy()
    changed[slots] = new
    return changed
