"""Datasets: names, the JSON-lines format and what it refuses."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tprl_env.data import BadSampleError, NoSamplesError, Sample, load_dataset
from tprl_env.data.graders import GRADERS


def write(folder: Path, rows: list[dict | str]) -> Path:
    for name, mode in (("a.png", "RGBA"), ("b.png", "L"), ("c.png", "P")):
        Image.new(mode, (6, 4), 3).save(folder / name)
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n\n")
    return path


def row(id: str = "q1", image: str = "a.png", **more: object) -> dict:
    return {"id": id, "image": image, "question": "what?", "answers": ["cat"], **more}


def several(images: object, id: str = "q1") -> dict:
    return {"id": id, "images": images, "question": "what?", "answers": ["cat"]}


def test_several_pictures_are_read_in_their_order_and_named_in_errors(tmp_path: Path):
    rows = [several(["a.png", "b.png"], "1"), several(["b.png", "a.png"], "2"), row("3")]
    first, second, single = list(load_dataset(write(tmp_path, rows)))
    assert len(first.images) == 2 and single.images == (single.image,)
    assert np.array_equal(first.images[1], second.images[0])
    assert len({first.image_id, second.image_id, single.image_id}) == 3
    (tmp_path / "cut.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    with pytest.raises(BadSampleError, match=r"cannot read image 2 .*cut\.png"):
        list(load_dataset(write(tmp_path, [several(["a.png", "cut.png"])])))
    with pytest.raises(BadSampleError, match=r"'\.\./b\.png' lies outside"):
        load_dataset(write(tmp_path, [several(["a.png", "../b.png"])]))
    with pytest.raises(ValueError, match="image 2 must be"):
        replace(first, more_images=(np.zeros((3, 3), np.uint8),))


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
    assert "data.jsonl" in str(caught.value) and "pass skip_bad=True" in str(caught.value)


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
    for _ in range(2):
        with pytest.raises(NoSamplesError, match=r"no sample of .* is left: .*gone.png"):
            list(dataset)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no samples"),
        ([row("1"), row("1")], "id '1' twice"),
        (["{"], "line 1 is not JSON"),
        (["[1]"], "line 1 is not a JSON object"),
        ([row("1"), {"id": "2"}], r"line 2 lacks \['image', 'question', 'answers'\]"),
        ([row("1", images=["a.png", "b.png"])], "line 1 has both 'image' and 'images'; keep"),
        ([several([])], r"'images' must be a list of at least one text, got \[\]"),
        ([several("a.png")], 'a list of at least one text, got "a.png"'),
        ([several(["a.png", 3])], "a list of at least one text, got"),
        ([row("1", extra=1)], r"unknown fields \['extra'\]"),
        ([row("1"), row("2", metric="vqa")], "line 2: the field 'metric' is now 'grader'"),
        ([row("1", kind="color")], "line 1: the field 'kind' is now 'question_type'"),
        (
            [row("1"), row("2", grader="vqq")],
            "line 2: grader must be one of 'exact', 'vqa', .*, got 'vqq'; did you mean 'vqa'",
        ),
    ],
)
def test_malformed_files_are_refused_at_once(tmp_path: Path, rows: list, message: str):
    with pytest.raises(ValueError, match=message):
        load_dataset(write(tmp_path, rows), skip_bad=True)


def test_a_sample_names_a_known_grader():
    fields = {"image": np.zeros((4, 6, 3), np.uint8), "question": "what?", "answers": ("cat",)}
    for grader in GRADERS:
        assert Sample(id="q1", image_id="a", grader=grader, **fields).grader == grader
    with pytest.raises(ValueError, match=r"sample 'q1': grader must be one of .*, got 'bleu'"):
        Sample(id="q1", image_id="a", grader="bleu", **fields)


# Fields ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ('"id": 7', {"id": "7"}),
        ('"id": -12345678901234567890', {"id": "-12345678901234567890"}),
        ('"image_id": 3', {"image_id": "3"}),
        ('"answers": "cat"', {"answers": ("cat",)}),
        ('"answers": 5', {"answers": ("5",)}),
        ('"answers": 2.50', {"answers": ("2.50",)}),  # as it is written
        ('"answers": ["cat", 5, -1e3]', {"answers": ("cat", "5", "-1e3")}),
    ],
)
def test_plain_meanings_are_taken(tmp_path: Path, change: str, expected: dict):
    name = change.split('"')[1]
    line = json.dumps({k: v for k, v in row("1").items() if k != name})[:-1] + f", {change}}}"
    (sample,) = load_dataset(write(tmp_path, [line]))
    for field, value in expected.items():
        found = getattr(sample, field)
        assert found == value
        assert all(type(part) is str for part in (found if field == "answers" else [found]))


@pytest.mark.parametrize("field", ["id", "image", "question", "question_type", "image_id"])
@pytest.mark.parametrize("value", ["null", "true", "[]", '{"a": 1}', "1.5", '["a"]'])
def test_other_types_are_refused_with_file_line_and_field(tmp_path: Path, field: str, value: str):
    rest = {k: v for k, v in row("2").items() if k != field}
    path = write(tmp_path, [row("1"), json.dumps(rest)[:-1] + f', "{field}": {value}}}'])
    with pytest.raises(BadSampleError, match=rf"data.jsonl line 2: the field '{field}' must be"):
        load_dataset(path, skip_bad=True)


@pytest.mark.parametrize("value", ["null", "false", "[true]", "[null]", '[["a"]]', "{}"])
def test_answers_of_other_types_are_refused(tmp_path: Path, value: str):
    rest = {k: v for k, v in row("1").items() if k != "answers"}
    path = write(tmp_path, [json.dumps(rest)[:-1] + f', "answers": {value}}}'])
    expected = r"line 1: the field 'answers' must be a string or a number, or a list of them, got"
    with pytest.raises(BadSampleError, match=expected):
        load_dataset(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "'id' must have 1 to 1000 characters, got 0"),
        ({"id": "x" * 1001}, "got 1001"),
        ({"question": "half \ud800 pair"}, r"'question' holds half a character \(\\ud800\)"),
        ({"answers": ["\udc00"]}, "'answers' holds half a character"),
    ],
)
def test_texts_that_cannot_be_kept_are_refused(tmp_path: Path, change: dict, message: str):
    with pytest.raises(BadSampleError, match=message):
        load_dataset(write(tmp_path, [{**row("1"), **change}]))


@pytest.mark.parametrize("ids", [(1, "1"), ("a", "a")])
def test_ids_that_become_equal_are_refused_with_both_lines(tmp_path: Path, ids: tuple):
    path = write(tmp_path, ["", row(ids[0]), row("b"), row(ids[1])])
    with pytest.raises(ValueError, match=rf"id '{ids[1]}' twice, in lines 2 and 4"):
        load_dataset(path)


def test_a_text_that_no_context_takes_is_a_bad_sample(tmp_path: Path):
    path = write(tmp_path, [row("long", question="why " * 300_000), row("2")])
    with pytest.raises(BadSampleError, match=r"'long' .* line 1: a text of 1200000 characters"):
        next(iter(load_dataset(path)))
    assert [sample.id for sample in load_dataset(path, skip_bad=True)] == ["2"]


# Text files --------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_records_end_at_newlines_only(tmp_path: Path, start: bytes, end: str):
    text = "one\u2028two\u2029three\u0085four\x7f\u00a0"
    path = write(tmp_path, [])
    rows = [row("1", question=text), row("2", answers=[text])]
    lines = [json.dumps(r, ensure_ascii=False) + end for r in rows]
    path.write_bytes(start + "".join(lines).encode())
    first, second = load_dataset(path)
    assert first.question == text and second.answers == (text,)
    path.write_bytes(start + "".join(lines).rstrip().encode())  # no newline at the end
    assert len(load_dataset(path)) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            '{"id": "caf\u00e9"}'.encode("latin-1"),
            r"line 2 is not UTF-8 \(byte 0xe9 at column 12\)",
        ),
        (b"\xa0", "line 2 is not UTF-8"),
        (b"{} {}", r"line 2 is not JSON \(Extra data\)"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b'{"id": "1", "id": "2"}', "the field 'id' is there twice"),
        (b'{"id": NaN}', "NaN is not a JSON value"),
        (b'{"id": ' + b"9" * 10_000 + b"}", "line 2 lacks"),
    ],
)
def test_lines_that_cannot_be_read_are_named(tmp_path: Path, data: bytes, message: str):
    path = write(tmp_path, [])
    path.write_bytes(json.dumps(row("1")).encode() + b"\n" + data + b"\n")
    with pytest.raises(BadSampleError, match=message) as caught:
        load_dataset(path, skip_bad=True)
    assert "data.jsonl line 2" in str(caught.value) and len(str(caught.value)) < 400


def test_another_encoding_and_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path, [])
    path.write_text(json.dumps(row("1")), encoding="utf-16")
    with pytest.raises(BadSampleError, match=r"line 1 is UTF-16; save the file as UTF-8"):
        load_dataset(path)
    monkeypatch.setattr("tprl_env.data.records.MAX_LINE", 50)
    with pytest.raises(BadSampleError, match="line 1 is longer than 50 bytes"):
        load_dataset(write(tmp_path, [row("1")]))


@pytest.mark.timeout(20)
def test_a_data_file_that_is_no_file_is_refused_without_waiting(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name, what in (("fifo", "a FIFO"), ("folder", "a folder"), ("zero", "a device")):
        with pytest.raises(ValueError, match=rf"cannot read the dataset .* it is {what}, not a"):
            load_dataset(tmp_path / f"{name}.jsonl")


# Places of pictures ------------------------------------------------------------------------


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A data folder, beside it a picture that must not be read."""
    folder = tmp_path / "data"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "secret.png")
    Image.new("RGB", (6, 4)).save(folder / "deep" / "own.png")
    (tmp_path / "data-2").mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "data-2" / "near.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up").symlink_to(tmp_path)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    return folder


