from __future__ import annotations

import pytest

from tprl_env.data.graders import GRADERS, exact, grade, normalise, normalise_vqa, sets, vqa
from tprl_env.data.graders.boxes import intersection_over_union, read_box
from tprl_env.data.graders.choices import chosen_letter
from tprl_env.data.graders.cider import cider
from tprl_env.data.graders.sets import Graded


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


def test_contractions_get_their_apostrophe_and_other_words_keep_their_letters():
    assert normalise_vqa("Dont know") == "don't know" == normalise_vqa("don't know")
    assert normalise_vqa("its well") == "its well"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        *(("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B. a cat", "B"), ("B: cat", "B")),
        *(("Answer: C", "C"), ("The answer is D.", "D"), ("The correct option is A", "A")),
        *(("A cat", ""), ("Blue", ""), ("", ""), ("12", "")),
    ],
)
def test_the_letter_of_an_option(answer, expected):
    assert chosen_letter(answer) == expected
    assert grade("letter", answer, ["B"]) == float(expected == "B")


def test_yes_and_no_are_first_words():
    assert grade("yes_no", "Yes, there is.", ["yes"]) == 1.0
    assert grade("yes_no", "No", ["Yes"]) == 0.0
    assert grade("yes_no", "there is", ["yes"]) == 0.0 == grade("yes_no", "yesterday", ["yes"])


def test_boxes_overlap_by_hand():
    # 2 x 2 and 2 x 2 that share 1 x 2: 2 / (4 + 4 - 2)
    assert intersection_over_union((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert intersection_over_union((0, 0, 2, 2), (2, 0, 4, 2)) == 0.0
    assert intersection_over_union((2, 2, 0, 0), (0, 0, 2, 2)) == 0.0
    assert read_box("[0.1, 0.25, .5, 1]") == (0.1, 0.25, 5.0, 1.0)
    assert grade("box", "the box is [0, 0, 1.0, 0.9]", ["0 0 1 1"]) == 1.0
    assert grade("box", "[0, 0, 1.0, 0.4]", ["0 0 1 1"]) == 0.0 == grade("box", "left", ["0 0 1 1"])
    with pytest.raises(ValueError, match="must be four numbers"):
        grade("box", "0 0 1 1", ["left"])


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        *(("The result is 1,234.", "1234", 1.0), ("so 3.14159", "3.14", 1.0), ("3.2", "3.14", 0.0)),
        *(("-2", "-2", 1.0), ("two", "2", 0.0), ("it is Triangle.", "triangle", 1.0)),
        *(("a rectangle", "triangle", 0.0), ("rectriangle", "triangle", 0.0)),
    ],
)
def test_numbers_and_words_by_rules(answer, reference, score):
    assert grade("number_or_text", answer, [reference]) == score


CAPTIONS = ["a man rides a brown horse", "two dogs play in the snow", "a red car"]
OF_PEOPLE = [
    ["a man rides a horse", "a man on a brown horse"],
    ["two dogs are playing in the snow", "dogs in snow"],
    ["a blue car parked on a street", "a car on the street"],
]


def test_cider_equals_the_coco_evaluation():
    # by pycocoevalcap 1.2's CiderScorer on these words
    assert cider(CAPTIONS, OF_PEOPLE) == pytest.approx([5.35112267, 2.70218874, 0.99504194])
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer(n=4, sigma=6.0)
    for caption, texts in zip(CAPTIONS, OF_PEOPLE, strict=True):
        scorer += (caption, texts)
    assert cider(CAPTIONS, OF_PEOPLE) == pytest.approx(list(scorer.compute_score()[1]))


def test_cider_by_hand():
    # two pictures, one word each: weight log 2 of both words, cosine 1 for the first of four sizes
    assert cider(["cat", "cat"], [["cat"], ["dog"]]) == pytest.approx([10 / 4, 0.0])
    assert cider(["cat"], [["cat"]]) == [0.0]  # a word in every picture tells nothing
    with pytest.raises(ValueError, match="2 captions and 1 lists"):
        cider(["a", "b"], [["a"]])


def rows_of(*scores, category="count", groups=None, answers=None, references=None):
    return [
        Graded(
            answers[i] if answers else "",
            (references[i],) if references else ("yes",),
            score,
            category if isinstance(category, str) else category[i],
            groups[i] if groups else str(i),
        )
        for i, score in enumerate(scores)
    ]


def test_mme_adds_accuracy_and_pairs():
    # count: 3 of 4 right, 1 of 2 pictures whole: 75 + 50; code_reasoning: all right: 200
    rows = rows_of(1, 1, 1, 0, groups="aabb") + rows_of(
        1, 1, category="code_reasoning", groups="cc"
    )
    found = sets.mme(rows)
    assert found == {
        "perception": 125.0,
        "cognition": 200.0,
        "code_reasoning": 200.0,
        "count": 125.0,
    }
    with pytest.raises(ValueError, match="'b' has 1 questions here, not 2"):
        sets.mme(rows[:3])
    with pytest.raises(ValueError, match="'colour' is no category"):
        sets.mme(rows_of(1, 1, category="colour", groups="aa"))


def test_pope_by_split():
    # random: yes said 2, right 1 of 1 wanted; precision .5, recall 1, F1 2/3; popular: F1 0
    rows = rows_of(
        1, 0, 1, 0, 1,
        category=["random", "random", "random", "popular", "popular"],
        answers=["Yes", "yes", "no", "maybe", "No."], references=["yes", "no", "no", "yes", "no"],
    )  # fmt: skip
    found = sets.pope(rows)
    assert found["F1"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert found["precision"] == 25.0 and found["recall"] == 50.0
    assert found["accuracy"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    # pooled: 2 yes said, 1 right, 2 wanted
    assert found["F1 pooled"] == pytest.approx(50.0)


def test_circular_wants_every_rotation():
    rows = rows_of(1, 1, 1, 0, groups="aabb")
    assert sets.circular(rows) == {"circular": 50.0, "accuracy": 75.0}
    assert sets.by_category(rows_of(1, 0, category=["x", "y"])) == {
        **{"accuracy": 50.0, "accuracy x": 100.0, "accuracy y": 0.0}
    }
    for metric in (sets.mean, sets.mme, sets.pope, sets.circular, sets.captions):
        with pytest.raises(ValueError, match="no answer to grade"):
            metric([])


def test_table_and_errors():
    assert set(GRADERS) == {"exact", "vqa", "letter", "yes_no", "box", "number_or_text"}
    assert grade("exact", "a", ["A"]) == 1.0
    with pytest.raises(ValueError, match=r"grader must be one of 'exact', .* got 'exakt'; did you"):
        grade("exakt", "a", ["a"])
    for name in GRADERS:
        with pytest.raises(ValueError, match="without a reference"):
            grade(name, "a", [])
