"""One writer per folder, named by its lock; no lock outlives its holder."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tprl_env.files import LOCK_NAME, FolderInUseError, folder_lock

HOLD = """
import sys, time
from tprl_env.files import folder_lock
with folder_lock(sys.argv[1], "tprl encode"):
    print("held", flush=True)
    {do}
    time.sleep(60)
"""


def hold(folder, do="pass"):
    command = [sys.executable, "-c", HOLD.format(do=do), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_with_the_first_ones_name(tmp_path):
    first = hold(tmp_path)
    try:
        with pytest.raises(FolderInUseError) as refused, folder_lock(tmp_path, "tprl train"):
            pytest.fail("two writers")
    finally:
        first.kill()
        first.wait()
    assert refused.value.holder["pid"] == first.pid
    assert refused.value.holder["host"] == os.uname().nodename
    assert f"in use by process {first.pid} on " in str(refused.value)
    assert "(tprl encode, since " in str(refused.value)


def test_a_killed_holder_blocks_nobody(tmp_path):
    first = hold(tmp_path)
    first.kill()
    first.wait()
    assert (tmp_path / LOCK_NAME).exists()
    with folder_lock(tmp_path, "tprl train"):
        assert str(os.getpid()) in (tmp_path / LOCK_NAME).read_text()
    assert not (tmp_path / LOCK_NAME).exists()


def test_nor_does_a_child_that_it_forked(tmp_path):
    first = hold(tmp_path, "import os; child = os.fork(); child and print(child, flush=True)")
    child = int(first.stdout.readline())
    first.kill()
    first.wait()
    try:
        os.kill(child, 0)  # it lives
        stop = time.monotonic() + 10  # a busy machine may not have run the child yet
        while True:
            try:
                with folder_lock(tmp_path, "tprl train"):
                    break
            except FolderInUseError:
                assert time.monotonic() < stop, "the child still holds the lock"
                time.sleep(0.05)
    finally:
        os.kill(child, signal.SIGKILL)


def test_the_same_process_cannot_write_twice_either(tmp_path):
    with (
        folder_lock(tmp_path / "a", "first"),
        folder_lock(tmp_path / "b", "another folder"),
        pytest.raises(FolderInUseError, match=rf"process {os.getpid()} .*\(first, since"),
        folder_lock(tmp_path / "a" / ".." / "a", "second"),
    ):
        pytest.fail("two writers")


def test_a_folder_made_for_nothing_goes_and_one_with_content_stays(tmp_path):
    with folder_lock(tmp_path / "empty", "x"):
        pass
    assert not (tmp_path / "empty").exists()
    with folder_lock(tmp_path / "full", "x"):
        (tmp_path / "full" / "file").touch()
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["file"]
    (tmp_path / "before").mkdir()
    with pytest.raises(RuntimeError), folder_lock(tmp_path / "before", "x"):
        raise RuntimeError
    assert (tmp_path / "before").is_dir()
    with folder_lock(tmp_path / "before", "x"):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def refuse(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with folder_lock(tmp_path, "x"):
        pass
    assert "cannot be locked (No locks available)" in caplog.text
    assert not (tmp_path / LOCK_NAME).exists()


def test_never_two_at_a_time(tmp_path):
    inside, most, entered = 0, 0, 0
    stop = time.monotonic() + 1.5
    count = threading.Lock()

    def work():
        nonlocal inside, most, entered
        while time.monotonic() < stop:
            try:
                with folder_lock(tmp_path / "made", "x"):
                    with count:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    time.sleep(0.0005)
                    with count:
                        inside -= 1
            except FolderInUseError:
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert entered > 20
