"""Datasets: names, the JSON-lines format and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tprl_env.data import BadSampleError, load_dataset


def write(folder: Path, rows: list[dict | str]) -> Path:
    for name, mode in (("a.png", "RGBA"), ("b.png", "L"), ("c.png", "P")):
        Image.new(mode, (6, 4), 3).save(folder / name)
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n\n")
    return path


def row(id: str = "q1", image: str = "a.png", **more: object) -> dict:
    return {"id": id, "image": image, "question": "what?", "answers": ["cat"], **more}


def test_samples_are_read_as_rgb_and_share_pictures(tmp_path: Path):
    rows = [
        row("1"),
        row("2", "b.png", question_type="k", grader="vqa"),
        row("3", "c.png"),
        row("4"),
    ]
    dataset = load_dataset(write(tmp_path, rows))
    samples = list(dataset)
    assert len(dataset) == 4 and [s.id for s in samples] == ["1", "2", "3", "4"]
    assert all(s.image.shape == (4, 6, 3) and s.image.dtype == np.uint8 for s in samples)
    assert samples[0].image_id == samples[3].image_id != samples[1].image_id
    assert (samples[1].question_type, samples[1].grader) == ("k", "vqa")
    assert [s.id for s in dataset] == ["1", "2", "3", "4"]  # it can be read again
    assert len(load_dataset(write(tmp_path, rows), limit=2)) == 2


def bad_rows(folder: Path) -> Path:
    (folder / "broken.png").write_bytes(b"\x89PNG not really")
    Image.new("RGB", (99, 99)).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:60])
    return write(
        folder,
        [
            row("1"),
            row("gone", "gone.png"),
            row("broken", "broken.png"),
            row("cut", "cut.png"),
            row("mute", question=" "),
            row("open", answers=[]),
            row("2"),
        ],
    )


@pytest.mark.parametrize(
    ("id", "text"),
    [("gone", "gone.png"), ("broken", "broken.png"), ("cut", "cut.png"),
     ("mute", "empty question"), ("open", "no answer")],
)  # fmt: skip
def test_bad_samples_are_named_with_their_file(tmp_path: Path, id: str, text: str):
    dataset = load_dataset(bad_rows(tmp_path))
    index = ["1", "gone", "broken", "cut", "mute", "open", "2"].index(id)
    with pytest.raises(BadSampleError, match=rf"(?s){id}.*{text}") as caught:
        dataset.read(index)
    assert "data.jsonl" in str(caught.value) and "--skip-bad" in str(caught.value)


def test_skip_bad_counts_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    dataset = load_dataset(bad_rows(tmp_path), skip_bad=True)
    for _ in range(2):
        assert [s.id for s in dataset] == ["1", "2"]
        assert len(dataset.skipped) == 5
    assert "left out" in caplog.text and "gone.png" in caplog.text


def test_the_iterator_survives_a_bad_sample(tmp_path: Path):
    iterator = iter(load_dataset(bad_rows(tmp_path)))
    assert next(iterator).id == "1"
    for _ in range(5):
        with pytest.raises(BadSampleError):
            next(iterator)
    assert next(iterator).id == "2"


def test_nothing_but_bad_samples(tmp_path: Path):
    dataset = load_dataset(write(tmp_path, [row("x", "gone.png")]), skip_bad=True)
    with pytest.raises(BadSampleError, match=r"every sample .* was left out"):
        list(dataset)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no samples"),
        ([row("1"), row("1")], "id '1' twice"),
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is not a JSON object"),
        ([row("1"), {"id": "2"}], r"line 2 lacks \['image', 'question', 'answers'\]"),
        ([row("1", extra=1)], r"unknown fields \['extra'\]"),
        ([row("1", answers="cat")], "answers must be a list of strings"),
    ],
)
def test_malformed_files_are_refused_at_once(tmp_path: Path, rows: list, message: str):
    with pytest.raises(ValueError, match=message):
        load_dataset(write(tmp_path, rows), skip_bad=True)


def test_missing_file_and_unknown_name(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot read the dataset"):
        load_dataset(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="did you mean 'scenes-crowded'"):
        load_dataset("scene-crowd")
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        load_dataset("scenes-crowded", limit=0)


def test_scenes_by_name():
    samples = list(load_dataset("scenes-crowded", "test", limit=8))
    assert len(samples) == 8 and len({s.image_id for s in samples}) == 2
    again = list(load_dataset("scenes-crowded", "test", limit=8))
    np.testing.assert_array_equal(samples[7].image, again[7].image)
