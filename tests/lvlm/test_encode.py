"""Encoding: once per image, resumable after anything, and the same with Ray."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_lvlm import FakeLVLM, make_samples

import tprl_env.files
from tprl_env.data import BadSampleError, NoSamplesError, load_dataset
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.lvlm.encoding.saliency import add_question_attention, add_question_rows

SMALL = {"batch_size": 2, "shard_images": 3, "progress": False}


def content(folder: Path) -> dict[str, bytes]:
    # a killed process may leave its draft
    whole = (path for path in sorted(folder.iterdir()) if path.suffix != ".tmp")
    return {path.name: path.read_bytes() for path in whole}


def test_each_image_once_and_each_sample_once(tmp_path: Path):
    lvlm = FakeLVLM()
    store = encode_dataset(lvlm, make_samples(7, 3), tmp_path / "s", **SMALL)
    assert lvlm.calls == {"images": 7, "scores": 21}
    assert len(store.manifest.named("images-")) == 3
    again = FakeLVLM()
    assert encode_dataset(again, make_samples(7, 3), tmp_path / "s", **SMALL).fingerprint
    assert again.calls == {}  # finished: nothing to do


def test_questions_far_apart_share_the_image_of_an_earlier_file(tmp_path: Path):
    samples = make_samples(7, 3)
    samples = samples[::3] + samples[1::3] + samples[2::3]
    lvlm = FakeLVLM()
    store = encode_dataset(lvlm, samples, tmp_path / "s", **SMALL)
    assert lvlm.calls["images"] == 7
    straight = encode_dataset(FakeLVLM(), make_samples(7, 3), tmp_path / "t", **SMALL)
    order = [*range(0, 21, 3), *range(1, 21, 3), *range(2, 21, 3)]
    for score_kind in ("exact", "likelihood"):
        expected = straight.full_scores(score_kind)[order]
        np.testing.assert_array_equal(store.full_scores(score_kind), expected)
    np.testing.assert_array_equal(store.tokens(20), straight.tokens(20))


def test_many_questions_about_few_images_make_several_files(tmp_path: Path):
    samples = [replace(make_samples(1, 1)[0], id=str(i)) for i in range(40)]
    store = encode_dataset(FakeLVLM(), samples, tmp_path / "s", shard_images=1, progress=False)
    assert (len(store), store.num_images) == (40, 1)
    assert len(store.manifest.named("samples-")) == 3


def test_tower_can_be_left_out(tmp_path: Path):
    store = encode_dataset(FakeLVLM(), make_samples(2), tmp_path / "s", tower=False, **SMALL)
    assert store.tower(0) is None and store.manifest.tower_width == 0
    assert store.cls_attention(0) is not None


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        ("tokens", "image 'i0': tokens has values that are not finite in float16"),
        ("tower", "image 'i0': tower has values that are not finite"),
        ("query", "sample 's0-0': query_tokens has values that are not finite"),
        ("score", r"sample 's0-1': full likelihood score must be in \[0, 1\], got nan"),
    ],
)
def test_values_that_are_not_finite_are_named(tmp_path: Path, poison: str, message: str):
    with pytest.raises(StoreError, match=message):
        encode_dataset(FakeLVLM(poison=poison), make_samples(2), tmp_path / "s", **SMALL)
    assert not (tmp_path / "s").exists()  # a failure that committed nothing leaves nothing behind


def test_a_failure_removes_only_what_it_made(tmp_path: Path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(StoreError, match="not finite"):
        encode_dataset(FakeLVLM(poison="query"), make_samples(2), tmp_path / "mine", **SMALL)
    assert (tmp_path / "mine").is_dir()
    with pytest.raises(Interrupt):
        encode_dataset(FakeLVLM(), crashing(make_samples(7, 3), 11), tmp_path / "some", **SMALL)
    assert (tmp_path / "some" / "encoding.json").is_file()  # something was committed
    with pytest.raises(StoreError, match=r"unfinished"):
        FeatureStore.open(tmp_path / "some")
    with pytest.raises(Interrupt):
        encode_dataset(FakeLVLM(), crashing(make_samples(7, 3), 2), tmp_path / "none", **SMALL)
    assert not (tmp_path / "none").exists()


def test_no_samples_doubled_ids_and_confused_images(tmp_path: Path):
    with pytest.raises(StoreError, match="no samples to encode"):
        encode_dataset(FakeLVLM(), [], tmp_path / "a", **SMALL)
    samples = make_samples(2)
    with pytest.raises(StoreError, match="id 's0-0' occurs twice"):
        encode_dataset(FakeLVLM(), [*samples, samples[0]], tmp_path / "b", **SMALL)
    samples[1] = replace(samples[1], image=samples[1].image.copy() // 2)
    with pytest.raises(StoreError, match=r"'s0-1' shows another picture .* 'i0'"):
        encode_dataset(FakeLVLM(), samples, tmp_path / "c", **SMALL)


class Interrupt(Exception):
    """Stands for a crash."""


def crashing(samples: list, after: int):
    yield from samples[:after]
    raise Interrupt


def test_resuming_gives_the_same_bytes_and_does_only_the_rest(tmp_path: Path):
    samples = make_samples(7, 3)
    encode_dataset(FakeLVLM(), samples, tmp_path / "whole", description="d", **SMALL)
    out = tmp_path / "resumed"
    with pytest.raises(Interrupt):
        encode_dataset(FakeLVLM(), crashing(samples, 11), out, description="d", **SMALL)
    lvlm = FakeLVLM()
    encode_dataset(lvlm, samples, out, description="d", **SMALL)
    assert lvlm.calls == {"images": 4, "scores": 12}  # one file of 3 images was there
    assert content(out) == content(tmp_path / "whole")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from fake_lvlm import FakeLVLM, make_samples
from tprl_env.lvlm.encoding.encode import encode_dataset
encode_dataset(FakeLVLM(delay=0.15), make_samples(12, 2), {out!r}, batch_size=2,
               shard_images=2, progress=False)
"""


