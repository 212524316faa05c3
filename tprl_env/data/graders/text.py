"""Short answers in free text: equality, and the agreement with ten people of VQA."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
# those whose letters alone are no other word
_CONTRACTIONS = {
    word.replace("'", ""): word
    for word in (
        *("ain't", "aren't", "can't", "couldn't", "didn't", "doesn't", "don't", "hadn't"),
        *("hasn't", "haven't", "isn't", "mightn't", "mustn't", "needn't", "shouldn't", "wasn't"),
        *("weren't", "won't", "wouldn't", "could've", "might've", "should've", "would've"),
        *("i've", "you've", "they've", "we've", "he's", "she's", "it'll", "that's", "there's"),
        *("they're", "you're", "what's", "where's", "who's", "how's", "let's", "o'clock", "y'all"),
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

    A full stop between digits stays ("3.5"), a comma there vanishes ("1,000" is "1000"), and a
    contraction that lacks its apostrophe gets it ("dont" is "don't").
    """
    words = _OTHER_PUNCTUATION.sub(" ", _THOUSANDS.sub("", text.lower())).split()
    known = {**_NUMBER_WORDS, **_CONTRACTIONS}
    return " ".join(known.get(word, word) for word in words if word not in _ARTICLES)


def exact(answer: str, references: Sequence[str]) -> float:
    """1.0 when the normalised answer equals any normalised reference, else 0.0.

    Raises:
        ValueError: There is no reference.
    """
    need_references(references)
    return float(normalise(answer) in {normalise(reference) for reference in references})


def vqa(answer: str, references: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): mean over leave-one-out sets of ``min(1, matches / 3)``.

    With a single reference there is nothing to leave out, and the score is plain equality.

    Raises:
        ValueError: There is no reference.
    """
    need_references(references)
    given = normalise_vqa(answer)
    equal = [normalise_vqa(reference) == given for reference in references]
    if len(equal) == 1:
        return float(equal[0])
    total = sum(equal)
    return sum(min(1.0, (total - left_out) / 3) for left_out in equal) / len(equal)


def need_references(references: Sequence[str]) -> None:
    """Refuse an empty list of references.

    Raises:
        ValueError: It is empty.
    """
    if not references:
        raise ValueError("an answer cannot be graded without a reference; pass at least one")
