"""Graders of answers in free text: pure functions ``(answer, references) -> score in [0, 1]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tprl_env.checks import check_choice
from tprl_env.data.graders.boxes import box
from tprl_env.data.graders.choices import letter, yes_no
from tprl_env.data.graders.maths import number_or_text
from tprl_env.data.graders.text import exact, normalise, normalise_vqa, vqa

__all__ = ["GRADED_TOKENS", "GRADERS", "exact", "grade", "normalise", "normalise_vqa", "vqa"]

GRADED_TOKENS = 20
"""Longest answer that encoding and scoring let an LVLM write to be graded."""

GRADERS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "vqa": vqa,
    "letter": letter,
    "yes_no": yes_no,
    "box": box,
    "number_or_text": number_or_text,
}
"""Grader by the name a ``Sample.grader`` carries."""


def grade(grader: str, answer: str, references: Sequence[str]) -> float:
    """Grade ``answer`` with the grader called ``grader``.

    Raises:
        ValueError: The grader is unknown or there is no reference.
    """
    check_choice("grader", grader, GRADERS)
    return GRADERS[grader](answer, references)
