"""Faults on purpose: whatever dies, the scores, the groups and the counters stay right.

Lost nodes are in test_chaos_nodes.py, the driver's SIGKILL is in rllib/test_train.py, a poisonous
request alone in test_scorer_pool.py.
Deadlines are generous multiples: they only end a test that hangs.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")

import ray
from chaos_scorers import in_a_pass, rows
from ray import tune
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import ToyScorer
from tprl_env.env.scorer import ScoringError
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import TrainConfig, load_config
from tprl_env.rllib.rollout.connector import ColumnsToBatch
from tprl_env.rllib.run.folder import RunFolder
from tprl_env.rllib.run.train import train
from tprl_env.scoring.pool import ScorerPool
from tprl_env.scoring.spec import ScorerSpec

pytestmark = pytest.mark.chaos

HELPERS = Path(__file__).parents[1] / "helpers"
SOURCE = "toy:samples=32,tokens=20,seed=3,vary=1"
DEADLINE = 200.0
STORE_MB = 80  # Ray's least object store


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=6,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=STORE_MB << 20,
        runtime_env={"env_vars": {"PYTHONPATH": f"{HELPERS}:{Path(__file__).parent}"}},
    )
    yield
    ray.shutdown()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    folder = tmp_path / "log"
    folder.mkdir()
    return folder


def spec(log: Path, **options: object) -> ScorerSpec:
    options |= {"log": str(log)}
    return ScorerSpec(
        SOURCE, kind="import", factory="chaos_scorers:traced", options=options, batch_size=8
    )


def request(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Distinct masks, none of all tokens, so that each must be computed."""
    generator = np.random.default_rng(count)
    samples, keep = generator.integers(0, 32, count), generator.random((count, 20)) < 0.5
    assert len({(s, k.tobytes()) for s, k in zip(samples, keep, strict=True)}) == count
    return samples, keep


def check(pool: ScorerPool, scores: np.ndarray, asked: tuple[np.ndarray, np.ndarray]) -> None:
    """The scores are those of a run without faults, and each was counted once."""
    source, (samples, keep) = open_source(SOURCE), asked
    np.testing.assert_array_equal(scores, ToyScorer(source)(samples, keep & source.exists(samples)))
    counters = pool.counters()
    assert counters["requests"] == 1
    assert counters["scores"] == counters["computed"] == len(samples)
    assert counters["queue_depth"] == 0


# Scorers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("victims", [1, 2], ids=["one", "all"])
def test_scorers_killed_in_the_middle_of_a_pass_change_no_score(log: Path, victims: int):
    pool = ScorerPool.start(spec(log, seconds=0.4), 2, num_cpus=0.5)
    try:
        asked = request(48)
        pids = pool.pids()
        pending = pool.submit(*asked)
        until(lambda: all(in_a_pass(log, pid) for pid in pids))
        for pid in pids[:victims]:
            os.kill(pid, signal.SIGKILL)
        assert not pending.done  # nothing is made up while nobody can answer
        check(pool, pending.result(), asked)
        assert pool.counters()["retries"] >= victims
        until(lambda: not set(pids[:victims]) & set(pool.pids()))  # they came back
        ended = rows(log, "ended")
        assert len(set(ended)) == 48  # every row was computed
        assert len(ended) - 48 <= 8 * victims  # twice only where a reply was lost
    finally:
        pool.close()


def test_a_scorer_five_seconds_late_breaks_and_repeats_nothing(log: Path):
    pool = ScorerPool.start(spec(log, late=5.0), 2, num_cpus=0.5)
    try:
        asked = request(64)
        start = time.monotonic()
        check(pool, pool(*asked), asked)
        assert time.monotonic() - start >= 5.0
        assert sorted(rows(log, "started")) == sorted(rows(log, "ended"))
        assert len(rows(log, "ended")) == len(set(rows(log, "ended"))) == 64
        counters = pool.counters()
        assert counters["retries"] == counters["restarts"] == 0
        assert counters["batch_rows"] == 64
    finally:
        pool.close()


def test_scorers_that_do_not_come_back_end_the_wait_with_a_reason(log: Path):
    pool = ScorerPool.start(spec(log, seconds=0.3), 2, num_cpus=0.5)
    try:
        pending = pool.submit(*request(48))
        for actor in pool._router.actors:
            ray.kill(actor.handle, no_restart=True)
        with pytest.raises(ScoringError, match=r"number \d+.*no actor left"):
            pending.result()
        with pytest.raises(ScoringError, match="no actor left"):
            pool(*request(8))
    finally:
        pool.close()


# Training ------------------------------------------------------------------------------------


def training(log: Path, **changes: object) -> TrainConfig:
    options = {"log": str(log), **changes.pop("options", {})}
    return load_config(
        "smoke",
        {
            "algorithm": "grpo",
            "resources.num_scorers": 1,
            "limits.checkpoint_every": 1,
            "limits.report_every": 1,
            "scoring.scorer": "import",
            "scoring.factory": "chaos_scorers:traced",
            "scoring.options": options,
            **changes,
        },
    )


