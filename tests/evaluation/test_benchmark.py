"""Benchmark runs: files of answers that resume, tables, and the refusal of mixed protocols."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import datasets
import pyarrow.parquet as pq
from benchmark_data import save
from PIL import Image

from tprl_env.cli import main
from tprl_env.data.benchmarks import load_benchmark
from tprl_env.data.graders import sets
from tprl_env.data.graders.sets import Graded
from tprl_env.evaluation.benchmark.summary import check_together, interval, per_layer
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.tiny.families import save_random
from tprl_env.reducers import make_reducer

NAMES = ("gqa", "mme", "seed_bench")
CELLS = {("all tokens", 1.0), ("divprune", 6), ("fastv", 12), ("divprune", 12), ("divprune", 0.5)}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    datasets.disable_progress_bars()
    found = tmp_path_factory.mktemp("benchmarks")
    for name in NAMES:
        save(name, found / name)
    save_random("llava", found / "llava")
    return found


def words(place: Path, out: Path, names: tuple[str, ...] = NAMES, **more: str) -> list[str]:
    options = {"lvlm": str(place / "llava"), "benchmarks": ",".join(names), "out": str(out),
               "reducers": "divprune,fastv", "budgets": "12", "unit": "3", **more}  # fmt: skip
    given = [f"--{key.replace('_', '-')}={value}" for key, value in options.items()]
    return ["benchmark", *given, *(f"--from={name}={place / name}" for name in names)]


@pytest.fixture(scope="module")
def done(place: Path) -> Path:
    assert main(words(place, place / "out")) == 0
    return place / "out"


def files(out: Path) -> dict[str, float]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in out.rglob("part-*.parquet")}


def test_answers_are_those_of_a_pruned_lvlm(place: Path, done: Path) -> None:
    samples = list(load_benchmark("gqa", place=str(place / "gqa")))
    reducer = make_reducer("divprune")  # whose code closes positions up
    pruned = PrunedLVLM(load_lvlm(place / "llava"), reducer, positions=reducer.positions)
    wanted = [pruned.answer(s.image, s.question, 12, 16) for s in samples]
    folder = next((done / "answers" / "gqa").glob("divprune@12-*"))
    parts = [pq.read_table(path) for path in sorted(folder.iterdir())]
    assert [part.num_rows for part in parts] == [3, 1]
    found = [text for part in parts for text in part.column("answer").to_pylist()]
    assert found == [one.text for one in wanted]
    content = json.loads((done / "benchmark.json").read_text())
    rows = {(row["benchmark"], row["reducer"]): row for row in content["rows"]}
    assert len(rows) == 9
    row = rows["gqa", "divprune"]
    assert row["tokens"] == 12 and row["tokens_per_layer"] == [12.0] * 4 and row["questions"] == 4
    assert rows["gqa", "fastv"]["fields"] == {} and rows["gqa", "fastv"]["kind"] == "layer pruner"
    layers = rows["gqa", "fastv"]["tokens_per_layer"]
    assert layers[0] == 16 and layers == sorted(layers, reverse=True)
    assert np.mean(layers) == pytest.approx(rows["gqa", "fastv"]["tokens"], abs=1e-3)
    # two pictures of the video's question, sixteen tokens each
    assert rows["seed_bench", "all tokens"]["tokens"] == 24
    asked = content["asked"]["mme"]
    assert asked["grader"] == "yes_no" and asked["data"] and asked["lvlm"].startswith("sha256:")
    assert content["command"].startswith("tprl benchmark") and content["versions"]


def test_the_tables_say_how_it_was_asked(done: Path) -> None:
    page = (done / "benchmark.md").read_text()
    assert "| method | GQA | MME | SEED-Bench | tokens | average |" in page
    assert "*12 tokens*" in page and "lmms-lab/MME, split test, graded by `yes_no`" in page
    latex = (done / "benchmark.tex").read_text()
    assert latex.count(r"\\") == 5 and r"\pm" in latex and "%" not in latex.replace(r"\%", "")
    picture = Image.open(done / "benchmark.png")
    assert picture.width > 600 and np.ptp(np.asarray(picture)) > 100


def test_what_is_answered_is_not_asked_again(place: Path, done: Path, tmp_path: Path) -> None:
    before, results = files(done), (done / "benchmark.json").read_text()
    gone = done / sorted(before)[3]
    gone.unlink()
    assert main(words(place, done)) == 0
    after = files(done)
    assert after.keys() == before.keys()
    assert [k for k in after if after[k] != before[k]] == [sorted(before)[3]]
    again = json.loads((done / "benchmark.json").read_text())
    assert again["rows"] == json.loads(results)["rows"]
    assert main(words(place, done, budgets="12,0.5,6", reducers="divprune")) == 0  # more cells
    content = json.loads((done / "benchmark.json").read_text())
    assert {(row["reducer"], row["budget"]) for row in content["rows"]} == CELLS - {("fastv", 12)}
    assert all(files(done)[name] == after[name] for name in after)


def test_another_protocol_is_refused(place: Path, done: Path, capsys: Any) -> None:
    assert main(words(place, done, limit="2")) == 2
    assert "under another protocol" in capsys.readouterr().err
    assert main(words(place, done, unit="4")) == 2
    assert "take another --out" in capsys.readouterr().err
    damaged = done / sorted(files(done))[0]
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:100])
    try:
        assert main(words(place, done)) == 2
        assert "missing or damaged" in capsys.readouterr().err
    finally:
        damaged.write_bytes(kept)


def test_mixed_results_are_refused(place: Path, done: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(words(place, tmp_path / "b", ("gqa",), reducers="fastv")) == 0
    assert main(["benchmark", "--check", str(done), str(tmp_path / "b")]) == 0
    assert "2 files" in capsys.readouterr().out
    assert main(words(place, tmp_path / "c", ("gqa",), limit="2")) == 0
    assert main(["benchmark", "--check", str(done), str(tmp_path / "c" / "benchmark.json")]) == 2
    assert "gqa: limit is None there and 2 here" in capsys.readouterr().err
    other = json.loads((done / "benchmark.json").read_text())
    other["lvlm"] = {**other["lvlm"], "dtype": "float16"}
    with pytest.raises(ValueError, match="number type is 'float32' there and 'float16'"):
        check_together({"a": json.loads((done / "benchmark.json").read_text()), "b": other})
    (tmp_path / "d.json").write_text("{}")
    assert main(["benchmark", "--check", str(tmp_path / "d.json")]) == 2
    assert "no result of tprl benchmark" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"benchmarks": "gqaa"}, "did you mean 'gqa'"),
        ({"reducers": "divprun"}, "did you mean 'divprune'"),
        ({"split": "train"}, "cannot be had|no split|holds|has the splits"),
        ({"budgets": "1", "reducers": "fastv"}, "fastv at 1, gqa, from '200': fastv can have"),
        ({"policy": "p"}, "a policy needs its autoencoder"),
        ({"lvlm": "builtin:crowdd"}, "did you mean 'builtin:crowded'"),
    ],
)
def test_bad_input_ends_in_a_sentence(
    place: Path, tmp_path: Path, capsys: Any, more: dict[str, str], said: str
) -> None:
    import re

    assert main(words(place, tmp_path / "out", ("gqa",), **more)) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not list(tmp_path.rglob("benchmark.json"))


def test_intervals_by_hand() -> None:
    rows = [Graded("", ("a",), score, "", str(i)) for i, score in enumerate((0.0, 0.5, 1.0, 0.5))]
    low, high = interval(sets.mean, rows)  # as in test_measure.py, in percent
    assert (low, high) == pytest.approx((10, 90), abs=0.1)
    pairs = [Graded("", ("yes",), 1.0, "count", str(i // 2)) for i in range(8)]
    assert interval(sets.mme, pairs) == (200.0, 200.0)
    half = pairs[:4] + [Graded("", ("yes",), 0.0, "count", str(i // 2)) for i in range(4, 8)]
    low, high = interval(sets.mme, half)
    assert low < 100 < high and low >= 0 and high <= 200


def test_tokens_of_each_layer_by_hand() -> None:
    import pyarrow as pa

    # five tokens: one dropped, two live one layer, two live all three; and three that all live
    table = pa.table({"lives": [[1, 2, 0, 2], [0, 0, 0, 3]], "tokens": [3.0, 3.0]})
    assert per_layer(table, 3, "layer pruner") == [3.5, 2.5, 2.5]
    assert per_layer(table, 3, "merger") == [3.0, 3.0, 3.0]


@pytest.mark.slow
def test_workers_of_ray_give_the_same(place: Path, done: Path, tmp_path: Path) -> None:
    with mock.patch.dict(os.environ):
        line = [*words(place, tmp_path / "ray"), "--engine=ray", "--concurrency=2"]
        assert main(line) == 0
    content = json.loads((tmp_path / "ray" / "benchmark.json").read_text())
    here = json.loads((done / "benchmark.json").read_text())
    wanted = {(r["benchmark"], r["reducer"], r["budget"]): r for r in here["rows"]}
    for row in content["rows"]:
        key = row["benchmark"], row["reducer"], row["budget"]
        assert key not in wanted or wanted[key] == row
