"""A damaged store is refused or read as it stands; it never ends the process or moves rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import damage
import numpy as np
import pyarrow as pa
import pytest
from fake_lvlm import FakeLVLM, make_samples

from tprl_env.data.features import manifest
from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm.encoding.encode import encode_dataset

HUGE = 10**9


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "s"
    store = encode_dataset(
        FakeLVLM(), make_samples(), path, batch_size=2, shard_images=3, progress=False
    )
    store.write_channel("codes", [np.ones((store.image_count(i), 4)) for i in range(7)])
    return path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["images-00001.arrow", "samples-00000.arrow"])
def test_one_bad_byte_never_ends_the_process(copy: Path, name: str):
    """In a process of its own: a wrong offset, unchecked, is a segmentation fault."""
    command = [sys.executable, damage.__file__, str(copy), name, "160", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, read = map(int, done.stdout.split())
    assert refused > 20 and read > 20  # flips of values are the checksums' business


def test_a_wrong_offset_with_the_right_checksum_is_refused(copy: Path):
    data = (copy / "samples-00000.arrow").read_bytes()
    ids = "".join(f"s{i}-{j}" for i in range(3) for j in range(3)).encode()
    texts = data.index(ids)
    offsets = data.rindex(np.arange(0, 37, 4, dtype="<i4").tobytes(), 0, texts)
    broken = bytearray(data)
    broken[offsets + 4 * 5 + 3] = 0x40  # 2**30 bytes behind the texts
    damage.with_right_checksum(copy, "samples-00000.arrow", bytes(broken))
    for path in copy.glob("channel-*"):  # they belong to the manifest as it was
        path.unlink()
    with pytest.raises(StoreError, match=r"samples-00000.arrow is not a readable Arrow file"):
        FeatureStore.open(copy, verify="checksums")


@pytest.mark.parametrize("value", [HUGE, 10**30, -1, 1, True, "8", None, 2.5])
@pytest.mark.parametrize(
    "field",
    [
        *("samples", "images", "max_tokens", "max_question_tokens"),
        *("token_width", "tower_width", "query_width"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused_at_once(
    copy: Path, field: str, value: object
):
    content = json.loads((copy / "manifest.json").read_text())
    damage.rewrite(copy / "manifest.json", {**content, field: value})
    for path in copy.glob("channel-*"):
        path.unlink()
    begun = time.monotonic()
    with pytest.raises(StoreError, match=r"damaged|the manifest of") as caught:
        FeatureStore.open(copy)
    assert time.monotonic() - begun < 2 and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "change",
    [
        {"skipped": -1},
        {"lvlm": 5},
        {"packages": []},
        {"files": {"../../etc/passwd": {"rows": 1, "bytes": 1, "sha256": ""}}},
        {"files": {"images-00000.arrow": {"rows": HUGE**3, "bytes": 1, "sha256": ""}}},
        {"files": {"images-00000.arrow": {"rows": 1, "bytes": 1}}},
        {"files": {}},
    ],
)
def test_other_edits_of_a_manifest_are_refused(copy: Path, change: dict):
    content = json.loads((copy / "manifest.json").read_text())
    damage.rewrite(copy / "manifest.json", {**content, **change})
    with pytest.raises(StoreError, match=r"damaged|the manifest of"):
        FeatureStore.open(copy)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"version": ' + "9" * 5000 + "}", "\ud83d"])
def test_json_that_python_cannot_read_is_damage(copy: Path, text: str):
    (copy / "manifest.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(StoreError, match=r"manifest.json is damaged or unreadable"):
        FeatureStore.open(copy)


@pytest.mark.parametrize(
    "change",
    [
        *({"width": value} for value in (HUGE, 2, 0, -4, True, "4")),
        *({"per": value} for value in ("sample", "token", None, [])),
        {"meta": []},
        {"name": "cods"},
        {"file": {"rows": 7, "bytes": 10**30, "sha256": ""}},
    ],
)
def test_a_channel_that_does_not_fit_is_refused(copy: Path, change: dict):
    path = copy / "channel-codes.json"
    damage.rewrite(path, {**json.loads(path.read_text()), **change})
    with pytest.raises(StoreError, match=r"channel-codes.*write the channel again"):
        FeatureStore.open(copy)


def test_a_damaged_picture_is_named(copy: Path):
    name = "images-00000.arrow"
    data = (copy / name).read_bytes()
    damage.with_right_checksum(copy, name, data.replace(b"\x89PNG", b"\x89PNH"))
    for path in copy.glob("channel-*"):
        path.unlink()
    with pytest.raises(StoreError, match=r"the picture of sample 0 in .* is damaged"):
        FeatureStore.open(copy).picture(0)


def everything(folder: Path) -> list[object]:
    """All that a store gives, to compare it with what it gave before."""
    store = FeatureStore.open(folder, verify="checksums")
    every = np.arange(len(store))
    arrays = [
        store.exists(every),
        store.codes(every),
        store.query(every),
        store.full_scores("exact"),
    ]
    return [store.manifest, store.fingerprint, *(array.tobytes() for array in arrays)]


def test_a_flipped_bit_in_any_file_is_refused_or_changes_nothing(copy: Path):
    whole, rng = everything(copy), np.random.default_rng(0)
    files = sorted(path for path in copy.iterdir() if path.is_file())
    assert {"manifest.json", "encoding.json", "channel-codes.json"} < {p.name for p in files}
    accepted = []
    for path in files:
        data = path.read_bytes()
        for _ in range(40):
            flipped = bytearray(data)
            flipped[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
            path.write_bytes(flipped)
            try:
                assert everything(copy) == whole, path.name
                encode_dataset(
                    *(FakeLVLM(), make_samples(), copy),
                    **{"batch_size": 2, "shard_images": 3, "progress": False},
                )
                accepted.append(path.name)
            except StoreError as error:
                assert str(copy) in str(error)
        path.write_bytes(data)
    assert not [name for name in accepted if name.endswith(".arrow")]
    assert len(accepted) < 0.1 * 40 * len(files)  # a blank that became another, for instance


def test_checksums_are_compared_once_per_process_and_again_after_a_change(
    copy: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []
    real = manifest.file_sha256
    monkeypatch.setattr(
        manifest, "file_sha256", lambda path: (read.append(path.name), real(path))[1]
    )
    with manifest.trust_files():
        FeatureStore.open(copy)
    FeatureStore.open(copy, verify="sizes")
    assert read == []
    FeatureStore.open(copy)
    first = sorted(read)
    assert first == sorted(p.name for p in copy.glob("*.arrow"))
    FeatureStore.open(copy)
    assert sorted(read) == first
    path = copy / "images-00000.arrow"
    data = bytearray(path.read_bytes())
    data[data.index(FeatureStore.open(copy).tokens(0).tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"images-00000.arrow does not have its recorded checksum"):
        FeatureStore.open(copy)
    with manifest.trust_files(), manifest.trust_files(False):
        FeatureStore.open(copy)


def test_a_new_store_is_not_read_again_by_the_process_that_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encode_dataset(FakeLVLM(), make_samples(), tmp_path / "s", progress=False)
    monkeypatch.setattr(manifest, "file_sha256", lambda path: pytest.fail("read again"))
    FeatureStore.open(tmp_path / "s")


def test_a_box_of_another_type_is_refused(copy: Path):
    name = "images-00000.arrow"
    with pa.ipc.open_file(copy / name) as reader:
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    changed = [
        batch.set_column(batch.schema.names.index("box"), "box", pa.array(["all"] * len(batch)))
        for batch in batches
    ]
    stream = pa.BufferOutputStream()
    with pa.ipc.new_file(stream, changed[0].schema) as writer:
        for batch in changed:
            writer.write_batch(batch)
    data = stream.getvalue().to_pybytes()
    damage.with_right_checksum(copy, name, data)
    content = json.loads((copy / "manifest.json").read_text())
    content["files"][name]["bytes"] = len(data)
    damage.rewrite(copy / "manifest.json", content)
    with pytest.raises(StoreError, match=r"'box' must be list<float>, found string"):
        FeatureStore.open(copy)
