"""What three simple rules earn in an environment: the numbers to hold a learned policy against.

Legend: B episodes, N = ``max_tokens``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.checks import check_integer
from tprl_env.data.features.source import TokenSource
from tprl_env.env.episodes import Episodes, ScorerLike, choose_episode
from tprl_env.env.rules import EpisodeRules

__all__ = ["reference_returns"]

_AT_ONCE = 64  # episodes in one scorer request: bounds the codes in memory

Rule = Callable[[npt.NDArray[np.bool_]], npt.NDArray[np.bool_]]


def reference_returns(
    source: TokenSource,
    scorer: ScorerLike,
    rules: EpisodeRules,
    episodes: int = 256,
    seed: int = 0,
) -> dict[str, float]:
    """Mean undiscounted returns of fixed rules, played by the environment's own MDP and scorer.

    All rules play the same episodes: passes over the source in random order, so that the mean is
    over every sample alike where ``episodes`` is a multiple of their number.

    Args:
        source: The environment's token source.
        scorer: Its scorer; it is asked for at most ``3 * max_steps`` scores per episode.
        rules: Its settings. Rewards are not averaged over a batch, which leaves the mean unchanged.
        episodes: Episodes per rule.
        seed: Seeds the episodes and the random rule.

    Returns:
        ``keep_all``: no token is ever pruned. ``random``: uniformly drawn actions, each token kept
        with probability 1/2 in each step. ``best_rule``: the first step keeps the relevant tokens
        and nothing else, the later ones keep them; absent where the source does not know the
        relevance of every sample that was played.

    Raises:
        ValueError: If ``episodes`` is below 1 or ``seed`` below 0.
        ScoringError: If the scorer fails.
    """
    check_integer("episodes", episodes, 1)
    generator = np.random.default_rng(check_integer("seed", seed, 0))
    passes = -(-episodes // len(source))
    order = np.concatenate([generator.permutation(len(source)) for _ in range(passes)])[:episodes]
    chosen = [choose_episode(generator, source, rules, sample=int(number)) for number in order]
    totals: dict[str, list[float]] = {"keep_all": [], "random": [], "best_rule": []}
    for start in range(0, episodes, _AT_ONCE):
        samples, budgets = np.array(chosen[start : start + _AT_ONCE], np.int64).T
        played = Episodes(source, scorer, rules, len(samples))
        relevant = _relevant(source, samples)
        if relevant is None:
            totals.pop("best_rule", None)
        for name, rule in _named_rules(generator, relevant).items():
            if name in totals:
                totals[name].extend(_play(played, samples, budgets, rule))
    return {name: float(np.mean(returns)) for name, returns in totals.items()}


def _named_rules(
    generator: np.random.Generator, relevant: npt.NDArray[np.bool_] | None
) -> dict[str, Rule]:
    """The rules as functions from the tokens alive, bool (B, N), to the action, bool (B, N)."""
    named: dict[str, Rule] = {
        "keep_all": lambda alive: alive,
        "random": lambda alive: generator.random(alive.shape) < 0.5,
    }
    if relevant is not None:
        named["best_rule"] = lambda alive: relevant
    return named


def _relevant(source: Any, samples: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
    """Tokens with positive relevance, bool (B, N); None if a sample's relevance is unknown."""
    if not hasattr(source, "relevance"):
        return None
    marked = np.zeros((len(samples), source.max_tokens), bool)
    for row, sample in enumerate(samples):
        values = source.relevance(int(sample))
        if values is None:
            return None
        marked[row, : len(values)] = np.asarray(values) > 0
    return marked


def _play(
    played: Episodes, samples: npt.NDArray[np.int64], budgets: npt.NDArray[np.int64], rule: Rule
) -> npt.NDArray[np.float64]:
    """Undiscounted returns (B,) of one episode per sample under a rule."""
    played.start(np.arange(len(samples)), samples, budgets)
    returns = np.zeros(len(samples))
    while played.live.any():
        returns += played.advance(rule(played.alive))[0]
    return returns
