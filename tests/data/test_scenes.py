import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from tprl_env.data import scenes
from tprl_env.data.scenes import (
    CELL_NAMES,
    COLOR_NAMES,
    COLUMNS,
    PHOTO_BANDS,
    QUESTION_TYPES,
    ROWS,
    SPLITS,
    SceneWorld,
    ask,
    load_scenes,
    scan_indices,
    seed_sequence,
)


@pytest.fixture(scope="module")
def world():
    return SceneWorld("crowded", "calibration", seed=3, warps=1)


def test_splits_share_no_scan_no_photo_column_and_no_seed():
    scans = [set(scan_indices(split).tolist()) for split in SPLITS]
    assert [len(s) for s in scans] == [1197, 240, 360]
    assert len(set.union(*scans)) == 1797
    columns = [set(range(*PHOTO_BANDS[split])) for split in SPLITS]
    assert len(set.union(*columns)) == sum(len(c) for c in columns) == 640
    states = {
        tuple(seed_sequence(task, split, seed, stream).generate_state(4))
        for task in ("crowded", "sparse")
        for split in SPLITS
        for seed in range(5)
        for stream in range(2)
    }
    assert len(states) == 2 * 3 * 5 * 2


def test_the_arguments_determine_the_samples():
    first, again = (load_scenes("sparse", "test", 5, 4, seed=2) for _ in range(2))
    longer = load_scenes("sparse", "test", 40, 4, seed=2)
    for a, b, c in zip(first, again, longer[:20], strict=True):
        assert (a.id, a.question, a.answers) == (b.id, b.question, b.answers)
        assert (a.id, a.question, a.answers) == (c.id, c.question, c.answers)
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.image, c.image)
        np.testing.assert_array_equal(a.relevance, b.relevance)
    other = load_scenes("sparse", "test", 5, 4, seed=3)
    assert not np.array_equal(first[0].image, other[0].image)


def test_samples_have_the_documented_form():
    samples = load_scenes("crowded", "test", 13, 6)
    assert samples[12 * 6 + 3].id == "crowded-test-00012-3"
    assert len({s.id for s in samples}) == len(samples) == 78
    assert len({s.image_id for s in samples}) == 13
    for sample in samples:
        assert sample.image.shape == (96, 96, 3)
        assert sample.relevance.shape == (144,) and sample.relevance.dtype == np.float32
        assert set(np.unique(sample.relevance)) <= {0.0, 4.0, 10.0}


@pytest.mark.parametrize("per_scene", [1, 4, 6])
def test_kinds_are_balanced(per_scene):
    counts = Counter(s.question_type for s in load_scenes("sparse", "calibration", 12, per_scene))
    assert set(counts) <= set(QUESTION_TYPES) and len(counts) == 6
    assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize(
    ("task", "digits", "decoys"), [("crowded", (16, 24), (0, 4)), ("sparse", (5, 8), (4, 8))]
)
def test_scenes_have_the_task_s_numbers_of_objects(task, digits, decoys):
    _, classes, colors = SceneWorld(task, "calibration", warps=1).batch(64)
    counted = [(classes < 10).sum((1, 2)), (classes == scenes.DECOY).sum((1, 2))]
    assert [(c.min(), c.max()) for c in counted] == [digits, decoys]
    assert ((colors == scenes.NO_COLOR) == (classes == scenes.BACKGROUND)).all()


def _solve(text, classes, colors):
    """Answer a question from the scene's truth, independently of how it was drawn."""
    words, flat, tint = text.split(), classes.reshape(-1), colors.reshape(-1)
    named = [CELL_NAMES.index(w) for w in words if w in CELL_NAMES]
    if words[0] == "read":
        return " ".join(str(flat[c]) for c in named)
    if "larger" in words:
        return str(max(flat[c] for c in named))
    if "at" in words:
        return str(flat[named[0]]) if words[1] == "digit" else COLOR_NAMES[tint[named[0]]]
    line, is_row = words[-2], words[-3] == "row"
    inside = [c for c in range(36) if (ROWS[c // 6] if is_row else COLUMNS[c % 6]) == line]
    color = COLOR_NAMES.index(next(w for w in words if w in COLOR_NAMES))
    found = [c for c in inside if flat[c] < 10 and tint[c] == color]
    if words[0] == "is":
        return "yes" if found else "no"
    assert len(found) == 1
    return str(flat[found[0]])


def test_answers_follow_from_the_scene(world):
    _, classes, colors = world.batch(20)
    rng = np.random.default_rng(0)
    for i in range(20):
        for question in ask(classes[i], colors[i], 24, rng, QUESTION_TYPES):
            assert question.answer == _solve(question.text, classes[i], colors[i])


def test_relevance_does_not_see_the_digits(world):
    _, classes, colors = world.batch(8)
    for i in range(8):
        shuffled = np.where(classes[i] < 10, (classes[i] + 3) % 10, classes[i])
        before = ask(classes[i], colors[i], 24, np.random.default_rng(i), QUESTION_TYPES)
        after = ask(shuffled, colors[i], 24, np.random.default_rng(i), QUESTION_TYPES)
        for a, b in zip(before, after, strict=True):
            assert a.text == b.text
            np.testing.assert_array_equal(a.relevance, b.relevance)


def test_relevance_marks_the_asked_cells_and_the_line_of_exists():
    classes, colors = np.full((6, 6), 11), np.full((6, 6), 8)
    for (row, column), digit, color in (((2, 0), 5, 0), ((2, 3), 7, 1), ((4, 4), 1, 0)):
        classes[row, column], colors[row, column] = digit, color
    rng = np.random.default_rng(0)
    for question in ask(classes, colors, 60, rng, ["exists"]):
        if question.text == "is there a red digit in row c ?":
            grid = question.relevance.reshape(12, 12)
            assert grid[4:6, 0:2].tolist() == [[10, 10], [10, 10]]
            assert grid[4:6, 6:8].tolist() == [[4, 4], [4, 4]]
            assert grid.sum() == 56
            break
    else:
        pytest.fail("the question was never drawn")
    read = ask(classes, colors, 1, rng, ["read"])[0]
    assert sorted(read.cells) == [12, 15, 28] and read.relevance.sum() == 120


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("dense", "test", 1), "task must be one of 'crowded', 'sparse', got 'dense'"),
        (("sparse", "val", 1), "split must be one of 'train', 'calibration', 'test', got 'val'"),
        (("sparse", "test", 0), "scenes must be at least 1, got 0"),
        (("sparse", "test", 1, 0), "questions_per_scene must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_scenes(*arguments)


def test_ask_refuses_unknown_kinds_and_empty_scenes(world):
    _, classes, colors = world.batch(1)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="question_types must be one of 'at', 'color'"):
        ask(classes[0], colors[0], 1, rng, ["count"])
    with pytest.raises(ValueError, match="at least 3 digits"):
        ask(np.full((6, 6), 11), colors[0], 1, rng)


def test_importing_scenes_does_not_import_torch():
    code = "import sys, tprl_env.data.scenes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
