"""Answers out of a small set: the letter of an option, yes or no."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tprl_env.data.graders.text import need_references, normalise

_LETTER = re.compile(r"^\(?([A-Z])(?:[).:,]|\s*$)")
_LEAD = re.compile(
    r"^(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?\s*:?\s*", re.IGNORECASE
)


def chosen_letter(answer: str) -> str:
    """The capital letter that an answer begins with: "B", "(B)", "B. a cat", "Answer: B".

    Empty where there is none: "A cat" begins with a word, not with the letter of an option.
    """
    text = _LEAD.sub("", answer.strip())
    text = text.upper() if len(text) == 1 else text
    found = _LETTER.match(text)
    return found[1] if found else ""


def letter(answer: str, references: Sequence[str]) -> float:
    """1.0 where the answer's letter is one of the references.

    Raises:
        ValueError: There is no reference.
    """
    need_references(references)
    return float(chosen_letter(answer) in {reference.strip().upper() for reference in references})


def said_yes_or_no(answer: str) -> str:
    """The first word of an answer where it is "yes" or "no", else empty.

    MME and POPE count an answer that says neither as wrong.
    """
    words = normalise(answer).split()
    return words[0] if words and words[0] in ("yes", "no") else ""


def yes_no(answer: str, references: Sequence[str]) -> float:
    """1.0 where the answer says the reference's "yes" or "no".

    Raises:
        ValueError: There is no reference.
    """
    need_references(references)
    said = said_yes_or_no(answer)
    return float(bool(said) and said in {normalise(reference) for reference in references})
