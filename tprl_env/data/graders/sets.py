"""What a benchmark makes of all its answers: means, pairs, splits, rotations, captions.

Every function takes the graded answers of one benchmark and returns named figures, the one that
papers print first. Shares are in percent, MME's sums in its own points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tprl_env.data.graders.choices import said_yes_or_no
from tprl_env.data.graders.cider import cider

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark"),
    *("artwork", "OCR"),
)
"""MME's categories of perception, 200 points each; the other four are cognition."""

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


@dataclass(frozen=True)
class Graded:
    """One answer.

    Attributes:
        answer: Its text.
        references: Accepted answers.
        score: By the benchmark's grader, in [0, 1].
        category: The benchmark's own, empty where it has none.
        group: What counts together: MME's pictures, MMBench's rotations; empty for single answers.
    """

    answer: str
    references: tuple[str, ...]
    score: float
    category: str = ""
    group: str = ""


Metric = Callable[[Sequence[Graded]], dict[str, float]]


def mean(rows: Sequence[Graded]) -> dict[str, float]:
    """The mean score.

    Raises:
        ValueError: There is no answer.
    """
    _need(rows)
    return {"accuracy": 100 * _mean(row.score for row in rows)}


def by_category(rows: Sequence[Graded]) -> dict[str, float]:
    """The mean score, and that of every category."""
    found = mean(rows)
    for category in sorted({row.category for row in rows} - {""}):
        found[f"accuracy {category}"] = 100 * _mean(
            row.score for row in rows if row.category == category
        )
    return found


def mme(rows: Sequence[Graded]) -> dict[str, float]:
    """MME's points of its categories, and their sums.

    A category has 100 times the accuracy plus 100 times the share of pictures with both questions
    right; perception is the sum over ten categories, cognition over four.

    Raises:
        ValueError: A category is unknown, or a picture has not two questions.
    """
    _need(rows)
    points = {}
    for category in sorted({row.category for row in rows}):
        if category not in (*PERCEPTION, *COGNITION):
            raise ValueError(f"{category!r} is no category of MME")
        own = [row for row in rows if row.category == category]
        pairs = _groups(own)
        odd = [name for name, pair in pairs.items() if len(pair) != 2]
        if odd:
            raise ValueError(
                f"MME's picture {odd[0]!r} has {len(pairs[odd[0]])} questions here, not 2; keep "
                f"pairs together, with an even limit"
            )
        both = _mean(float(all(row.score == 1.0 for row in pair)) for pair in pairs.values())
        points[category] = 100 * _mean(row.score for row in own) + 100 * both
    return {
        "perception": sum(points.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(points.get(name, 0.0) for name in COGNITION),
        **points,
    }


def pope(rows: Sequence[Graded]) -> dict[str, float]:
    """POPE: F1 of "yes", mean over the splits; accuracy, precision, recall and the share of yes.

    An answer that says neither counts as "no", as in the authors' code.
    """
    _need(rows)
    splits = [
        _yes_against_no([row for row in rows if row.category == name])
        for name in sorted({row.category for row in rows})
    ]
    found = {name: _mean(split[name] for split in splits) for name in splits[0]}
    return {**found, "F1 pooled": _yes_against_no(rows)["F1"]}


def circular(rows: Sequence[Graded]) -> dict[str, float]:
    """MMBench's CircularEval: a question counts where every rotation of its options is right."""
    _need(rows)
    groups = _groups(rows)
    whole = _mean(float(all(row.score == 1.0 for row in group)) for group in groups.values())
    return {"circular": 100 * whole, "accuracy": 100 * _mean(row.score for row in rows)}


def captions(rows: Sequence[Graded]) -> dict[str, float]:
    """CIDEr-D over all pictures, times 100 as papers print it."""
    _need(rows)
    scores = cider([row.answer for row in rows], [row.references for row in rows])
    return {"CIDEr": 100 * _mean(scores)}


def _yes_against_no(rows: Sequence[Graded]) -> dict[str, float]:
    said = np.array([said_yes_or_no(row.answer) == "yes" for row in rows])
    wanted = np.array([row.references[0].strip().lower() == "yes" for row in rows])
    right = int((said & wanted).sum())
    precision = right / said.sum() if said.any() else 0.0
    recall = right / wanted.sum() if wanted.any() else 0.0
    both = precision + recall
    return {
        "F1": 100 * (2 * precision * recall / both if both else 0.0),
        "accuracy": 100 * float((said == wanted).mean()),
        "precision": 100 * float(precision),
        "recall": 100 * float(recall),
        "yes": 100 * float(said.mean()),
    }


def _groups(rows: Sequence[Graded]) -> dict[str, list[Graded]]:
    found: dict[str, list[Graded]] = {}
    for row in rows:
        found.setdefault(row.group, []).append(row)
    return found


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _need(rows: Sequence[Graded]) -> None:
    if not rows:
        raise ValueError("there is no answer to grade; got 0, expected at least 1")