def test_a_killed_process_continues_bit_identically(tmp_path: Path):
    out = tmp_path / "killed"
    code = SCRIPT.format(tests=str(Path(__file__).parents[1] / "helpers"), out=str(out))
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (out / "samples-00001.arrow").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()
    settings = {"batch_size": 2, "shard_images": 2, "progress": False}
    lvlm = FakeLVLM()
    encode_dataset(lvlm, make_samples(12, 2), out, **settings)
    assert 0 < lvlm.calls["images"] < 12
    encode_dataset(FakeLVLM(), make_samples(12, 2), tmp_path / "whole", **settings)
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("write", [1, 4, 7])
def test_full_disk_is_one_sentence_and_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
):
    out, calls = tmp_path / "s", [0]
    real = os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(tprl_env.files.os, "fsync", full)
    with pytest.raises(StoreError, match=r"full .* continues where it stopped") as caught:
        encode_dataset(FakeLVLM(), make_samples(7), out, **SMALL)
    assert "\n" not in str(caught.value)
    assert not list(out.glob("*.tmp"))
    monkeypatch.undo()
    encode_dataset(FakeLVLM(), make_samples(7), out, **SMALL)
    encode_dataset(FakeLVLM(), make_samples(7), tmp_path / "whole", **SMALL)
    files, whole = content(out), content(tmp_path / "whole")
    assert {n: files[n] for n in whole} == whole


