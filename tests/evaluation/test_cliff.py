"""The cliff and the maps, against scores made one by one; the files; bad input."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import make_small_run

from tprl_env.cli.commands import main
from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluation.cliff import make_rule, measure_cliff
from tprl_env.lvlm import load_lvlm
from tprl_env.reducers import make_pruner
from tprl_env.reducers.interfaces import prune_inputs
from tprl_env.reducers.layer import FastV, QuestionRows, SparseVLM
from tprl_env.reducers.layer_pruner import OneCut
from tprl_env.scoring.lvlm_scorer import LVLMScorer

LAYERS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.set_num_threads(1)
    return make_small_run(tmp_path_factory.mktemp("cliff"))


@pytest.fixture(scope="module")
def out(run):
    folder = run.root / "cliff"
    words = ["cliff", str(run.store), "--lvlm", str(run.lvlm), "--out", str(folder)]
    assert main([*words, "--rules", "question_rows,fastv,uniform", "--counts", "8,3"]) == 0
    return folder


def one_by_one(run, lives):
    """Exact scores of all samples, each in a pass of its own."""
    store, lvlm = FeatureStore.open(run.store), load_lvlm(run.lvlm, device="cpu")
    scorer = LVLMScorer(lvlm, store)
    found = []
    for sample in range(len(store)):
        prompt, answers = scorer._text(sample)
        tokens = [scorer._visual(sample)]
        scores = lvlm.score([prompt], [answers], tokens, lives=[lives(sample, tokens)])
        found.append(scores.exact[0])
    return np.array(found)


def test_the_cliff_is_what_dropping_costs(run, out):
    content = json.loads((out / "cliff.json").read_text())
    store = FeatureStore.open(run.store)
    assert [row["layer"] for row in content["cliff"]] == [3, 2, 1, 0]
    assert content["num_layers"] == LAYERS and content["questions"] == len(store)
    full = float(np.asarray(store.full_scores("exact")).mean())
    assert content["cliff"][0]["accuracy"] == pytest.approx(full, abs=1e-5)
    for row in content["cliff"]:
        scores = one_by_one(run, lambda _, t, k=row["layer"]: np.full(len(t[0]), k, np.uint8))
        assert row["accuracy"] == pytest.approx(scores.mean(), abs=1e-5)
        types = np.array([store.question_type(i) for i in range(len(store))])
        for name, value in row["by_type"].items():
            assert value == pytest.approx(scores[types == name].mean(), abs=1e-5)
        assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]


def test_the_maps_are_what_rules_keep(run, out):
    maps = json.loads((out / "cliff.json").read_text())["maps"]
    assert list(maps) == ["question_rows", "fastv", "uniform"]
    assert all(one["layers"] == [0, 1, 2] and one["counts"] == [8, 3] for one in maps.values())
    assert maps["fastv"]["accuracy"][0] == [None, None]
    store, lvlm = FeatureStore.open(run.store), load_lvlm(run.lvlm, device="cpu")
    scorer = LVLMScorer(lvlm, store)

    def uniform(sample, _, layer, count):
        keep = make_pruner("uniform").prune(prune_inputs(store, sample), count).numpy()
        return np.where(keep, LAYERS, layer).astype(np.uint8)

    def ranked(sample, tokens, layer, count):
        cut = OneCut(QuestionRows(), layer, count)
        return lvlm.reduce([scorer._text(sample)[0]], tokens, cut)[0]

    for name, lives in (("uniform", uniform), ("question_rows", ranked)):
        for layer in range(LAYERS):
            for column, count in enumerate((8, 3)):
                scores = one_by_one(run, lambda s, t, a=lives, b=layer, c=count: a(s, t, b, c))
                found = maps[name]["accuracy"][layer][column]
                assert found == pytest.approx(scores.mean(), abs=1e-5)


def test_pictures_are_written_after_the_numbers(run, tmp_path, monkeypatch, out):
    names = {path.name for path in out.iterdir()}
    maps = {f"map-{name}.png" for name in ("question_rows", "fastv", "uniform")}
    assert names == {"cliff.json", "cliff.png", *maps}
    for path in out.glob("*.png"):
        assert np.asarray(Image.open(path)).std() > 1

    def broken(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("tprl_env.evaluation.cliff.save_figure", broken)
    with pytest.raises(OSError, match="full"):
        measure_cliff(run.store, str(run.lvlm), tmp_path / "c", rules=(), limit=2)
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["cliff.json"]


def test_samples_scored_inside_come_back_in_order(run):
    store, lvlm = FeatureStore.open(run.store), load_lvlm(run.lvlm, device="cpu")
    scorer = LVLMScorer(lvlm, store, batch_tokens=60)
    samples = np.array([5, 0, 3, 5, 1, 8])
    both = scorer.score_inside(samples, reducer=FastV(), average=10)
    for i, sample in enumerate(samples):
        alone = scorer.score_inside(np.array([sample]), reducer=FastV(), average=10)
        assert alone.likelihood[0] == pytest.approx(both.likelihood[i], rel=1e-4)
        assert alone.lives[0].tolist() == both.lives[i].tolist()
    assert both.lives.sum(1).tolist() == [30] * 6
    replay = scorer.score_inside(samples, lives=both.lives)
    np.testing.assert_allclose(replay.likelihood, both.likelihood, rtol=1e-4)
    with pytest.raises(ValueError, match="one of the two"):
        scorer.score_inside(samples)
    with pytest.raises(ValueError, match=r"lives must be \(6, 16\)"):
        scorer.score_inside(samples, lives=both.lives[:, :3])


def test_encode_adds_question_rows(run, tmp_path):
    words = ["encode", "--data", str(run.data), "--lvlm", str(run.lvlm), "--question-rows", "1"]
    assert main([*words, "--limit", "3", "--out", str(tmp_path / "s")]) == 0
    store, lvlm = FeatureStore.open(tmp_path / "s"), load_lvlm(run.lvlm, device="cpu")
    assert store.channel_meta("question_rows")["layer"] == 1
    for sample in range(3):
        prompts, tokens = [lvlm.prompt(store.question(sample))], [store.tokens(sample)]
        expected = lvlm.saliency(prompts, tokens, QuestionRows(layer=1))[0]
        np.testing.assert_allclose(store.channel("question_rows", sample), expected, rtol=1e-5)
        keep = make_pruner("question_rows").prune(prune_inputs(store, sample), 4).numpy()
        lives = lvlm.reduce(prompts, tokens, OneCut(QuestionRows(), 1, 4))[0]
        assert keep.tolist() == (lives == LAYERS).tolist()


def test_bad_requests_are_one_sentence(run, capsys):
    start = ["cliff", str(run.store), "--lvlm", str(run.lvlm), "--out", str(run.root / "bad")]
    for words, match in (
        (["--rules", "fastvv"], "did you mean 'fastv'"),
        (["--rules", "sparsevlm"], "does not rank the tokens of a layer alone"),
        (["--rules", "oracle"], "needs relevance, which this store does not hold"),
        (["--counts", "99"], "counts in [1, 16]"),
        (["--layers", "0,3"], "layers must lie in [0, 2]"),
        (["--limit", "0"], "limit must be at least 1"),
        (["--positions", "packed"], "positions must be one of"),
    ):
        assert main([*start, *words]) == 2
        assert match in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not rank"):
        OneCut(SparseVLM(), 1, 3)
    assert isinstance(make_rule("question_rows", FeatureStore.open(run.store)), QuestionRows)
