"""The feature store: what goes in comes out, and what is damaged is refused by name."""

from __future__ import annotations

import json
import pickle
import shutil
import time
from pathlib import Path

import damage
import numpy as np
import pytest
from fake_lvlm import FakeLVLM, make_samples

from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore, open_source
from tprl_env.data.features.toy import ToyStore
from tprl_env.lvlm.encoding.encode import encode_dataset


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s"
    store = encode_dataset(
        FakeLVLM(), make_samples(), path, batch_size=2, shard_images=3, progress=False
    )
    codes = [np.full((store.image_count(i), 4), i + 1, np.float32) for i in range(7)]
    store.write_channel("codes", codes, meta={"fingerprint": "ae"}, dtype="float16")
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_rows_come_back_as_they_were_encoded(made: Path):
    store, lvlm = FeatureStore.open(made), FakeLVLM()
    samples = make_samples()
    assert (len(store), store.num_images, store.max_tokens, store.max_question_tokens) == (
        21, 7, 10, 5,
    )  # fmt: skip
    for number, sample in enumerate(samples):
        (visual,) = lvlm.encode_images([sample.image])
        prompt = lvlm.prompt(sample.question)
        assert store.image_number(number) == number // 3
        np.testing.assert_array_equal(store.tokens(number), visual.tokens.astype(np.float16))
        np.testing.assert_array_equal(store.tower(number), visual.tower.astype(np.float16))
        np.testing.assert_array_equal(store.cls_attention(number), visual.cls_attention)
        np.testing.assert_array_equal(store.picture(number), sample.image)
        assert store.grid(number) == visual.grid
        assert tuple(store.prompt_ids(number)) == prompt.ids
        assert store.question_span(number) == prompt.question_span
        ids = [tuple(a) for a in store.answer_ids(number)]
        assert ids == [lvlm.answer_ids(prompt, a) for a in sample.answers]
        assert (store.id(number), store.question_type(number)) == (sample.id, sample.question_type)
        assert (store.question(number), store.answers(number)) == (sample.question, sample.answers)
        assert store.grader(number) == "exact"
        relevance = store.relevance(number)
        assert (relevance is None) == (sample.relevance is None)
        if relevance is not None:
            np.testing.assert_array_equal(relevance, sample.relevance)


def test_batches_are_padded_with_zeros_and_false(made: Path):
    store = FeatureStore.open(made)
    numbers = np.array([9, 0, 20, 9])  # images 3, 0, 6, 3 with 10, 4, 8, 10 tokens
    exists, codes = store.exists(numbers), store.codes(numbers)
    assert exists.dtype == np.bool_ and exists.sum(1).tolist() == [10, 4, 8, 10]
    assert codes.dtype == np.float32 and codes.shape == (4, 10, 4)
    np.testing.assert_array_equal(codes[..., 0], exists * np.array([[4], [1], [7], [4]]))
    tokens, exist = store.query_tokens(numbers)
    assert tokens.shape == (4, 5, 6) and exist.sum(1).tolist() == [3, 3, 5, 3]
    assert not tokens[~exist].any()
    mean = tokens.sum(1) / exist.sum(1)[:, None]
    np.testing.assert_allclose(store.query(numbers), mean, atol=1e-6)


def test_uniform_codes_take_the_dense_path_and_agree(tmp_path: Path):
    store = encode_dataset(
        FakeLVLM(), make_samples(5, vary=False), tmp_path / "s", shard_images=2, progress=False
    )
    given = np.random.default_rng(0).normal(size=(5, 6, 3)).astype(np.float32)
    store.write_channel("codes", given)
    numbers = np.array([14, 0, 3, 3])
    np.testing.assert_array_equal(store.codes(numbers), given[[4, 0, 1, 1]])
    assert store.exists(numbers).all()