def test_other_errors_of_the_system_pass_through(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        encode_dataset(FakeLVLM(), make_samples(1), tmp_path / "file", **SMALL)


def half(tmp_path: Path) -> Path:
    out = tmp_path / "s"
    with pytest.raises(Interrupt):
        samples = crashing(make_samples(7), 15)
        encode_dataset(FakeLVLM(), samples, out, description="d", **SMALL)
    return out


@pytest.mark.parametrize(
    ("lvlm", "samples", "change", "message"),
    [
        (FakeLVLM(fingerprint="x"), make_samples(7), {}, "started with the LVLM fake .*fake-1"),
        (FakeLVLM(dtype="torch.bfloat16"), make_samples(7), {}, "dtype 'float32', not 'bfloat16'"),
        (
            FakeLVLM(image_backend="torchvision"),
            make_samples(7),
            {},
            "image_backend 'pil', not 'torchvision'",
        ),
        (FakeLVLM(), make_samples(7)[1:], {}, r"other samples .* unit 0, from 's0-1' to 's3-0'\)"),
        (FakeLVLM(), make_samples(7)[:3], {}, "started with other samples"),
        (FakeLVLM(), [], {}, "holds more samples than the given ones"),
        (FakeLVLM(), make_samples(7), {"shard_images": 4}, "shard_images 3, not 4"),
        (FakeLVLM(), make_samples(7), {"tower": False}, "tower True, not False"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path: Path, lvlm, samples, change, message):
    out = half(tmp_path)
    with pytest.raises(StoreError, match=rf"{message}.* start over with resume=False"):
        encode_dataset(lvlm, samples, out, **{"description": "d", **SMALL, **change})
    fresh = {"description": "d", **SMALL, **change, "resume": False}
    if samples:
        assert len(encode_dataset(lvlm, samples, out, **fresh)) == len(samples)


def test_the_name_of_the_data_decides_nothing(tmp_path: Path):
    out = half(tmp_path)
    store = encode_dataset(FakeLVLM(), make_samples(7), out, description="e", **SMALL)
    store.write_channel("codes", [np.zeros((store.image_count(i), 2)) for i in range(7)])
    before = content(out)
    lvlm = FakeLVLM()
    store = encode_dataset(lvlm, make_samples(7), out, description="another path", **SMALL)
    assert lvlm.calls == {} and content(out) == before and store.has_channel("codes")


def test_samples_added_at_the_end_are_encoded_and_nothing_else(tmp_path: Path, caplog):
    samples, out = make_samples(10), tmp_path / "s"
    whole = encode_dataset(FakeLVLM(), samples, tmp_path / "whole", **SMALL)
    store = encode_dataset(FakeLVLM(), samples[:16], out, **SMALL)  # ends inside of a picture
    store.write_channel("codes", [np.zeros((store.image_count(i), 2)) for i in range(6)])
    files = {name: data for name, data in content(out).items() if name.endswith("s.arrow")}
    for stop in (17, 17, 30):
        lvlm = FakeLVLM()
        store = encode_dataset(lvlm, samples[:stop], out, **SMALL)
        assert lvlm.calls.get("scores", 0) == {17: 1, 30: 13}[stop] * (len(store) != len(files))
        files = range(len(store))
    assert "made for fewer samples and removed: codes" in caplog.text
    assert "run `tprl autoencoder" in caplog.text and not store.has_channel("codes")
    assert store.manifest.dataset_fingerprint == whole.manifest.dataset_fingerprint
    for i in range(30):
        assert store.id(i) == whole.id(i)
        np.testing.assert_array_equal(store.tokens(i), whole.tokens(i))
    with pytest.raises(StoreError, match=r"(holds more|other) samples.*resume=False"):
        encode_dataset(FakeLVLM(), samples[:17], out, **SMALL)


def test_a_kill_while_a_store_grows_leaves_the_old_one(tmp_path: Path):
    out, samples = tmp_path / "s", make_samples(12)
    old = encode_dataset(FakeLVLM(), samples[:9], out, **SMALL).fingerprint
    with pytest.raises(Interrupt):
        encode_dataset(FakeLVLM(), crashing(samples, 30), out, **SMALL)
    assert FeatureStore.open(out, verify="checksums").fingerprint == old
    assert len(encode_dataset(FakeLVLM(), samples, out, **SMALL)) == 36


def test_starting_over_removes_the_store_s_own_files_only(tmp_path: Path):
    out = tmp_path / "s"
    store = encode_dataset(FakeLVLM(), make_samples(2), out, **SMALL)
    store.write_channel("codes", [np.zeros((store.image_count(i), 2)) for i in range(2)])
    mine = ["channel-notes.txt", "images-of-me.arrow", "samples.txt", "notes.json"]
    for name in mine:
        (out / name).write_text("mine")
    (out / "autoencoder").mkdir()
    (out / ".images-00001.arrow-77.tmp").write_text("draft")
    encode_dataset(FakeLVLM(fingerprint="x"), make_samples(1), out, resume=False, **SMALL)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*mine, "autoencoder", "encoding.json", "images-00000.arrow", "manifest.json",
         "samples-00000.arrow"]
    )  # fmt: skip


def forget_computing(folder: Path) -> None:
    """Make of a store what the first release wrote."""
    for name, place in (("encoding.json", "lvlm"), ("manifest.json", None)):
        if (folder / name).exists():
            whole = json.loads((folder / name).read_text())
            for field in ("dtype", "image_backend"):
                del (whole[place] if place else whole)[field]
            del whole["checksum"]
            (folder / name).write_text(json.dumps(whole))


def test_how_an_lvlm_computed_is_in_the_manifest(tmp_path: Path):
    lvlm = FakeLVLM(dtype="torch.bfloat16", image_backend="torchvision")
    store = encode_dataset(lvlm, make_samples(2), tmp_path / "s", **SMALL)
    assert (store.manifest.dtype, store.manifest.image_backend) == ("bfloat16", "torchvision")
    other = encode_dataset(FakeLVLM(), make_samples(2), tmp_path / "t", **SMALL)
    assert store.fingerprint != other.fingerprint
    with pytest.raises(StoreError, match=r"continue with that one \(dtype=bfloat16\), start"):
        encode_dataset(FakeLVLM(), make_samples(2), tmp_path / "s", **SMALL)


def test_stores_that_did_not_record_it_still_open(tmp_path: Path):
    first = encode_dataset(FakeLVLM(), make_samples(2), tmp_path / "s", **SMALL)
    forget_computing(tmp_path / "s")
    old = FeatureStore.open(tmp_path / "s")
    assert old.manifest.dtype == "" and old.fingerprint != first.fingerprint
    lvlm = FakeLVLM()
    again = encode_dataset(lvlm, make_samples(2), tmp_path / "s", **SMALL)
    assert lvlm.calls == {} and again.fingerprint == old.fingerprint
    out = half(tmp_path / "half")
    forget_computing(out)
    with pytest.raises(StoreError, match=r"did not record the number type.* another folder"):
        encode_dataset(FakeLVLM(), make_samples(7), out, description="d", **SMALL)


def test_starting_over_forgets_channels(tmp_path: Path):
    store = encode_dataset(FakeLVLM(), make_samples(2), tmp_path / "s", **SMALL)
    store.write_channel("codes", [np.zeros((store.image_count(i), 2)) for i in range(2)])
    store = encode_dataset(FakeLVLM(), make_samples(3), tmp_path / "s", resume=False, **SMALL)
    assert store.num_images == 3 and not store.has_channel("codes")


def test_damaged_unfinished_state_is_refused(tmp_path: Path):
    out = half(tmp_path)
    (out / "images-00000.arrow").write_bytes(b"")
    with pytest.raises(StoreError, match=r"images-00000.arrow has 0 bytes.*resume=False"):
        encode_dataset(FakeLVLM(), make_samples(7), out, description="d", **SMALL)
    (out / "encoding.json").write_text("{")
    with pytest.raises(StoreError, match=r"encoding.json is damaged.*resume=False"):
        encode_dataset(FakeLVLM(), make_samples(7), out, description="d", **SMALL)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("")
    for resume in (True, False):
        with pytest.raises(StoreError, match=r"not empty .*'thesis.tex'"):
            encode_dataset(FakeLVLM(), make_samples(1), tmp_path, resume=resume, **SMALL)


def jsonl_with_a_gap(folder: Path) -> Path:
    from PIL import Image

    lines = []
    for i in range(4):
        if i != 2:
            Image.new("RGB", (8, 8), (i, 50, 90)).save(folder / f"{i}.png")
        lines.append(f'{{"id": "{i}", "image": "{i}.png", "question": "q", "answers": ["a"]}}')
    (folder / "d.jsonl").write_text("\n".join(lines))
    return folder / "d.jsonl"


def test_bad_samples_stop_or_are_counted(tmp_path: Path):
    path = jsonl_with_a_gap(tmp_path)
    with pytest.raises(BadSampleError, match=r"sample '2' .*2.png"):
        encode_dataset(FakeLVLM(), load_dataset(path), tmp_path / "a", **SMALL)
    for number, dataset in enumerate((load_dataset(path), load_dataset(path, skip_bad=True))):
        out = tmp_path / f"b{number}"
        store = encode_dataset(FakeLVLM(), dataset, out, skip_bad=True, **SMALL)
        assert [store.id(i) for i in range(3)] == ["0", "1", "3"]
        assert store.manifest.skipped == 1
        assert store.manifest.dataset == "d.jsonl"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("twice", [False, True])
def test_when_every_sample_is_bad_encoding_ends_with_one_sentence(tmp_path: Path, caplog, twice):
    rows = [f'{{"id": "{i}", "image": "no.png", "question": "q", "answers": ["a"]}}\n'
            for i in range(30)]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(rows))
    dataset = load_dataset(tmp_path / "d.jsonl", skip_bad=twice)
    with pytest.raises(NoSamplesError, match=r"no sample .*is left: .* first because: .*no.png"):
        encode_dataset(FakeLVLM(), dataset, tmp_path / "s", skip_bad=True, **SMALL)
    assert len(caplog.records) <= 11