def history(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def batches(monkeypatch) -> list[dict]:
    """Every batch that reaches the learner of this process."""
    found = []
    join = ColumnsToBatch.__call__

    def record(self, **arguments):
        batch = join(self, **arguments)
        found.append(batch[DEFAULT_MODULE_ID])
        return batch

    monkeypatch.setattr(ColumnsToBatch, "__call__", record)
    return found


def check_batch(batch: dict, config: TrainConfig) -> None:
    """Whole groups only, and advantages that follow from the rule's scores."""
    state = batch[Columns.OBS]["state"].numpy()
    samples = batch[Columns.OBS]["sample"].numpy()
    keep = batch[Columns.ACTIONS].numpy().astype(bool)
    _, group, sizes = np.unique(state, return_inverse=True, return_counts=True)
    assert (sizes == config.rollout.draws).all(), sizes
    scores = ToyScorer(open_source(config.source))(samples, keep).astype(np.float64)
    members = [scores[group == number] for number in range(len(sizes))]
    mean, deviation = (np.array([f(each) for each in members]) for f in (np.mean, np.std))
    wanted = (scores - mean[group]) / (deviation[group] + 1e-6)
    # a group of equal scores teaches nothing; float32 noise is not divided by its own size
    taught = deviation[group] > 1e-4
    found = batch[Postprocessing.ADVANTAGES].numpy()
    np.testing.assert_allclose(found[taught], wanted[taught], rtol=1e-3, atol=1e-3)
    assert (np.abs(found[~taught]) < 1e-1).all()


def test_a_killed_env_runner_leaves_groups_whole_and_counters_right(
    tmp_path: Path, log: Path, batches: list[dict]
):
    config = training(
        log,
        options={"seconds": 0.25},
        **{"resources.num_env_runners": 2, "limits.iterations": 6},
    )
    killed = []

    def kill_soon(row: dict, policy: PruningPolicy) -> None:
        if row["iteration"] == 2:
            killed.append(runner_pids()[0])
            # in the next iteration's rollouts, which wait for at least two passes
            threading.Timer(0.3, os.kill, (killed[0], signal.SIGKILL)).start()

    result = train(config, tmp_path / "run", progress=False, on_iteration=kill_soon)
    assert len(killed) == 1
    done = history(tmp_path / "run")
    assert [row["iteration"] for row in done] == list(range(1, 7))
    assert len(batches) == 6
    for batch in batches:
        check_batch(batch, config)
    sizes = [len(batch[Columns.OBS]["sample"]) for batch in batches]
    # the dead runner's share was lost; RLlib asks the other one again until the batch is full
    assert all(size >= 256 and size % 128 == 0 for size in sizes), sizes
    # what was counted is what was trained on: nothing of the dead runner, nothing twice
    for name in ("scores", "env_steps"):
        assert [row[name] for row in done] == np.cumsum(sizes).tolist()
    assert result.progress.episodes == sum(sizes)


def runner_pids() -> list[int]:
    return [
        actor["Pid"]
        for actor in ray._private.state.actors().values()
        if actor["State"] == "ALIVE" and "TokenPruningRunner" in actor["ActorClassName"]
    ]


def test_a_poisonous_sample_stops_training_and_is_never_trained_on(
    tmp_path: Path, log: Path, batches: list[dict]
):
    out = tmp_path / "run"
    poison = tmp_path / "poison"  # a file: other options of the scorer would be another run
    healthy = training(log, options={"poison_file": str(poison)})
    train(healthy, out, progress=False, iterations=1)
    poison.write_text("6")
    sick = training(log, options={"poison_file": str(poison)}, **{"scoring.max_crashes_per_row": 2})
    with pytest.raises(ScoringError, match=r"'toy-6' \(number 6\): the request killed 2 scorer"):
        train(sick, out, resume=True, progress=False, iterations=30)
    _, saved = RunFolder(out).newest()
    assert saved.iteration == len(batches) and saved.scores == 256 * len(batches)
    for batch in batches[1:]:  # none where it is drawn in the first iteration after the resume
        assert 6 not in batch[Columns.OBS]["sample"].numpy()
    poison.unlink()
    result = train(healthy, out, resume=True, progress=False, iterations=saved.iteration + 2)
    assert result.progress.scores == 256 * (saved.iteration + 2)
    for batch in batches:
        check_batch(batch, healthy)


def test_scorers_gone_for_good_stop_remote_runners_too(tmp_path: Path, log: Path):
    config = training(log, **{"resources.num_env_runners": 1, "limits.iterations": 50})

    def end_all(row: dict, policy: PruningPolicy) -> None:
        for actor in ray._private.state.actors().values():
            if row["iteration"] == 2 and "ScorerActor" in actor["ActorClassName"]:
                if actor["State"] == "ALIVE":
                    ray.kill(ray.get_actor(actor["Name"]), no_restart=True)

    with pytest.raises(ScoringError, match="no scorer actor is left; scorer actor tprl-scorer-"):
        train(config, tmp_path / "run", progress=False, on_iteration=end_all)
    assert RunFolder(tmp_path / "run").newest()[1].scores == 2 * 256


def crash_once(setting: dict) -> None:
    """A Tune trial whose process dies once, after its third iteration."""
    out = Path(setting["out"])

    def hook(row: dict, policy: PruningPolicy) -> None:
        tune.report({name: row[name] for name in ("iteration", "scores")})
        if row["iteration"] == 3 and not (out / "crashed").exists():
            (out / "crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    config = TrainConfig.from_dict(setting["train"])
    train(config, out, resume="auto", progress=False, on_iteration=hook)


def test_a_crashed_trial_goes_on_from_its_newest_checkpoint(tmp_path: Path, log: Path):
    config = training(log, **{"limits.iterations": 5})
    # two bundles: the trial and, inside it, its scorer
    resources = tune.PlacementGroupFactory([{"CPU": 1.0}, {"CPU": config.resources.scorer_cpus}])
    tuner = tune.Tuner(
        tune.with_resources(crash_once, resources),
        param_space={"train": config.as_dict(), "out": str(tmp_path / "run")},
        run_config=tune.RunConfig(
            storage_path=str(tmp_path / "tune"),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    result = tuner.fit()[0]
    assert result.error is None and result.metrics["scores"] == 5 * 256
    assert (tmp_path / "run" / "crashed").exists()
    done = history(tmp_path / "run")
    assert [row["scores"] for row in done] == [256 * n for n in range(1, 6)]
    starts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [start["resume"] for start in starts] == [False, True]


def test_a_full_object_store_is_spilled(tmp_path: Path, log: Path):
    blocks = [np.full(10 << 20, number, np.uint8) for number in range(2 * STORE_MB // 10)]
    pinned = [ray.put(block) for block in blocks]  # twice what the store holds
    config = training(log, **{"resources.num_env_runners": 1, "limits.iterations": 3})
    result = train(config, tmp_path / "run", progress=False)
    assert result.progress.scores == 3 * 256
    for ref, block in zip(pinned, blocks, strict=True):
        np.testing.assert_array_equal(ray.get(ref), block)


# Disks ---------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB, where that may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path, spare: int) -> Path:
    """Leave ``spare`` bytes on a disk."""
    size = os.statvfs(place)
    filler = place / "filler"
    filler.write_bytes(bytes(size.f_bavail * size.f_frsize - spare))
    return filler


def check_resumes(config: TrainConfig, out: Path, iteration: int) -> None:
    """The newest whole checkpoint is the one before the failure, and the run goes on from it."""
    newest, saved = RunFolder(out).newest()
    assert saved.iteration == iteration and newest.name == f"iteration_{iteration:06d}"
    PruningPolicy.from_pretrained(newest / "policy")
    result = train(config, out, resume="auto", progress=False)
    assert result.progress.scores == 256 * config.limits.iterations
    assert [row["iteration"] for row in history(out)] == list(
        range(1, config.limits.iterations + 1)
    )
    assert not list((out / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("part", ["rllib", "policy"])
def test_a_full_disk_keeps_the_last_whole_checkpoint(small_disk: Path, log: Path, part: str):
    out = small_disk / "run"
    config = training(log, **{"resources.num_scorers": 0, "limits.iterations": 4})
    filler = []

    def hook(row: dict, policy: PruningPolicy) -> None:
        if row["iteration"] == 3:  # before its checkpoint, whose `part` will not fit
            state = [p for p in RunFolder(out).checkpoints()[-1].glob("rllib/**/*") if p.is_file()]
            spare = 0 if part == "rllib" else sum(-(-p.stat().st_size // 4096) for p in state) + 3
            filler.append(fill(small_disk, spare * 4096))

    with pytest.raises(OSError) as caught:
        train(config, out, progress=False, on_iteration=hook)
    assert caught.value.errno == errno.ENOSPC
    (draft,) = (out / "checkpoints").glob(".writing-*")
    assert (draft / "policy").is_dir() == (part == "policy")
    filler[0].unlink()
    check_resumes(config, out, 2)


def test_a_checkpoint_that_cannot_be_written_is_left_out(tmp_path: Path, log: Path, monkeypatch):
    out = tmp_path / "run"
    config = training(log, **{"resources.num_scorers": 0, "limits.iterations": 4})
    save = PruningPolicy.save_pretrained

    def full(self, path, *args):
        if "writing" in str(path) and len(RunFolder(out).checkpoints()) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(self, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PruningPolicy, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            train(config, out, progress=False)
    check_resumes(config, out, 2)
