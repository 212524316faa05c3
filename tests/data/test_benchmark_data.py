"""Benchmarks: small copies in exactly each published schema, read through ``datasets``."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("datasets")

import datasets
from benchmark_data import ROWS, picture, save, table

from tprl_env.data import BadSampleError, NoSamplesError, Sample, load_dataset
from tprl_env.data.benchmarks import BENCHMARKS, load_benchmark
from tprl_env.data.graders import GRADERS, grade, sets


@pytest.fixture(autouse=True)
def _quiet(tmp_path: Path) -> Any:
    datasets.disable_progress_bars()
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache"):
        yield


def read(name: str, folder: Path, **options: Any) -> list[Sample]:
    return list(load_benchmark(name, place=str(save(name, folder)), **options))


def test_every_benchmark_has_a_copy_here() -> None:
    assert set(ROWS) == set(BENCHMARKS) and len(BENCHMARKS) == 13
    assert {one.grader for one in BENCHMARKS.values()} <= set(GRADERS)
    trainable = [name for name, one in BENCHMARKS.items() if "train" in one.splits]
    assert trainable == ["gqa", "vqa_v2", "textvqa", "science_qa"]


@pytest.mark.parametrize("form", ["disk", "parquet"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_copy_becomes_samples_that_their_own_answers_solve(
    name: str, form: str, tmp_path: Path
) -> None:
    data = load_benchmark(name, place=str(save(name, tmp_path / "copy", form=form)))
    samples = list(data)
    assert len({sample.id for sample in samples}) == len(samples) > 1 and not data.skipped
    assert [s.id for s in data] == [s.id for s in samples]  # again from the start
    assert name in data.description and data.fingerprint
    known = BENCHMARKS[name]
    graded = []
    for sample in samples:
        assert sample.image.dtype == np.uint8 and sample.grader == known.grader
        best = max(grade(known.grader, answer, sample.answers) for answer in sample.answers)
        assert best == 1.0
        graded.append(sets.Graded(sample.answers[0], sample.answers, best, sample.question_type,
                                  sample.meta["group"]))  # fmt: skip
    figures = known.metric(graded)
    assert all(np.isfinite(value) for value in figures.values())
    first = next(iter(figures))
    full = {"mme": 200.0, "flickr30k": figures[first]}.get(name, 100.0)
    assert figures[first] == pytest.approx(full)


def test_what_is_asked_is_the_benchmarks_own(tmp_path: Path) -> None:
    (first, *_), first_of = read("gqa", tmp_path / "gqa"), {}
    assert first.question == "Is it 0?\nAnswer the question using a single word or phrase."
    assert first.image_id == "n0" and np.array_equal(first.image, np.asarray(picture(0)))
    for name in ("mmbench", "science_qa", "mme", "mathvista", "refcoco", "seed_bench", "vizwiz"):
        first_of[name] = read(name, tmp_path / name)
    question = "Which is it?\nA. cat\nB. dog\nC. bird\n"
    letter = "Answer with the option's letter from the given choices directly."
    assert first_of["mmbench"][0].question == question + letter  # a hint of "nan" is none
    assert first_of["mmbench"][1].question == "Which is it?\nA. cat\nB. dog\n" + letter
    assert [s.meta["group"] for s in first_of["mmbench"]] == ["241", "241"]
    assert first_of["science_qa"][1].answers == ("B",)
    assert "Please answer" not in first_of["mme"][0].question
    assert first_of["mathvista"][1].question.startswith("Which?\nChoices: red, blue\n")
    # 6, 10, 30 wide, 20 high in 60 x 40 pixels
    assert first_of["refcoco"][0].answers == ("[0.1000, 0.2500, 0.6000, 0.7500]",)
    assert [len(sample.images) for sample in first_of["seed_bench"]] == [1, 2]
    assert "respond with 'Unanswerable'" in first_of["vizwiz"][0].question


def test_questions_about_one_picture_share_it(tmp_path: Path) -> None:
    samples = read("vqa_v2", tmp_path)
    assert samples[0].image_id == samples[1].image_id != samples[2].image_id
    assert len(samples[0].answers) == 10
    assert grade("vqa", "red", samples[0].answers) == 1.0
    exact = read("vqa_v2", tmp_path / "again", grader="exact")
    assert exact[0].answers == ("red", "blue") and exact[0].grader == "exact"


def test_a_limit_counts_questions(tmp_path: Path) -> None:
    assert len(read("refcoco", tmp_path, limit=3)) == 3  # two phrases per row
    with pytest.raises(ValueError, match="limit must be at least 1"):
        load_benchmark("mme", place=str(tmp_path), limit=0)


def test_load_dataset_finds_benchmarks(tmp_path: Path) -> None:
    save("pope", tmp_path)
    assert len(list(load_dataset("pope", "test", place=str(tmp_path), limit=2))) == 2
    with pytest.raises(ValueError, match="'scenes-crowded' is none; benchmarks are gqa"):
        load_dataset("scenes-crowded", place=str(tmp_path))
    with pytest.raises(ValueError, match="did you mean 'mmbench'"):
        load_dataset("mmbnch")


def test_what_cannot_be_loaded_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'mme' has no split 'train', .*; train on gqa, vqa_v2"):
        load_benchmark("mme", "train")
    with pytest.raises(ValueError, match="did you mean 'textvqa'"):
        load_benchmark("textvqaa")
    with pytest.raises(FileNotFoundError, match="nor parquet"):
        load_benchmark("mme", place=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"hf download lmms-lab/MME --repo-type dataset"):
        load_benchmark("mme")
    folder = save("pope", tmp_path / "pope", form="parquet")
    with pytest.raises(ValueError, match="parquet files of test, not 'val'"):
        load_benchmark("refcoco", place=str(folder))
    (folder / "test-00000-of-00001.parquet").rename(folder / "val-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"its rows lack the columns bbox; .* copy of lmms-lab/R"):
        load_benchmark("refcoco", place=str(folder))
    save("mme", tmp_path / "mme")
    with pytest.raises(ValueError, match="has the splits test, not 'val'"):
        load_benchmark("refcoco", place=str(tmp_path / "mme"))
    with mock.patch.dict("sys.modules", {"datasets": None}):
        with pytest.raises(ImportError, match=r"pip install \"tprl-env\[benchmarks\]\""):
            load_benchmark("mme", place=str(tmp_path / "mme"))


def saved(rows: list[dict[str, Any]], folder: Path, split: str = "test") -> str:
    datasets.DatasetDict({split: table(rows)}).save_to_disk(str(folder))
    return str(folder)


def test_bad_rows_are_named_or_left_out(tmp_path: Path) -> None:
    rows = ROWS["science_qa"]()
    rows[1]["answer"] = 17
    place = saved(rows, tmp_path / "a")
    with pytest.raises(BadSampleError, match=r"'science_qa', split 'test', row 1: it cannot be"):
        list(load_benchmark("science_qa", place=place))
    data = load_benchmark("science_qa", place=place, skip_bad=True)
    assert len(list(data)) == 2 and len(data.skipped) == 1
    rows = ROWS["textvqa"]()
    for row in rows:
        row["answers"] = []
    place = saved(rows, tmp_path / "b", "validation")
    with pytest.raises(BadSampleError, match=r"row 0: .*at least one text"):
        list(load_benchmark("textvqa", place=place))
    with pytest.raises(NoSamplesError, match="no sample of benchmark 'textvqa'"):
        list(load_benchmark("textvqa", place=place, skip_bad=True))
    rows = ROWS["pope"]()
    rows[1]["question_id"] = rows[0]["question_id"]
    with pytest.raises(ValueError, match="row 1: the id 'adversarial-1' occurs twice"):
        list(load_benchmark("pope", place=saved(rows, tmp_path / "c")))
    rows = ROWS["pope"]()
    rows[0]["question"] = "  "
    sample = next(iter(load_benchmark("pope", place=saved(rows, tmp_path / "d"))))
    assert sample.question  # the closing words remain
