"""Confidence intervals: of a share, of a mean, of a paired difference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from tprl_env.env.scorer import FloatArray

if TYPE_CHECKING:
    pass


Z95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution


def wilson_interval(successes: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion.

    Args:
        successes: Number of ones.
        total: Number of trials.

    Raises:
        ValueError: There are no trials, or more successes than trials.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(
            f"an interval needs 0 <= successes <= total and total >= 1, got {successes} of {total}"
        )
    p, z2 = successes / total, Z95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    # At 0 and 1 the bound is exact; rounding must not leave it a hair inside.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return low, high


def mean_interval(scores: FloatArray) -> tuple[float, float]:
    """95 % interval of a mean score: Wilson for 0/1 scores, normal otherwise.

    Args:
        scores: ``(S,)`` in [0, 1].
    """
    if np.all((scores == 0) | (scores == 1)):
        return wilson_interval(float(scores.sum()), len(scores))
    mean = float(scores.mean())
    half = Z95 * float(scores.std(ddof=1)) / math.sqrt(len(scores)) if len(scores) > 1 else 1.0
    return max(0.0, mean - half), min(1.0, mean + half)


def paired_difference(first: FloatArray, second: FloatArray) -> tuple[float, float, float]:
    """Mean of ``first - second`` over the same questions, with its 95 % interval.

    Args:
        first: Scores of one method, ``(S,)``.
        second: Scores of another method on the same questions, ``(S,)``.

    Returns:
        Mean difference, lower and upper bound.

    Raises:
        ValueError: The arrays differ in length or are empty.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(
            f"paired scores must have the same length >= 1, got {first.shape} and {second.shape}"
        )
    delta = first.astype(np.float64) - second
    half = Z95 * float(delta.std(ddof=1)) / math.sqrt(len(delta)) if len(delta) > 1 else 1.0
    mean = float(delta.mean())
    return mean, mean - half, mean + half
