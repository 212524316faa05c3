"""Resuming: to the bit, with listed changes only, past damaged checkpoints, by one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")

import ray
import torch

from tprl_env.files import FolderInUseError, folder_lock
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import TrainConfig, load_config
from tprl_env.rllib.run.diverged import DivergedError
from tprl_env.rllib.run.folder import RunFolder, RunTakenOverError
from tprl_env.rllib.run.train import train

LOCAL = {"resources.num_scorers": 0, "limits.iterations": 2, "limits.checkpoint_every": 1}
LOCAL |= {"limits.checkpoint_seconds": 0, "rollout.samples": 8, "rollout.draws": 4}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def smoke(**changes: object) -> TrainConfig:
    return load_config("smoke", LOCAL | {k.replace("__", "."): v for k, v in changes.items()})


def weights(result) -> dict[str, torch.Tensor]:
    return PruningPolicy.from_pretrained(result.policy_path).state_dict()


def equal(first, second) -> bool:
    first, second = weights(first), weights(second)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm__minibatch_size": 8, "algorithm__epochs": 3},
        {"algorithm__name": "grpo", "imitation__demonstrator": "divprune", "imitation__steps": 5},
        {"algorithm__name": "mapo", "rollout__fixed_budgets": True},
        {"policy__distribution": "bernoulli", "rules__max_steps": 2, "rollout__rounds": 2},
    ],
)
def test_a_resumed_run_equals_the_undisturbed_one_to_the_bit(tmp_path: Path, changes):
    config = smoke(**changes)
    whole = train(config, tmp_path / "whole", iterations=5, progress=False)
    train(config, tmp_path / "parts", progress=False)
    torch.manual_seed(99)  # what happens between the starts does not matter
    parts = train(config, tmp_path / "parts", resume=True, iterations=5, progress=False)
    assert equal(whole, parts)
    assert "resumed" not in parts.record
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    for name in ("mean_return", "score", "kept", "policy_loss"):
        assert [row[name] for row in rows[0]] == [row[name] for row in rows[1]]


def test_where_it_cannot_be_equal_the_record_says_resumed(tmp_path: Path):
    config = smoke(resources__num_scorers=1)
    first = train(config, tmp_path, progress=False)
    assert "resumed" not in first.record
    again = train(config, tmp_path, resume=True, iterations=3, progress=False)
    assert again.record["resumed"] == 1
    assert json.loads((again.policy_path / "training.json").read_text())["resumed"] == 1


def test_a_new_learning_rate_acts_at_once(tmp_path: Path):
    first = train(smoke(), tmp_path, progress=False)
    before = weights(first)
    tiny = smoke(algorithm__lr=1e-30)
    again = train(tiny, tmp_path, resume=True, iterations=3, progress=False)
    after = weights(again)
    assert max(float((after[n] - before[n]).abs().max()) for n in before) < 1e-12
    assert again.record["resumed"] == 1
    starts = json.loads((tmp_path / "run.json").read_text())
    assert starts[1]["changed"]["algorithm.lr"][1] == 1e-30


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", "toy:samples=32,tokens=16,width=8,seed=1"),
        ("lvlm", "builtin:sparse"),
        ("seed", 7),
        ("rules.alpha", 0.5),
        ("rollout.fixed_budgets", True),
        ("algorithm.gamma", 0.9),
    ],
)
def test_what_makes_another_run_of_it_is_refused(tmp_path: Path, name: str, value):
    config = smoke()
    folder = RunFolder(tmp_path)
    folder.begin(config, resume=False)
    with pytest.raises(ValueError, match=rf"would become another one \({name} "):
        folder.check(config.replace(**{name: value}), resume=True)


def test_a_diverged_run_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    good = train(smoke(), tmp_path, progress=False)
    wild = smoke(algorithm__lr=1e30)
    with pytest.raises(DivergedError, match=r"diverged in iteration 3: .*iteration_000002 is kept"):
        train(wild, tmp_path, resume=True, iterations=9, progress=False)
    newest, progress = RunFolder(tmp_path).newest()
    assert newest.name == "iteration_000002" and progress.iteration == 2
    assert all(bool(part.isfinite().all()) for part in weights(good).values())
    again = train(smoke(), tmp_path, resume=True, iterations=3, progress=False)
    assert again.progress.iteration == 3


def test_a_run_that_diverges_at_once_exports_no_policy(tmp_path: Path):
    with pytest.raises(DivergedError, match=r"in iteration 1: .*no checkpoint"):
        train(smoke(algorithm__lr=1e30), tmp_path, progress=False)
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("name", ["iterations", "max_scores", "max_seconds"])
@pytest.mark.parametrize("value", [0, -5])
def test_counts_are_positive(name: str, value: int):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        smoke(**{f"limits__{name}": value})


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_taken(
    tmp_path: Path, damage: str, caplog
):
    whole = train(smoke(), tmp_path / "whole", iterations=4, progress=False)
    train(smoke(), tmp_path / "run", iterations=3, progress=False)
    newest = RunFolder(tmp_path / "run").checkpoints()[-1]
    file = max((p for p in (newest / "rllib").rglob("*") if p.is_file()), key=os.path.getsize)
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-1])
    again = train(smoke(), tmp_path / "run", resume=True, iterations=4, progress=False)
    assert "iteration_000003 is left out" in caplog.text and file.name in caplog.text
    assert equal(whole, again)  # from iteration 2
    assert [p.name[-1] for p in RunFolder(tmp_path / "run").checkpoints()] == ["2", "3", "4"]


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path: Path):
    train(smoke(), tmp_path, progress=False)
    for checkpoint in RunFolder(tmp_path).checkpoints():
        (checkpoint / "progress.json").write_text("{}")
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        train(smoke(), tmp_path, resume=True, progress=False)


def test_a_checkpoint_from_before_checksums_resumes_and_says_so(tmp_path: Path):
    train(smoke(), tmp_path, progress=False)
    for checkpoint in RunFolder(tmp_path).checkpoints():
        for name in ("whole.json", "generators.json"):
            (checkpoint / name).unlink()
    again = train(smoke(), tmp_path, resume=True, iterations=3, progress=False)
    assert again.progress.iteration == 3 and again.record["resumed"] == 1


def test_a_run_whose_samples_changed_is_refused(tmp_path: Path):
    folder = RunFolder(tmp_path)
    folder.begin(smoke(), resume=False)
    starts = json.loads((tmp_path / "run.json").read_text())
    starts[-1]["source_fingerprint"] = "another"
    (tmp_path / "run.json").write_text(json.dumps(starts))
    with pytest.raises(ValueError, match="with other samples"):
        folder.check(smoke(), resume=True)


def test_one_writer_per_folder(tmp_path: Path):
    with (
        folder_lock(tmp_path / "run", "tprl train"),
        pytest.raises(FolderInUseError, match=rf"in use by process {os.getpid()} on .*tprl train"),
    ):
        train(smoke(), tmp_path / "run", progress=False)


def test_where_no_lock_reaches_the_last_start_owns_the_run(tmp_path: Path):
    def take_over(row, policy) -> None:
        RunFolder(tmp_path).begin(smoke(), resume=True)

    with pytest.raises(RunTakenOverError, match="another start"):
        train(smoke(), tmp_path, progress=False, on_iteration=take_over)
    assert RunFolder(tmp_path).newest() is None


def test_sigterm_saves_a_checkpoint_and_ends_with_143(tmp_path: Path):
    script = (
        "from tprl_env.cli import main\n"
        f"raise SystemExit(main(['train', 'smoke', '--out', {str(tmp_path / 'run')!r},"
        " '--resources.num_scorers', '1', '--limits.iterations', '100000',"
        " '--limits.checkpoint_every', '100000']))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.DEVNULL,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not metrics.is_file():
        assert run.poll() is None
        time.sleep(0.05)
    children = _children(run.pid)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143
    assert said.count("\n") == 1 and "stopped by SIGTERM after iteration" in said
    assert RunFolder(tmp_path / "run").newest() is not None
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(_runs(pid) for pid in children):
        time.sleep(0.1)
    assert children and not [pid for pid in children if _runs(pid)]


def test_sigkill_leaves_no_process_behind(tmp_path: Path):
    script = (
        "import sys\n"
        "from tprl_env.ray_session import ray_session\n"
        "with ray_session(2):\n"
        "    import ray\n"
        "    ray.get(ray.remote(lambda: 1).remote())\n"
        "    print('up', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert run.stdout.readline() == "up\n"
    time.sleep(3)
    children = _children(run.pid)
    run.kill()
    run.wait(10)
    deadline = time.monotonic() + 6
    while time.monotonic() < deadline and any(_runs(pid) for pid in children):
        time.sleep(0.1)
    assert len(children) > 4 and not [pid for pid in children if _runs(pid)]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    """All descendants, from /proc."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(words[1])
    found = [pid]
    for parent in found:
        found.extend(child for child, its in parents.items() if its == parent)
    return found[1:]


def test_a_local_run_listens_on_loopback_only(tmp_path: Path):
    script = (
        "import os, sys\n"
        "from tprl_env.ray_session import ray_session\n"
        "with ray_session(2):\n"
        "    import ray\n"
        "    ray.get(ray.remote(lambda: 1).remote())\n"
        "    print('up', flush=True)\n"
        "    sys.stdin.read()\n"
        "assert 'RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER' not in os.environ\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    run = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert run.stdout.readline() == "up\n"
        listening = _listening([run.pid, *_children(run.pid)])
    finally:
        run.communicate(timeout=60)
    assert run.returncode == 0
    assert len(listening) >= 4
    assert {address for address in listening if not _is_loopback(address)} == set()


def _listening(pids: list[int]) -> list[str]:
    """Hex addresses that the processes listen on, from /proc."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.append(words[1].partition(":")[0])
    return found


def _is_loopback(address: str) -> bool:
    return address in ("0100007F", "0000000000000000FFFF00000100007F", "0" * 24 + "01000000")