@pytest.mark.timeout(30)
def test_an_iterator_that_does_not_go_on_is_left(tmp_path: Path):
    class Stuck:
        def __iter__(self):
            return self

        def __next__(self):
            raise BadSampleError("sample 'x' is bad")

    with pytest.raises(BadSampleError, match="'x'"):
        encode_dataset(FakeLVLM(), Stuck(), tmp_path / "s", skip_bad=True, **SMALL)


def test_a_generator_that_dies_is_never_taken_for_its_end(tmp_path: Path):
    def samples():
        yield from make_samples(1)
        raise BadSampleError("sample 'x' is bad")

    with pytest.raises(BadSampleError, match="'x'"):
        encode_dataset(FakeLVLM(), samples(), tmp_path / "s", skip_bad=True, **SMALL)


def test_question_attention_channel(tmp_path: Path):
    store = encode_dataset(FakeLVLM(), make_samples(3), tmp_path / "s", **SMALL)
    add_question_attention(store, FakeLVLM(), batch_size=4)
    again = FeatureStore.open(tmp_path / "s", verify="checksums")
    expected = store.tokens(5)[:, 0].astype(np.float32) + len(store.prompt_ids(5))
    np.testing.assert_array_equal(again.channel("question_attention", 5), expected)
    assert again.channel_meta("question_attention")["lvlm_fingerprint"] == "fake-1"
    with pytest.raises(StoreError, match=r"encoded by the LVLM fake .*not by fake"):
        add_question_attention(store, FakeLVLM(fingerprint="other"))


