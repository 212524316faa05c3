"""Graders of free-text answers: pure functions ``(answer, references) -> score in [0, 1]``.

Scoring does not use them yet: encoding and training compare the teacher-forced reference answer,
so encoding refuses samples that ask for anything but ``"exact"``.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d)")
_OTHER_PUNCTUATION = re.compile(r"(?<!\d)[.,]|[.,](?!\d)|[^\w\s.,:'-]")


def normalise(text: str) -> str:
    """Lower-case, remove punctuation, collapse white space (the GQA convention)."""
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def normalise_vqa(text: str) -> str:
    """Normalisation of the VQA-v2 accuracy: case, punctuation, number words, articles.

    A full stop between digits stays ("3.5"), a comma there vanishes ("1,000" is "1000");
    contractions are left as they are written.
    """
    words = _OTHER_PUNCTUATION.sub(" ", _THOUSANDS.sub("", text.lower())).split()
    return " ".join(_NUMBER_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def exact(answer: str, references: Sequence[str]) -> float:
    """1.0 when the normalised answer equals any normalised reference, else 0.0.

    Raises:
        ValueError: There is no reference.
    """
    _need_references(references)
    return float(normalise(answer) in {normalise(reference) for reference in references})


def vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): mean over leave-one-out sets of ``min(1, matches / 3)``.

    With a single reference there is nothing to leave out, and the score is plain equality.

    Raises:
        ValueError: There is no reference.
    """
    _need_references(references)
    given = normalise_vqa(answer)
    equal = [normalise_vqa(reference) == given for reference in references]
    if len(equal) == 1:
        return float(equal[0])
    total = sum(equal)
    return sum(min(1.0, (total - left_out) / 3) for left_out in equal) / len(equal)


GRADERS: dict[str, Callable[[str, Sequence[str]], float]] = {"exact": exact, "vqa": vqa}
"""Grader by the name a ``Sample.grader`` carries."""


def grade(grader: str, answer: str, references: Sequence[str]) -> float:
    """Grade ``answer`` with the grader called ``grader``.

    Raises:
        ValueError: The grader is unknown or there is no reference.
    """
    if grader not in GRADERS:
        raise ValueError(f"unknown grader {grader!r}; known: {', '.join(sorted(GRADERS))}")
    return GRADERS[grader](answer, references)


def _need_references(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("an answer cannot be graded without a reference; pass at least one")
