"""Logs that grow line by line survive a crash."""

import json
import os
import stat

import pytest

from tprl_env import files
from tprl_env.files import JsonLog, write_text


def test_rows_come_back_in_order(tmp_path):
    log = JsonLog(tmp_path / "deep" / "log.jsonl")
    assert log.read() == []
    for number in range(3):
        log.append({"n": number, "text": "größer", "none": None})
    assert [row["n"] for row in log.read()] == [0, 1, 2]
    assert len(log.path.read_text().splitlines()) == 3


@pytest.mark.parametrize("torn", ['{"n": 3, "te', "{", '{"n": 3}x', "\0\0\0", '{"t": "\xff'])
def test_a_torn_last_line_is_dropped_and_never_joined_to_the_next(tmp_path, torn):
    log = JsonLog(tmp_path / "log.jsonl")
    for number in range(3):
        log.append({"n": number})
    with log.path.open("ab") as file:
        file.write(torn.encode("latin-1"))
    assert [row["n"] for row in log.read()] == [0, 1, 2]
    log.append({"n": 4})
    assert [row["n"] for row in log.read()] == [0, 1, 2, 4]
    assert [json.loads(line)["n"] for line in log.path.read_text().splitlines()] == [0, 1, 2, 4]


def test_a_whole_row_without_its_line_end_stays(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.path.write_text('{"n": 0}\n{"n": 1}')
    log.append({"n": 2})
    assert [row["n"] for row in log.read()] == [0, 1, 2]


def test_rows_of_undone_work_are_dropped(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.keep(lambda row: False)
    assert not log.path.exists()
    for number in range(5):
        log.append({"n": number})
    log.keep(lambda row: row["n"] <= 2)
    assert [row["n"] for row in log.read()] == [0, 1, 2]


def test_damage_that_no_crash_explains_is_named(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    log.path.write_text('{"n": 0}\n{"n"\n{"n": 2}\n')
    with pytest.raises(ValueError, match=r"log\.jsonl line 2 is damaged .* remove that line"):
        log.read()


def test_file_and_folder_are_synced_around_the_rename(tmp_path, monkeypatch):
    done = []
    sync, rename = os.fsync, os.replace

    def fsync(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", lambda *a: (done.append("rename"), rename(*a)))
    write_text(tmp_path / "a.txt", "x")
    assert done == ["file", "rename", "folder"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
