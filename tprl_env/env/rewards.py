"""Transition, reward and termination of the token-pruning MDP (TPRL eq. 2-6) as pure functions.

Legend: B batch, N visual tokens, T steps. ``alive`` is m_t, ``keep`` is a_t, ``kept`` is K_t.
Everything is numpy and broadcasts over leading axes.

Simplification against the paper: the paper always averages a reward over its mini-batch; here that
is one explicit function, `batch_mean_reward`, and the default reward belongs to one sample.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = [
    "SCORE_STEPS",
    "advance",
    "batch_mean_reward",
    "episode_rewards",
    "is_terminal",
    "needs_score",
    "step_budgets",
    "step_reward",
]

SCORE_STEPS: tuple[str, ...] = ("all", "final")


def advance(alive: npt.ArrayLike, keep: npt.ArrayLike) -> npt.NDArray[np.bool_]:
    """Next state of the mask, m_{t+1} = m_t AND a_t (TPRL eq. 2, 3): a pruned token never returns.

    Args:
        alive: bool (..., N), tokens still in play.
        keep: bool (..., N), the action; entries of dead tokens have no effect.

    Returns:
        bool (..., N), a new array.

    Raises:
        ValueError: If one of them is not boolean or the shapes differ.
    """
    alive, keep = np.asarray(alive), np.asarray(keep)
    if alive.dtype != np.bool_ or keep.dtype != np.bool_ or alive.shape != keep.shape:
        raise ValueError(
            "alive and keep must be boolean arrays of one shape, got "
            f"{alive.dtype}{alive.shape} and {keep.dtype}{keep.shape}"
        )
    return np.logical_and(alive, keep)


def step_reward(
    score: npt.ArrayLike,
    previous_score: npt.ArrayLike,
    kept: npt.ArrayLike,
    kept_before: npt.ArrayLike,
    alpha: float = 1.0,
    beta: float = 0.1,
) -> npt.NDArray[np.float32]:
    """Reward of one step (TPRL eq. 4-6).

    r_t = alpha * [Score(m_{t+1}) - Score(m_t)] + beta * (1 - K_{t+1} / K_t)

    Args:
        score: (...), Score(m_{t+1}) in [0, 1].
        previous_score: (...), Score(m_t) in [0, 1]; at t = 0 the score with all tokens.
        kept: (...), K_{t+1}; 0 is legal, the LVLM then answers from the text alone.
        kept_before: (...), K_t, at least 1, because an episode ends at K = 0.
        alpha: Weight of the task term.
        beta: Weight of the pruning term.

    Returns:
        float32 (...).

    Raises:
        ValueError: If a count before the step is below 1 or grows during the step.
    """
    after, before = np.asarray(kept, np.float64), np.asarray(kept_before, np.float64)
    if np.any(before < 1):
        raise ValueError(
            f"kept_before must be at least 1, got {before.min():g}: "
            "an episode without tokens has ended"
        )
    if np.any(after < 0) or np.any(after > before):
        raise ValueError("kept must lie in [0, kept_before], because a pruned token never returns")
    task = np.asarray(score, np.float64) - np.asarray(previous_score, np.float64)
    return np.asarray(alpha * task + beta * (1.0 - after / before), np.float32)


def is_terminal(
    kept: npt.ArrayLike, step: npt.ArrayLike, max_steps: int = 3, min_tokens: int = 1
) -> npt.NDArray[np.bool_]:
    """Whether an episode has ended: after T_max steps (TPRL sec. 4.1) or with K <= ``min_tokens``.

    Args:
        kept: (...), tokens kept now.
        step: (...), number of steps taken so far.
        max_steps: T_max.
        min_tokens: The count at which there is nothing left to decide.

    Returns:
        bool (...). The end is a termination, never a truncation: the step is in the observation.
    """
    return np.asarray((np.asarray(kept) <= min_tokens) | (np.asarray(step) >= max_steps))


def needs_score(
    live: npt.ArrayLike, ended: npt.ArrayLike, score_steps: str
) -> npt.NDArray[np.bool_]:
    """Whose mask must be scored after a step: every one, or only the last of an episode.

    Args:
        live: bool (...), episodes that took the step.
        ended: bool (...), those of them that it ended.
        score_steps: "all" or "final".

    Returns:
        bool (...).

    Raises:
        ValueError: For an unknown ``score_steps``.
    """
    if score_steps not in SCORE_STEPS:
        raise ValueError(f"score_steps must be one of {SCORE_STEPS}, got {score_steps!r}")
    live, ended = np.asarray(live, bool), np.asarray(ended, bool)
    return live if score_steps == "all" else live & ended


def batch_mean_reward(rewards: npt.ArrayLike, live: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """Shared reward of one mini-batch: the mean over the episodes that took the step (TPRL eq. 4).

    Args:
        rewards: (..., B), rewards per episode; entries that are not live are ignored.
        live: bool (..., B), episodes that took the step.

    Returns:
        float32 (..., B): the mean over the live entries of the last axis where live, 0 elsewhere.

    Raises:
        ValueError: If the shapes differ.
    """
    live = np.asarray(live, bool)
    values = np.asarray(rewards, np.float64)
    if values.shape != live.shape:
        raise ValueError(f"rewards {values.shape} and live {live.shape} must have the same shape")
    total = np.where(live, values, 0.0).sum(axis=-1, keepdims=True)
    mean = total / np.maximum(live.sum(axis=-1, keepdims=True), 1)
    return np.where(live, mean, 0.0).astype(np.float32)


def episode_rewards(
    scores: npt.ArrayLike,
    full: npt.ArrayLike,
    kept: npt.ArrayLike,
    live: npt.ArrayLike,
    alpha: float = 1.0,
    beta: float = 0.1,
    score_steps: str = "all",
) -> npt.NDArray[np.float32]:
    """Rewards of whole episodes, for a rollout that is scored after its last step (TPRL eq. 4-6).

    With ``score_steps="final"`` the task term is zero before the last step and telescopes there:
    alpha * [Score(m_T) - Score(m_0)], the same undiscounted return as ``"all"`` for a third of
    the scores.

    Args:
        scores: (T, B), Score(m_{t+1}); entries that are not needed may hold anything, also NaN.
        full: (B,), Score(m_0), the score with all tokens.
        kept: (T + 1, B), K_0 ... K_T.
        live: bool (T, B), steps that were taken; a prefix of each column.
        alpha: Weight of the task term.
        beta: Weight of the pruning term.
        score_steps: "all" or "final".

    Returns:
        float32 (T, B), 0 where a step was not taken.

    Raises:
        ValueError: On shapes that do not fit, an episode with a step after its end, or an unknown
            ``score_steps``.
    """
    scores, full = np.asarray(scores, np.float64), np.asarray(full, np.float64)
    counts, live = np.asarray(kept), np.asarray(live, bool)
    _check_episodes(scores, full, counts, live)
    following = np.concatenate([live[1:], np.zeros_like(live[:1])])
    scored = needs_score(live, live & ~following, score_steps)
    if score_steps == "all":
        before = np.concatenate([full[None], scores[:-1]])
    else:
        before = np.broadcast_to(full, scores.shape)
    return np.where(
        live,
        step_reward(
            np.where(scored, scores, 0.0),
            np.where(scored, before, 0.0),
            np.where(live, counts[1:], 1),
            np.where(live, counts[:-1], 1),
            alpha,
            beta,
        ),
        np.float32(0.0),
    )


def _check_episodes(
    scores: npt.NDArray[np.float64],
    full: npt.NDArray[np.float64],
    kept: npt.NDArray[np.generic],
    live: npt.NDArray[np.bool_],
) -> None:
    """Refuse a rollout whose parts do not belong together."""
    if scores.ndim != 2 or scores.shape[0] < 1:
        raise ValueError(f"scores must have shape (T, B) with T >= 1, got {scores.shape}")
    steps, batch = scores.shape
    wanted = {"full": (batch,), "kept": (steps + 1, batch), "live": (steps, batch)}
    for name, array in (("full", full), ("kept", kept), ("live", live)):
        if array.shape != wanted[name]:
            raise ValueError(
                f"{name} must have shape {wanted[name]} for scores {scores.shape}, "
                f"got {array.shape}"
            )
    if np.any(live[1:] & ~live[:-1]):
        column = int(np.argwhere(live[1:] & ~live[:-1])[0, 1])
        raise ValueError(f"live must be a prefix of each episode, but episode {column} continues")


def step_budgets(
    num_tokens: npt.ArrayLike, budget: npt.ArrayLike, steps: int
) -> npt.NDArray[np.int64]:
    """Tokens to keep after each step so that equal ratios lead from N to the budget.

    k_t = round(N * (k / N)^(t / T)) for t = 1 ... T, so the last entry is the budget exactly.

    Args:
        num_tokens: int (...), tokens alive before the first step.
        budget: int (...), wanted count at the end, in [1, num_tokens].
        steps: Number of steps T, at least 1.

    Returns:
        int64 (..., steps), never growing and never below the budget.

    Raises:
        ValueError: If ``steps`` < 1 or a budget lies outside [1, num_tokens].
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    total, wanted = np.broadcast_arrays(np.asarray(num_tokens), np.asarray(budget))
    if np.any(wanted < 1) or np.any(wanted > total):
        raise ValueError(f"budget must lie in [1, num_tokens], got {wanted} of {total} tokens")
    exponent = np.arange(1, steps + 1) / steps
    ratio = wanted / total
    counts = np.rint(total[..., None] * ratio[..., None] ** exponent).astype(np.int64)
    counts[..., -1] = wanted
    return np.maximum(counts, wanted[..., None])
