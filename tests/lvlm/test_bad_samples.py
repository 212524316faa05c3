"""Samples that an LVLM cannot be asked: named, skippable, counted, listed; never half a store."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_lvlm import FakeLVLM, make_samples
from lvlm_fixtures import LLAVA15_CHAT_TEMPLATE, NUM_TOKENS, pictures, save_llava
from small_run import write_dataset, write_jsonl

from tprl_env.cli.commands import main
from tprl_env.data import BadSampleError, load_dataset
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore
from tprl_env.data.jsonl import NoSamplesError
from tprl_env.inference import PrunedLVLM
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.loading.prompts import MAX_CHARACTERS
from tprl_env.reducers import make_pruner

torch.set_num_threads(1)
GOOD = {"image": "0.png", "question": "what digit is at c1 ?", "answers": ["7"]}
BAD = [
    ({"question": "what is <image> ?"}, "contains the image placeholder '<image>'"),
    ({"question": "what digit </s> is at c1 ?"}, "contains the special token '</s>'"),
    ({"question": "<s> what digit"}, "contains the special token '<s>'"),
    ({"question": "what <pad>"}, "contains the special token '<pad>'"),
    ({"question": "zebra okapi"}, "has no word that this LVLM's vocabulary knows"),
    ({"question": "what " * 5000}, "has 24999 characters"),
    ({"question": "what " * 300}, "need 320 places, lvlm has 256 (max_position_embeddings)"),
    ({"answers": ["zebra"]}, "this LVLM's vocabulary cannot express it"),
    ({"answers": ["7", "</s>"]}, "this LVLM's vocabulary cannot express it"),
    ({"answers": ["7 " * 250]}, "need 275 places, lvlm has 256"),
    ({"image": "gone.png"}, "cannot read the image"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("bad") / "lvlm")


@pytest.fixture(scope="module")
def lvlm(folder):
    return load_lvlm(folder, device="cpu")


def dataset(folder: Path, *changes: dict, good: int = 2) -> Path:
    write_dataset(folder, images=1)
    rows = [{**GOOD, "id": f"g{i}"} for i in range(good)]
    rows[1:1] = [{**GOOD, "id": f"b{i}", **change} for i, change in enumerate(changes)]
    return write_jsonl(folder / "mixed.jsonl", rows)


def encode(data: Path, lvlm: Path, out: Path, *more: str) -> int:
    return main(["encode", "--data", str(data), "--lvlm", str(lvlm), "--out", str(out), *more])


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_a_bad_sample_is_named_with_its_file_and_line(lvlm, tmp_path, change, reason):
    data = dataset(tmp_path, change)
    with pytest.raises(BadSampleError) as caught:
        encode_dataset(lvlm, load_dataset(data), tmp_path / "s", progress=False)
    said = str(caught.value)
    assert reason in said and "sample 'b0'" in said and "mixed.jsonl line 2" in said
    assert "skip_bad=True" in said and "--skip-bad" not in said and len(said) < 600
    assert caught.value.sample == "b0"


def test_the_command_line_names_its_flag(folder, tmp_path, capsys):
    data = dataset(tmp_path, BAD[0][0])
    assert encode(data, folder, tmp_path / "s") == 2
    said = capsys.readouterr().err
    assert "pass --skip-bad" in said and "skip_bad" not in said


def test_the_command_skips_counts_and_lists_them(folder, tmp_path, capsys):
    data = dataset(tmp_path, *(change for change, _ in BAD))
    assert encode(data, folder, tmp_path / "s", "--skip-bad") == 0
    assert f"; {len(BAD)} bad samples left out" in capsys.readouterr().out
    store = FeatureStore.open(tmp_path / "s")
    assert [store.id(i) for i in range(len(store))] == ["g0", "g1"]
    assert store.manifest.skipped == len(BAD)
    lines = (tmp_path / "s" / "skipped.jsonl").read_text(encoding="utf-8").splitlines()
    listed = {one["id"]: one["reason"] for one in map(json.loads, lines)}
    assert listed.keys() == {f"b{i}" for i in range(len(BAD))}
    for i, (_, reason) in enumerate(BAD):
        assert reason in listed[f"b{i}"]


def test_the_rest_is_scored_as_it_would_be_alone(lvlm, tmp_path):
    mixed = encode_dataset(
        lvlm,
        load_dataset(dataset(tmp_path / "m", BAD[1][0], BAD[6][0])),
        tmp_path / "s",
        skip_bad=True,
        progress=False,
    )
    clean = encode_dataset(
        lvlm, load_dataset(dataset(tmp_path / "c")), tmp_path / "t", progress=False
    )
    for kind in ("exact", "likelihood"):
        np.testing.assert_array_equal(mixed.full_scores(kind), clean.full_scores(kind))
    assert not (tmp_path / "t" / "skipped.jsonl").exists()


def test_only_bad_samples_end_in_a_sentence(folder, tmp_path, capsys):
    """They used to be read for ever when both the dataset and the encoding skipped."""
    write_dataset(tmp_path, images=1)
    for number, change in enumerate(({"question": "zebra"}, {"image": "gone.png"})):
        data = write_jsonl(tmp_path / f"{number}.jsonl", [{**GOOD, "id": "b", **change}])
        assert encode(data, folder, tmp_path / "s", "--skip-bad") == 2
        assert "every sample was left out, the first because: sample 'b'" in capsys.readouterr().err
        assert not (tmp_path / "s").exists()
    with pytest.raises(NoSamplesError, match="every sample was left out"):
        both = load_dataset(data, skip_bad=True)
        encode_dataset(FakeLVLM(), both, tmp_path / "t", skip_bad=True, progress=False)


class Picky(FakeLVLM):
    """Cannot be asked about "this this"."""

    def prompt(self, question):
        if "this this" in question:
            raise ValueError("this this is too much")
        return super().prompt(question)


def test_a_resumed_encoding_lists_the_same(tmp_path):
    settings = {"batch_size": 2, "shard_images": 2, "progress": False, "description": "d"}
    samples = make_samples(7, 3)
    whole = encode_dataset(Picky(), samples, tmp_path / "whole", skip_bad=True, **settings)

    def crashing():
        yield from samples[:14]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(Picky(), crashing(), tmp_path / "s", skip_bad=True, **settings)
    assert not (tmp_path / "s" / "skipped.jsonl").exists()
    again = encode_dataset(Picky(), samples, tmp_path / "s", skip_bad=True, **settings)
    assert again.fingerprint == whole.fingerprint and len(again) == 7
    assert again.manifest.skipped == 14
    for name in ("skipped.jsonl", "manifest.json"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(BadSampleError, match=r"sample 's0-1': this this is too much; repair it"):
        encode_dataset(Picky(), samples, tmp_path / "t", **settings)


def test_an_image_may_lose_all_its_questions(tmp_path):
    samples = make_samples(3, 2)
    samples[:2] = [replace(s, question="this this") for s in samples[:2]]
    options = {"skip_bad": True, "shard_images": 1, "progress": False}
    store = encode_dataset(Picky(), samples[:3] + samples[4:5], tmp_path / "s", **options)
    assert [store.id(i) for i in range(len(store))] == ["s1-0", "s2-0"]
    assert [store.image_number(i) for i in range(2)] == [1, 2]
    with pytest.raises(StoreError, match=r"every sample was left out, .* 's0-0'"):
        encode_dataset(Picky(), samples[:2], tmp_path / "t", **options)
    assert not (tmp_path / "t").exists()


# ---------- context


def test_what_does_not_fit_into_the_context_is_refused(lvlm):
    visual = lvlm.encode_images(pictures(1))[0].tokens
    short, long = lvlm.prompt("what"), lvlm.prompt("what " * 236)
    places = len(long.ids) - 1 + NUM_TOKENS
    assert places == 255
    fits, over = [[7, 2]], [[7, 8, 2]]
    assert lvlm.score([short, long], [fits, fits], [visual] * 2).sequences == 2
    message = "row 1: .* need 257 places, the language model has 256"
    with pytest.raises(ValueError, match=message):
        lvlm.score([short, long], [fits, over], [visual] * 2)
    assert len(lvlm.generate([short, long], [visual] * 2, max_new_tokens=2)) == 2
    with pytest.raises(ValueError, match=message):
        lvlm.generate([short, long], [visual] * 2, max_new_tokens=3)
    nothing = [np.zeros(NUM_TOKENS, bool)]
    with pytest.raises(ValueError, match="need 257 places"):  # dropped tokens keep their places
        lvlm.generate([long], [visual], nothing, 3)
    assert lvlm.generate([long], [visual], nothing, 3, positions="contiguous")
    with pytest.raises(ValueError, match="need 303 places"):
        lvlm.question_attention([lvlm.prompt("what " * 284)], [visual])


def test_a_pruned_lvlm_refuses_it_too(lvlm):
    model = PrunedLVLM(lvlm, make_pruner("uniform"))
    with pytest.raises(ValueError, match="need 338 places, the language model has 256"):
        model.answer(pictures(1)[0], "what " * 300, budget=4)


# ---------- bounded


def test_nested_loops_in_a_template_end(tmp_path):
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    save_llava(tmp_path / "c", chat_template=loops + LLAVA15_CHAT_TEMPLATE)
    with pytest.raises(ValueError, match="chat template loops too long"):
        load_lvlm(tmp_path / "c", device="cpu")
    save_llava(tmp_path / "d", chat_template="{{ messages[0].nothing.at_all }}")
    with pytest.raises(ValueError, match=r"chat template cannot be rendered \("):
        load_lvlm(tmp_path / "d", device="cpu")


def test_a_megabyte_is_refused_before_it_is_tokenised(lvlm, monkeypatch):
    prompt = lvlm.prompt("what")
    monkeypatch.setattr(lvlm._prompter, "_tokenizer", None)
    with pytest.raises(ValueError, match=f"has 1000000 characters .* more than {MAX_CHARACTERS}"):
        lvlm.prompt("what " * 199_999 + "what!")
    with pytest.raises(ValueError, match="the answer has 999999 characters"):
        lvlm.answer_ids(prompt, "7 " * 500_000)


# ---------- an LVLM that cannot do the task


def test_a_mean_score_of_nothing_is_a_warning_with_answers(lvlm, tmp_path, caplog):
    data = write_dataset(tmp_path / "d", images=2, answers=["9 9 9 9"] * 4)
    encode_dataset(lvlm, load_dataset(data), tmp_path / "s", progress=False)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "answers 0.0 % of" in said
    assert [f"'q{i}': said " in said for i in range(4)] == [True, True, True, False]
    assert said.count("expected '9 9 9 9'") == 3


def test_a_fair_score_is_none(tmp_path, caplog):
    class Fair(FakeLVLM):
        def score(self, *args, **kwargs):
            scores = super().score(*args, **kwargs)
            scores.exact[:1] = 1
            return scores

    encode_dataset(Fair(), make_samples(3), tmp_path / "s", progress=False)
    assert not caplog.records