def test_full_scores_and_unknown_metric(made: Path):
    store = FeatureStore.open(made)
    exact = store.full_scores("exact")
    assert exact.dtype == np.float32 and exact.shape == (21,)
    assert 0 < store.full_scores("likelihood").min() < 1
    exact[:] = 5  # a copy: the store is not touched
    assert store.full_scores("exact").max() <= 1
    with pytest.raises(ValueError, match="'exact', 'likelihood', 'graded', got 'f1'"):
        store.full_scores("f1")


@pytest.mark.parametrize("numbers", [[-1], [21], [[0]]])
def test_sample_numbers_outside_are_refused(made: Path, numbers: list):
    store = FeatureStore.open(made)
    for method in (store.exists, store.codes, store.query, store.query_tokens):
        with pytest.raises((IndexError, ValueError), match=r"sample"):
            method(numbers)


def test_pickles_by_spec(made: Path):
    store = FeatureStore.open(made)
    data = pickle.dumps(store)
    assert len(data) < 400
    again = pickle.loads(data)
    assert again.fingerprint == store.fingerprint
    np.testing.assert_array_equal(again.codes([3]), store.codes([3]))
    assert open_source(store.location).fingerprint == store.fingerprint


def test_unpickling_refuses_a_store_that_changed(copy: Path):
    store = FeatureStore.open(copy)
    data = pickle.dumps(store)
    store.write_channel("codes", [np.zeros((store.image_count(i), 2)) for i in range(7)])
    with pytest.raises(StoreError, match="changed since it was sent"):
        pickle.loads(data)


def test_open_source_knows_toys():
    assert isinstance(open_source("toy:samples=3,tokens=4"), ToyStore)
    with pytest.raises(StoreError, match="does not exist"):
        open_source("no-such-folder")


def test_views_are_read_only(made: Path):
    with pytest.raises(ValueError, match="read-only"):
        FeatureStore.open(made).tokens(0)[0, 0] = 1


FILES = ["images-00001.arrow", "samples-00000.arrow", "channel-codes.arrow"]


@pytest.mark.parametrize("name", [*FILES, "channel-codes.json", "manifest.json"])
def test_truncated_file_is_named(copy: Path, name: str):
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match=name):
        FeatureStore.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(copy: Path, name: str):
    (copy / name).unlink()
    with pytest.raises(StoreError, match=rf"{name} is missing"):
        FeatureStore.open(copy)


@pytest.mark.parametrize("name", FILES)
def test_flipped_byte_is_found_by_checksums(copy: Path, name: str):
    FeatureStore.open(copy, verify="checksums")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(StoreError, match=rf"{name} does not have its recorded checksum"):
        FeatureStore.open(copy, verify="checksums")


def test_unknown_verify(made: Path):
    with pytest.raises(ValueError, match="'sizes', 'checksums', got 'maybe'"):
        FeatureStore.open(made, verify="maybe")  # type: ignore[arg-type]


def test_unfinished_store_says_how_to_finish(copy: Path):
    (copy / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"unfinished.*continues where it stopped"):
        FeatureStore.open(copy)


def test_foreign_folders(tmp_path: Path):
    with pytest.raises(StoreError, match="is not a feature store"):
        FeatureStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="belongs to something else"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "format version 99, this package reads versions 1 and 2"),
        ({"extra": 1}, "extra"),
        ({"files": {"a": {"rows": 1}}}, "table of files is malformed"),
    ],
)
def test_manifests_of_another_make(copy: Path, change: dict, message: str):
    content = json.loads((copy / "manifest.json").read_text())
    damage.rewrite(copy / "manifest.json", {**content, **change})
    with pytest.raises(StoreError, match=message):
        FeatureStore.open(copy)


def test_other_lvlm_is_refused(made: Path):
    FeatureStore.open(made, lvlm_fingerprint="fake-1")
    with pytest.raises(StoreError, match="encoded by the LVLM fake with fingerprint fake-1"):
        FeatureStore.open(made, lvlm_fingerprint="other")


def test_codes_of_another_autoencoder_are_refused(made: Path):
    FeatureStore.open(made, autoencoder_fingerprint="ae")
    with pytest.raises(StoreError, match=r"codes of the autoencoder ae, .* needs those of mine"):
        FeatureStore.open(made, autoencoder_fingerprint="mine")


