"""Budgets: a count of visual tokens, or a share of those that may be dropped."""

from __future__ import annotations

import math

import numpy as np

from tprl_env.checks import quoted

Budget = int | float
"""A whole number of tokens, or a float in (0, 1], a share of the droppable ones."""


def check_budget(budget: object) -> None:
    """Refuse what is neither a count nor a share.

    Raises:
        ValueError: It is something else.
    """
    count = isinstance(budget, (int, np.integer)) and not isinstance(budget, bool)
    if count and int(budget) >= 0:  # type: ignore[call-overload]
        return
    if is_share(budget):
        return
    raise ValueError(
        f"budget must be a count of visual tokens (a whole number of at least 0) or a share of "
        f"them (a float above 0 and at most 1), got {quoted(budget)}"
    )


def is_share(budget: object) -> bool:
    """Whether a budget is a share; 1.0 counts as one, 1 does not."""
    return isinstance(budget, (float, np.floating)) and 0.0 < float(budget) <= 1.0


def tokens_of(budget: Budget, droppable: int) -> int:
    """Tokens that a budget leaves of ``droppable`` ones.

    A share is rounded to the nearest count, halves up, and is at least one token; a count above
    ``droppable`` keeps all.
    """
    if isinstance(budget, (float, np.floating)):
        wanted = max(1, math.floor(float(budget) * droppable + 0.5))
    else:
        wanted = int(budget)
    return min(wanted, droppable)