@pytest.mark.parametrize(
    "image",
    ["../secret.png", "deep/../../secret.png", "{top}/secret.png", "link.png", "up/secret.png",
     "../data-2/near.png", "/dev/zero"],
)  # fmt: skip
def test_pictures_outside_of_the_folder_are_refused(outside: Path, image: str):
    image = image.format(top=outside.parent)
    path = write(outside, [row("1", image), row("2")])
    cure = r"lies outside of the data folder .*data; .* pass allow_outside=True"
    with pytest.raises(BadSampleError, match=rf"sample '1' of .* line 1: .*{cure}"):
        list(load_dataset(path))
    if ".." in image or image.startswith("/"):
        with pytest.raises(BadSampleError, match=cure):  # said before anything is read
            load_dataset(path)
    assert [sample.id for sample in load_dataset(path, skip_bad=True)] == ["2"]
    if image != "/dev/zero":
        assert len(list(load_dataset(path, allow_outside=True))) == 2


def test_pictures_inside_of_the_folder_by_any_path(outside: Path):
    link = outside.parent / "other"
    link.symlink_to(outside)
    images = ["deep/own.png", "deep/../deep/own.png", f"{outside}/deep/own.png",
              f"{link}/deep/own.png", "up/data/deep/own.png"]  # fmt: skip
    path = write(outside, [row(str(i), image) for i, image in enumerate(images)])
    for file in (path, link / path.name):
        assert len(list(load_dataset(file))) == len(images)


@pytest.mark.timeout(20)
def test_odd_pictures_are_bad_samples(outside: Path):
    os.mkfifo(outside / "fifo.png")
    names = ["fifo.png", "loop.png", "a\0b.png", "", "deep", "x" * 300]
    path = write(outside, [row(str(i), name) for i, name in enumerate(names)] + [row("good")])
    dataset = load_dataset(path, skip_bad=True)
    assert [sample.id for sample in dataset] == ["good"]
    assert len(dataset.skipped) == len(names)
    assert all("data.jsonl line" in reason for reason in dataset.skipped)


def test_the_log_of_bad_samples_is_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [row(str(i), "y" * 200 + f"{i}.png") for i in range(500)]
    dataset = load_dataset(write(tmp_path, [*rows, row("good")]), skip_bad=True)
    assert len(list(dataset)) == 1 and len(dataset.skipped) == 500
    assert len(caplog.records) == 11 and "counted, not logged" in caplog.messages[-1]
    assert max(map(len, caplog.messages)) < 520


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