def test_codes_before_the_autoencoder_name_the_cure(tmp_path: Path):
    store = encode_dataset(FakeLVLM(), make_samples(2), tmp_path / "s", progress=False)
    for ask in (lambda: store.codes([0]), lambda: store.code_width):
        with pytest.raises(StoreError, match=r"has no 'codes'; run `tprl autoencoder "):
            ask()
    assert not store.has_channel("codes")


def arrays(store: FeatureStore) -> list[np.ndarray]:
    return [np.zeros((store.image_count(i), 2), np.float32) for i in range(store.num_images)]


def break_nan(values: list) -> None:
    values[2][1, 0] = np.nan


def break_overflow(values: list) -> None:
    values[2][1, 0] = 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_nan, "image 'i2' has values that are not finite"),
        (break_overflow, "not finite in float16"),
        (lambda v: v.pop(), "6 arrays for the store's 7 images"),
        (lambda v: v.append(v[0]), "more arrays than the store's 7 images"),
        (lambda v: v.__setitem__(3, v[0]), r"'i3' has shape \(4, 2\), expected \(10, 2\)"),
    ],
)
def test_bad_channels_leave_the_old_one(copy: Path, change, message: str):
    store = FeatureStore.open(copy)
    before, names = store.codes([5]), sorted(p.name for p in copy.iterdir())
    values = arrays(store)
    change(values)
    with pytest.raises(StoreError, match=message):
        store.write_channel("codes", values, dtype="float16")
    np.testing.assert_array_equal(FeatureStore.open(copy).codes([5]), before)
    assert sorted(p.name for p in copy.iterdir()) == names


def test_channel_per_sample_and_fingerprint(copy: Path):
    store = FeatureStore.open(copy)
    before = store.fingerprint
    given = [np.full(store.tokens(i).shape[0], i, np.float32) for i in range(21)]
    store.write_channel("question_attention", iter(given), per="sample", meta={"by": "me"})
    assert store.fingerprint != before
    again = FeatureStore.open(copy, verify="checksums")
    assert again.fingerprint == store.fingerprint
    assert again.channel_meta("question_attention") == {"by": "me"}
    np.testing.assert_array_equal(again.channel("question_attention", 20), given[20])


def test_channel_names_and_kinds(copy: Path):
    store = FeatureStore.open(copy)
    for fields, message in (
        ({"name": "../x"}, "small letters"),
        ({"name": "x", "dtype": "int8"}, "float16 or float32"),
        ({"name": "x", "meta": {"a": {1, 2}}}, "JSON values"),
    ):
        with pytest.raises(StoreError, match=message):
            store.write_channel(arrays=arrays(store), **fields)


def test_channel_of_another_store(copy: Path):
    content = json.loads((copy / "channel-codes.json").read_text())
    damage.rewrite(copy / "channel-codes.json", {**content, "store": "other"})
    with pytest.raises(StoreError, match="belongs to another feature store"):
        FeatureStore.open(copy)


def test_channel_without_its_json_does_not_exist(copy: Path):
    (copy / "channel-codes.json").unlink()
    assert not FeatureStore.open(copy).has_channel("codes")


def test_opening_a_large_store_reads_little(tmp_path: Path):
    """6000 samples, 60 files: opening must not depend on the rows."""
    samples = make_samples(60, questions=1, vary=False)
    many = [
        type(s)(**{**vars(s), "id": f"{s.id}/{k}", "question": "what is this"})
        for s in samples
        for k in range(100)
    ]
    path = tmp_path / "s"
    encode_dataset(FakeLVLM(), many, path, batch_size=512, shard_images=2, progress=False)
    started = time.perf_counter()
    store = FeatureStore.open(path)
    seconds = time.perf_counter() - started
    assert len(store) == 6000 and len(store.manifest.files) > 60
    assert seconds < 1.0
    assert store.tokens(3000).base is not None  # a view, not a copy
