"""CIDEr-D (Vedantam et al. 2015) of captions, equal to the COCO evaluation's on the same words."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from tprl_env.data.graders.text import normalise

_LONGEST, _SIGMA, _SCALE = 4, 6.0, 10.0
Grams = Counter[tuple[str, ...]]


def words_of(caption: str) -> list[str]:
    """Lower-case words without punctuation; COCO's own tokenizer is a Java program."""
    return normalise(caption).split()


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption; how rare words are is counted over all pictures' references.

    Args:
        captions: One per picture.
        references: Per picture its captions by people.

    Returns:
        A number per picture, 0 to 10; the benchmark reports their mean.

    Raises:
        ValueError: Lengths differ, there is no picture, or one has no reference.
    """
    if len(captions) != len(references) or not captions or not all(references):
        raise ValueError(
            f"CIDEr needs references for every caption, got {len(captions)} captions and "
            f"{len(references)} lists of references"
        )
    known = [[_grams(words_of(text)) for text in texts] for texts in references]
    frequency = Counter(gram for texts in known for gram in set().union(*texts))
    rarity = math.log(len(captions))

    def vector(grams: Grams) -> list[dict[tuple[str, ...], float]]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(_LONGEST)]
        for gram, count in grams.items():
            weight = rarity - math.log(max(1.0, frequency[gram]))
            parts[len(gram) - 1][gram] = count * weight
        return parts

    found = []
    for caption, texts in zip(captions, known, strict=True):
        own = _grams(words_of(caption))
        mine, total = vector(own), 0.0
        for text in texts:
            gap = _length(own) - _length(text)
            penalty = math.exp(-(gap**2) / (2 * _SIGMA**2))
            total += penalty * sum(map(_similarity, mine, vector(text))) / _LONGEST
        found.append(_SCALE * total / len(texts))
    return found


def _grams(words: Sequence[str]) -> Grams:
    return Counter(
        tuple(words[at : at + size])
        for size in range(1, _LONGEST + 1)
        for at in range(len(words) - size + 1)
    )


def _length(grams: Grams) -> int:
    """Pairs of neighbours, which is what the COCO evaluation takes for the length."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _similarity(first: dict[tuple[str, ...], float], second: dict[tuple[str, ...], float]) -> float:
    """Cosine with the caption's weights cut at the reference's."""
    norm = math.hypot(*first.values()) * math.hypot(*second.values())
    shared = sum(min(w, second[gram]) * second[gram] for gram, w in first.items() if gram in second)
    return shared / norm if norm else 0.0
