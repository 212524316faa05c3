"""Runs in shared storage: whole or absent, found again by another machine, owned by one start."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from pyarrow import fs

pytest.importorskip("ray")

from tprl_env.data.features.store import open_source
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import TrainConfig, load_config, policy_config
from tprl_env.rllib.run.changes import MAY_CHANGE
from tprl_env.rllib.run.folder import Progress, RunFolder
from tprl_env.rllib.run.mirror import MirroredRunFolder, RunTakenOverError, open_run_folder
from tprl_env.rllib.run.storage import Storage, StorageError


def local(tmp_path: Path) -> Storage:
    return Storage.open((tmp_path / "remote").as_uri())


def subtree(tmp_path: Path) -> Storage:
    base = tmp_path / "tree"
    base.mkdir()
    return Storage(fs.SubTreeFileSystem(str(base), fs.LocalFileSystem()), "run")


def memory(tmp_path: Path) -> Storage:
    filesystem, root = fs.FileSystem.from_uri("mock:///bucket/run")
    return Storage(filesystem, root)


@pytest.fixture(params=[local, subtree, memory])
def storage(request, tmp_path: Path) -> Storage:
    return request.param(tmp_path)


def make_folder(path: Path, text: str = "one") -> Path:
    (path / "deep").mkdir(parents=True)
    (path / "a.bin").write_bytes(b"\x00\x01" * 5000)
    (path / "deep" / "b.txt").write_text(text)
    return path


def test_a_folder_comes_back_as_it_was(storage: Storage, tmp_path: Path):
    source = make_folder(tmp_path / "source")
    assert storage.folders("checkpoints") == {}
    storage.push_folder(source, "checkpoints/x")
    assert list(storage.folders("checkpoints")) == ["x"]
    storage.fetch_folder("checkpoints/x", tmp_path / "back")
    for name in ("a.bin", "deep/b.txt"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    storage.drop_folder("checkpoints/x")
    assert storage.folders("checkpoints") == {} and storage.read("checkpoints/x/a.bin") is None
    with pytest.raises(StorageError, match="not whole"):
        storage.fetch_folder("checkpoints/x", tmp_path / "again")


def test_an_upload_that_was_cut_off_does_not_count(storage: Storage, tmp_path: Path, monkeypatch):
    source = make_folder(tmp_path / "source")
    storage.push_folder(source, "checkpoints/good")
    monkeypatch.setattr(storage, "write", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        storage.push_folder(source, "checkpoints/torn")  # everything but the mark
    monkeypatch.undo()
    assert storage.read("checkpoints/torn/a.bin") is not None
    assert list(storage.folders("checkpoints")) == ["good"]
    storage.drop_torn("checkpoints")
    assert storage.read("checkpoints/torn/a.bin") is None
    assert list(storage.folders("checkpoints")) == ["good"]


@pytest.mark.parametrize("mark", [b"", b'{"files": {"a.b', b"\xff\xfe"])
def test_a_torn_mark_does_not_count(storage: Storage, tmp_path: Path, mark: bytes):
    storage.push_folder(make_folder(tmp_path / "source"), "x")
    storage.write("x.whole.json", mark)
    assert storage.folders("") == {}


def test_a_missing_or_changed_file_is_noticed(storage: Storage, tmp_path: Path):
    storage.push_folder(make_folder(tmp_path / "source"), "x")
    storage.write("x/deep/b.txt", b"two")  # same size, other content
    assert list(storage.folders("")) == ["x"]
    with pytest.raises(StorageError, match=r"x/deep/b\.txt .* another content"):
        storage.fetch_folder("x", tmp_path / "back")
    assert not (tmp_path / "back").exists()
    storage.write("x/deep/b.txt", b"three")
    assert storage.folders("") == {}


def test_a_folder_is_replaced_entirely(storage: Storage, tmp_path: Path):
    storage.push_folder(make_folder(tmp_path / "one"), "x")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "c.txt").write_text("new")
    storage.push_folder(tmp_path / "two", "x")
    storage.fetch_folder("x", tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").rglob("*")] == ["c.txt"]


def test_uris_that_cannot_be_opened_are_refused():
    with pytest.raises(ValueError, match="expected a path or a URI such as"):
        Storage.open("foo://bucket/run")
    with pytest.raises(ValueError, match="must not hold credentials") as error:
        Storage.open("s3://name:secretword@bucket/run")
    assert "secretword" not in str(error.value)


# The run folder ------------------------------------------------------------------------------


CONFIG = load_config("smoke")


def policy() -> PruningPolicy:
    return PruningPolicy(policy_config(CONFIG, open_source(CONFIG.source)))


def save(folder: RunFolder, iteration: int) -> None:
    def state(path: str) -> None:
        Path(path).mkdir()
        (Path(path) / "state.bin").write_bytes(bytes([iteration]) * 100)

    with folder.metrics_writer(after=iteration - 10) as write:
        for number in range(iteration - 9, iteration + 1):
            write({"iteration": number, "score": 0.5})
    progress = Progress(iteration=iteration)
    folder.save_checkpoint(progress, policy(), state, {"lvlm_scores": iteration})


def started(storage: Storage, resume: object = "auto") -> MirroredRunFolder:
    folder = MirroredRunFolder(storage)
    folder.begin(CONFIG, resume=resume)
    return folder


def test_another_machine_goes_on_from_the_newest_whole_checkpoint(storage: Storage):
    first = started(storage)
    assert first.newest() is None
    for iteration in (10, 20, 30, 40):
        save(first, iteration)
    assert list(storage.folders("checkpoints")) == [f"iteration_0000{n}0" for n in (2, 3, 4)]
    second = started(storage)
    assert second.path != first.path and second.newest()[1].iteration == 40
    assert (second.newest()[0] / "rllib" / "state.bin").read_bytes() == bytes([40]) * 100
    assert len(second.metrics.read_text().splitlines()) == 40
    PruningPolicy.from_pretrained(second.policy)
    resumed = [entry["resume"] for entry in json.loads(storage.read("run.json"))]
    assert resumed == [False, True]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(storage: Storage, caplog):
    first = started(storage)
    for iteration in (10, 20, 30):
        save(first, iteration)
    storage.write("checkpoints/iteration_000030/rllib/state.bin", b"x" * 100)  # size is right
    storage.write("checkpoints/iteration_000020.whole.json", b"{")
    assert started(storage).newest()[1].iteration == 10
    assert "another content" in caplog.text and "torn" in caplog.text


def test_the_last_start_owns_the_run(storage: Storage):
    first = started(storage)
    save(first, 10)
    second = started(storage)
    with pytest.raises(RunTakenOverError, match="has taken over"):
        save(first, 20)
    assert list(storage.folders("checkpoints")) == ["iteration_000010"]
    save(second, 20)
    with pytest.raises(RunTakenOverError):
        save(first, 30)


def test_resume_must_may_or_must_not_find_a_run(storage: Storage):
    with pytest.raises(ValueError, match=r"no run in .* to resume"):
        started(storage, resume=True)
    started(storage, resume=False)
    with pytest.raises(ValueError, match="holds a run already"):
        started(storage, resume=False)
    started(storage, resume=True)
    started(storage, resume="auto")


def test_the_exported_policy_says_how_it_was_trained(storage: Storage, tmp_path: Path):
    folder = started(storage)
    save(folder, 10)
    storage.fetch_folder("policy", tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / "training.json").read_text()) == {"lvlm_scores": 10}
    save(folder, 20)
    again = started(storage)
    assert json.loads((again.policy / "training.json").read_text()) == {"lvlm_scores": 20}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700  # others must not plant a pickle


def test_listed_settings_may_change_and_others_are_refused(tmp_path: Path):
    folder = open_run_folder(tmp_path)
    folder.begin(CONFIG, resume="auto")
    other = {"limits.iterations": 99, "resources.num_scorers": 1, "algorithm.lr": 0.5}
    folder.begin(CONFIG.replace(**other), resume="auto")
    starts = json.loads((tmp_path / "run.json").read_text())
    assert starts[1]["changed"].keys() == other.keys()
    with pytest.raises(ValueError, match=r"seed 0, now 3.*docs/reliability\.md"):
        folder.begin(CONFIG.replace(**other, seed=3), resume="auto")
    algorithms = [{}, {"algorithm.name": "grpo"}]
    known = set().union(*(TrainConfig().replace(**name).flat() for name in algorithms))
    assert set(MAY_CHANGE) < known
    listed = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    assert [name for name in MAY_CHANGE if f"`{name}`" not in listed] == []
