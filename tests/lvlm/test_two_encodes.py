"""Two encodings into one folder: the first goes on, the second is told who is there."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tprl_env.cli.commands import main
from tprl_env.data.features.store import FeatureStore
from tprl_env.files import LOCK_NAME, FolderInUseError, folder_lock

ENCODE = [
    *("encode", "--data", "scenes-crowded", "--lvlm", "builtin:crowded", "--limit", "60"),
    *("--device", "cpu", "--batch-size", "8", "--out"),
]


def start(out: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tprl_env.cli", *ENCODE, str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_one_goes_on_and_the_other_names_it(tmp_path: Path):
    both = [start(tmp_path / "both") for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and set(codes) <= {0, 2}, said
    assert not any("Traceback" in text or "No such file" in text for text in said)
    if 2 in codes:  # they met; else one ended before the other began
        loser = codes.index(2)
        assert f"is in use by process {both[1 - loser].pid} on " in said[loser]
        assert "(tprl encode, since " in said[loser]
    alone = start(tmp_path / "alone")
    alone.communicate(timeout=120)
    assert content(tmp_path / "both") == content(tmp_path / "alone")
    FeatureStore.open(tmp_path / "both", verify="checksums")


def test_while_one_writes_no_other_touches_the_folder(tmp_path: Path, capsys):
    out = tmp_path / "out"
    first = start(out)
    while not (out / LOCK_NAME).exists():
        assert first.poll() is None and time.sleep(0.01) is None
    os.kill(first.pid, 19)  # it stands still, lock in hand
    try:
        before = content(out)
        assert main([*ENCODE, str(out)]) == 2
        assert f"in use by process {first.pid} on " in capsys.readouterr().err
        assert content(out) == before
    finally:
        os.kill(first.pid, 18)
        first.communicate(timeout=120)
    assert first.returncode == 0
    assert main([*ENCODE, str(out)]) == 0


def test_a_channel_has_one_writer_too(tmp_path: Path):
    out = tmp_path / "out"
    assert main([*ENCODE[:6], "4", *ENCODE[7:], str(out)]) == 0
    store = FeatureStore.open(out)
    arrays = [[1.0] * store.image_count(i) for i in range(store.num_images)]
    with folder_lock(out, "tprl autoencoder"), pytest.raises(FolderInUseError):
        store.write_channel("x", arrays)
    store.write_channel("x", arrays)
