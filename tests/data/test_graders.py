from __future__ import annotations

import pytest

from tprl_env.data.graders import GRADERS, exact, grade, normalise, normalise_vqa, vqa


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" Yes. ", "yes"), ("A  red\nball!", "a red ball"), ("3 7 1", "3 7 1"), ("...", "")],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red ball.", "red ball"),
        ("Two dogs", "2 dogs"),
        ("3.5", "3.5"),
        ("1,000", "1000"),
        ("yes, please", "yes please"),
        ("7.", "7"),
        ("a", ""),
    ],
)
def test_normalise_vqa(text, expected):
    assert normalise_vqa(text) == expected


def test_exact_accepts_any_reference_and_nothing_less():
    assert exact("Yes.", ["no", "yes"]) == 1.0
    assert exact("yes it is", ["yes"]) == 0.0
    assert exact("", ["yes"]) == 0.0


@pytest.mark.parametrize(
    ("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_vqa_accuracy_with_ten_annotators(matches, expected):
    references = ["red"] * matches + ["blue"] * (10 - matches)
    assert vqa("The red", references) == pytest.approx(expected)


def test_vqa_with_one_reference_is_equality():
    assert vqa("red", ["Red."]) == 1.0
    assert vqa("red", ["blue"]) == 0.0


def test_table_and_errors():
    assert set(GRADERS) == {"exact", "vqa"}
    assert grade("exact", "a", ["A"]) == 1.0
    with pytest.raises(ValueError, match="unknown grader 'bleu'; known: exact, vqa"):
        grade("bleu", "a", ["a"])
    with pytest.raises(ValueError, match="without a reference"):
        grade("vqa", "a", [])