def test_question_rows_channel(tmp_path: Path):
    store = encode_dataset(FakeLVLM(), make_samples(3), tmp_path / "s", **SMALL)
    add_question_rows(store, FakeLVLM(), layer=2, batch_size=4)
    again = FeatureStore.open(tmp_path / "s", verify="checksums")
    expected = store.tokens(5)[:, 1].astype(np.float32) + 2 + len(store.prompt_ids(5))
    np.testing.assert_array_equal(again.channel("question_rows", 5), expected)
    assert again.channel_meta("question_rows")["layer"] == 2
    with pytest.raises(StoreError, match=r"encoded by the LVLM fake .*not by fake"):
        add_question_rows(store, FakeLVLM(fingerprint="other"))


@pytest.mark.parametrize("field", ["batch_size", "shard_images"])
def test_sizes_below_one(tmp_path: Path, field: str):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        encode_dataset(FakeLVLM(), make_samples(1), tmp_path / "s", **{field: 0})


@pytest.mark.slow
def test_ray_gives_the_same_files(tmp_path: Path):
    ray = pytest.importorskip("ray")
    import fake_lvlm

    from tprl_env.lvlm.encoding.encode_with_ray import encode_dataset_ray

    # The workers do not have the tests on their path.
    ray.cloudpickle.register_pickle_by_value(fake_lvlm)
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        samples = make_samples(12, 2)
        encode_dataset(FakeLVLM(), samples, tmp_path / "local", **SMALL)
        for wave_bytes in (1, 1 << 30):
            out = tmp_path / f"ray{wave_bytes}"
            options = {"concurrency": 1, "wave_bytes": wave_bytes, **SMALL}
            few = samples[:6] if wave_bytes == 1 else samples
            store = encode_dataset_ray(fake_lvlm.FakeLVLM, few, out, **options)
            assert len(store) == len(few)
        assert content(out) == content(tmp_path / "local")
        with pytest.raises(StoreError, match="other samples"):
            encode_dataset_ray(fake_lvlm.FakeLVLM, samples[2:], out, **SMALL)
        with pytest.raises(ValueError, match="wants 8 GPU, the whole Ray cluster has"):
            encode_dataset_ray(fake_lvlm.FakeLVLM, few, tmp_path / "g", num_gpus=8, **SMALL)

        def poisoned() -> fake_lvlm.FakeLVLM:
            return fake_lvlm.FakeLVLM(poison="query")

        with pytest.raises(StoreError, match="'s0-0': query_tokens has values that are not finite"):
            encode_dataset_ray(poisoned, few[:4], tmp_path / "p", **SMALL)

        def unloadable() -> fake_lvlm.FakeLVLM:
            raise OSError("no such checkpoint")

        with pytest.raises(StoreError, match=r"^an encoding worker failed \(") as caught:
            encode_dataset_ray(unloadable, few[:4], tmp_path / "u", **SMALL)
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "p").exists() and not (tmp_path / "u").exists()

        class Picky(fake_lvlm.FakeLVLM):
            def prompt(self, question):
                if "this this" in question:
                    raise ValueError("too much")
                return super().prompt(question)

        with pytest.raises(
            BadSampleError, match="sample 's0-1': too much; repair it or pass skip_bad=True"
        ):
            encode_dataset_ray(Picky, few[:4], tmp_path / "q", **SMALL)
        store = encode_dataset_ray(Picky, few[:4], tmp_path / "r", skip_bad=True, **SMALL)
        assert store.manifest.skipped == 2
        assert (tmp_path / "r" / "skipped.jsonl").read_text().count("too much") == 2
    finally:
        if started_here:
            ray.shutdown()
        ray.cloudpickle.unregister_pickle_by_value(fake_lvlm)
