"""``tprl evaluate --reducers``: every reducer of both tables on a tiny store, and bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import make_small_run

from tprl_env.cli.commands import main
from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.intervals import wilson_interval
from tprl_env.evaluation.reducer_comparison import compare_reducers
from tprl_env.evaluation.reducer_flops import mean_flops
from tprl_env.evaluation.reducer_names import all_names, contenders, parse_reducer, split_names
from tprl_env.evaluation.reducer_table import by_name, panel_of
from tprl_env.evaluation.reducers import Bench
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.flops import LanguageSizes, language_flops
from tprl_env.reducers import REDUCERS
from tprl_env.reducers.layer import LAYER_PRUNERS
from tprl_env.scoring.lvlm_scorer import LVLMScorer

LAYERS, TOKENS, BUDGETS = 3, 16, (16, 9, 4)
MERGES_AT_ALL = {"prumerge", "prumerge_plus", "visionzip", "trim"}  # new tokens at any budget
MEASURED = ("ms_llm", "ms_reducer")  # times, which no two runs share


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return make_small_run(tmp_path_factory.mktemp("reducers"))


def words(run, out, *more):
    return ["evaluate", str(run.store), "--lvlm", str(run.lvlm), "--out", str(out), *more]


@pytest.fixture(scope="module")
def out(run):
    folder = run.root / "all"
    more = ["--reducers", "all", "--positions", "both", "--policy", str(run.policy)]
    assert main([*words(run, folder), *more, "--budgets", ",".join(map(str, BUDGETS))]) == 0
    return folder


@pytest.fixture(scope="module")
def content(out):
    return json.loads((out / "reducers.json").read_text("utf-8"))


def feasible(content):
    return [row for row in content["rows"] if row["feasible"]]


def test_all_is_every_entry_of_both_tables(content):
    found = {row["reducer"] for row in content["rows"]}
    assert found == {*REDUCERS, *LAYER_PRUNERS, "policy"}
    assert {parse_reducer(name)[0] for name in all_names()} == {*REDUCERS, *LAYER_PRUNERS}
    versions = {row["version"] for row in content["rows"] if row["reducer"] == "sparsevlm"}
    assert versions == {"v1", "v1.5", "v2"}


def test_all_tokens_are_the_full_accuracy_exactly(run, content):
    store = FeatureStore.open(run.store)
    full = float(np.asarray(store.full_scores("exact")).mean())
    assert content["full"]["accuracy"] == pytest.approx(full, abs=1e-5)
    rows = [row for row in feasible(content) if row["budget"] == TOKENS]
    kept = [row for row in rows if row["reducer"] not in MERGES_AT_ALL]
    assert {row["kind"] for row in kept} == {"pruner", "merger", "layer pruner"}
    for row in kept:
        assert row["accuracy"] == content["full"]["accuracy"], row["name"]
        assert row["average_tokens"] == row["entering_tokens"] == TOKENS, row["name"]
        assert row["flops_llm"] == content["full"]["flops_llm"], row["name"]


def test_averages_are_met_or_reported(content):
    for row in feasible(content):
        gap = abs(row["average_tokens"] - row["budget"])
        if row["reducer"] == "pooled":  # squares do not come in every number
            assert row["average_tokens"] == {16: 16, 9: 4, 4: 4}[row["budget"]]
        elif row["kind"] == "layer pruner":
            assert gap <= 0.5 and row["entering_tokens"] >= row["average_tokens"], row["name"]
        else:
            assert gap == 0 and row["entering_tokens"] == row["budget"], row["name"]


def test_every_row_says_what_the_method_is(content):
    count = content["questions"]
    for row in content["rows"]:
        assert row["positions"] in ("original", "contiguous")
        cls = {**REDUCERS, **LAYER_PRUNERS}.get(row["reducer"])
        assert cls is None or row["larger_model"] == cls.larger_model
        assert ("relevance=query" in row["name"]) == bool(row["substitute"])
        if not row["feasible"]:
            assert "accuracy" not in row and row["reason"]
            continue
        bounds = wilson_interval(round(row["accuracy"] * count), count)
        assert row["ci95"] == pytest.approx(bounds, abs=1e-4)
        assert row["ms_reducer"] >= 0 and row["ms_llm"] > 0 and row["flops_reducer"] >= 0
        assert ("minus_policy" in row) == (row["knowledge"] != "policy")
        if "minus_policy" in row:
            policy = next(
                one for one in content["rows"]
                if one["knowledge"] == "policy" and one["budget"] == row["budget"]
            )  # fmt: skip
            difference = row["accuracy"] - policy["accuracy"]
            assert row["minus_policy"][0] == pytest.approx(difference, abs=2e-5)


def test_what_a_method_cannot_have_is_a_row_with_one_sentence(content):
    refused = {
        (row["name"], row["budget"]): row["reason"]
        for row in content["rows"]
        if not row["feasible"]
    }
    assert "CLIP's text tower" in refused["cdpruner", 9]
    # one cut before layer 1 of 3: (16 + 1 + 1) / 3 = 6
    assert "question_rows can have an average of 6 to 16" in refused["question_rows", 4]
    assert ("question_rows", 9) not in refused and ("question_rows(layer=0)", 4) not in refused


def test_flops_are_those_of_the_lengths_that_lives_give(run, content):
    store, lvlm = FeatureStore.open(run.store), load_lvlm(run.lvlm, device="cpu")
    sizes = LanguageSizes.from_config(lvlm.text_config)
    texts = [len(store.prompt_ids(sample)) - 1 for sample in range(len(store))]
    row = next(r for r in feasible(content) if r["name"] == "question_rows" and r["budget"] == 9)
    stays = (9 * LAYERS - TOKENS) / (LAYERS - 1)  # 5.5, rounded to an even number
    visual = [TOKENS, round(stays), round(stays)]
    by_hand = np.mean([language_flops(sizes, [text + n for n in visual]) for text in texts])
    assert row["flops_llm"] == round(by_hand)
    lengths = np.add.outer(texts, visual)
    assert mean_flops(lvlm.text_config, lengths) == pytest.approx(by_hand)
    # the layer's own rows cost its key projection once more, at least
    head = sizes.kv_heads * sizes.head_size
    assert row["flops_reducer"] > 2 * TOKENS * sizes.width * head


def test_scores_are_those_of_the_lvlm(run):
    store, lvlm = FeatureStore.open(run.store), load_lvlm(run.lvlm, device="cpu")
    samples = np.arange(len(store))
    bench, scorer = Bench(store, lvlm, samples), LVLMScorer(lvlm, store)
    inside, merged = contenders(["fastv", "tome"])
    fastv = bench.measure(inside, [12])[0]
    found = scorer.score_inside(samples, reducer=inside.make(12), average=12.0)
    assert np.array_equal(fastv.scores, found.exact) and np.array_equal(fastv.lives, found.lives)
    tome = bench.measure(merged, [9])[0]
    for sample in samples:
        inputs = bench.inputs(merged.make(9), samples[sample : sample + 1])
        one = merged.make(9).merge(inputs[0], 9)
        prompt, answers = scorer._text(int(sample))
        alone = lvlm.score(
            [prompt], [answers], [one.tokens], None, "contiguous",
            places=[one.places.numpy()], sizes=[TOKENS],
        )  # fmt: skip
        assert tome.scores[sample] == alone.exact[0]


def test_the_same_command_gives_the_same_figures(run, tmp_path):
    rows = []
    for name in ("first", "second"):
        names = ["random", "tome", "flowcut", "pact", "question_attention"]
        found = compare_reducers(run.store, str(run.lvlm), tmp_path / name, names, budgets=[9])
        for row in found["rows"]:
            for key in MEASURED:
                row.pop(key)
        rows.append(found["rows"])
    assert rows[0] == rows[1]


def test_tables_and_pictures(out, content):
    text = (out / "reducers.md").read_text("utf-8")
    assert "| 9 | fastv* | original |" in text and "Not feasible:" in text
    assert "cdpruner(relevance=query)*+" in text
    for name in ("accuracy_tokens.png", "accuracy_flops.png", "examples.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
    panels = {name: panel_of(rows[0]) for name, rows in by_name(feasible(content)).items()}
    assert panels["policy"] == {0, 1, 2} and panels["random"] == {0, 1}
    assert panels["tome"] == {0} and panels["tome, positions kept"] == {1}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--reducers", "question_rows", "--budgets", "4"], "average of 6 to 16"),
        (["--reducers", "cdpruner", "--budgets", "4"], "CLIP's text tower"),
        (["--reducers", "fastvv"], "did you mean 'fastv'"),
        (["--reducers", "fastv(layers=2)"], "did you mean 'layer'"),
        (["--reducers", "fastv(layer)"], "name(field=value)"),
        (["--reducers", "fastv(layer=2"], "separated by commas"),
        (["--reducers", "fastv,fastv"], "named once"),
        (["--reducers", "all,fastv"], "unknown reducer 'all'"),
        (["--reducers", "fastv", "--budgets", "17"], "in [1, 16]"),
        (["--reducers", "fastv", "--positions", "mine"], "positions"),
        (["--reducers", "fastv", "--pruners", "random"], "leave it or --reducers out"),
        (["--positions", "own"], "--positions belongs to --reducers"),
        (["--reducers", "fastv", "--calibration", "x"], "belongs to a policy"),
        (["--reducers", "fastv", "--limit", "0"], "limit must be at least 1"),
    ],
)
def test_mistakes_end_in_one_sentence(run, tmp_path, capsys, more, sentence):
    assert main([*words(run, tmp_path / "out"), *more]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out" / "reducers.json").exists()


def test_names_with_fields():
    assert split_names("divprune, sparsevlm(version=v2,layers=(3,7,16))") == [
        "divprune",
        "sparsevlm(version=v2,layers=(3,7,16))",
    ]
    assert parse_reducer("sparsevlm(version=v2,layers=(3,7,16))") == (
        "sparsevlm",
        {"version": "v2", "layers": (3, 7, 16)},
    )
    own, kept = contenders(["tome"], "both")
    assert (own.positions, kept.positions) == ("contiguous", "original")
    assert [one.positions for one in contenders(["tome", "fastv"], "original")] == ["original"] * 2


def test_the_docs_show_the_recorded_results():
    from benchmarks.every_reducer import BEGIN, END, section

    root = Path(__file__).parents[2]
    shown = (root / "docs" / "results.md").read_text("utf-8").split(BEGIN)[1].split(END)[0]
    files = sorted((root / "benchmarks" / "results").glob("reducers-*.json"))
    assert [file.stem for file in files] == ["reducers-crowded", "reducers-sparse"]
    written = "\n\n".join(section(json.loads(file.read_text("utf-8"))) for file in files)
    assert shown.strip() == written, "run benchmarks.every_reducer ... --report"
