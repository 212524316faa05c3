"""The folder of a run: its config, its results, and the checkpoints to resume from.

    config.json        the resolved TrainConfig
    run.json           one entry per start: versions, git revision, seed
    metrics.jsonl      one line per iteration
    tensorboard/       the same for TensorBoard
    checkpoints/       iteration_000020/{rllib, policy, progress.json, generators.json, whole.json};
                       it counts if sizes and sha256 of its files are those in whole.json
    owner.json         the start that writes here
    imitated_policy/        the policy after imitation
    policy/            the newest policy, safetensors + config.json, and training.json: how it was
                       trained

RLlib's checkpoints hold pickles: resume only runs you made yourself. ``policy/`` holds none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tprl_env.data.features import shared_source
from tprl_env.evaluation.results import TRAINING_NAME
from tprl_env.files import JsonLog, versions, write_json
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.run.changes import SOURCE, check_changes
from tprl_env.rllib.run.whole import WHOLE, damage, seal, sync_folder

__all__ = ["Progress", "Resume", "RunFolder", "RunTakenOverError", "training_record"]

logger = logging.getLogger(__name__)

Resume = bool | Literal["auto"]
"""Whether a run has to exist already; "auto" resumes an existing run and else starts one."""

KEPT_CHECKPOINTS = 3
GENERATORS = "generators.json"
DESCRIPTION = ("config.json", "run.json")
OWNER = "owner.json"
_PREFIX = "iteration_"


class RunTakenOverError(OSError):
    """Another start of the same run has taken its folder or storage over."""


@dataclass
class Progress:
    """Progress of a run; saved with each checkpoint.

    Attributes:
        iteration: Finished iterations.
        env_steps: Steps of all episodes.
        episodes: Episodes.
        scores: Requested scores.
        computed: Scores that the LVLM computed (the others were equal, remembered or trivial).
        seconds: Training time over all starts.
        imitation_seconds: Of the imitation that made the policy the run started from.
        resumed: Starts after which the run went on differently than without the interruption.
    """

    iteration: int = 0
    env_steps: int = 0
    episodes: int = 0
    scores: int = 0
    computed: int = 0
    seconds: float = 0.0
    imitation_seconds: float = 0.0
    resumed: int = 0


def training_record(config: TrainConfig, progress: Progress, preset: str) -> dict[str, Any]:
    """How a policy was trained; the fields are those of `evaluation.results.TRAINING_FIELDS`.

    A run that was resumed and may differ from an undisturbed one has ``resumed`` besides.
    """
    record = {
        "algorithm": config.algorithm.name.upper(),
        "preset": preset,
        "seconds": round(progress.seconds + progress.imitation_seconds, 2),
        "lvlm_scores": progress.scores,
        "env_steps": progress.env_steps,
        "seed": config.seed,
    }
    return record | ({"resumed": progress.resumed} if progress.resumed else {})


class RunFolder:
    """Reads and writes a run's files.

    Args:
        path: The folder; made if it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.where = str(path)
        self.policy = self.path / "policy"
        self.imitated_policy = self.path / "imitated_policy"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self._checkpoints = self.path / "checkpoints"
        self.changed: dict[str, tuple[Any, Any]] = {}
        self._fresh = self._made = False
        self._owner = uuid.uuid4().hex
        self._damaged: dict[Path, str] = {}

    def check(self, config: TrainConfig, *, resume: Resume) -> bool:
        """Refuse a folder that does not fit, without writing anything; whether a run resumes.

        Args:
            config: The run.
            resume: False wants an empty folder, True a run; ``"auto"`` takes either, so that the
                same command resumes the run.

        Raises:
            ValueError: If the folder holds a run already and ``resume`` is off, holds none and
                ``resume`` is on, or holds a run with other data or settings than may change.
        """
        saved = self.path / "config.json"
        if resume == "auto":
            resume = saved.is_file()
        if resume:
            if not saved.is_file():
                raise ValueError(f"there is no run in {self.where!r} to resume")
            old = TrainConfig.from_dict(json.loads(saved.read_text()))
            self.changed = check_changes(self.where, old, config, self._last_start())
            self.newest()  # refuses a run whose checkpoints are all damaged
        elif saved.exists():
            raise ValueError(
                f"{self.where!r} holds a run already; resume it with resume=True, or choose "
                "another out"
            )
        return resume

    def _last_start(self) -> dict[str, Any]:
        starts = self.path / "run.json"
        return dict(json.loads(starts.read_text())[-1]) if starts.is_file() else {}

    def begin(self, config: TrainConfig, *, resume: Resume) -> None:
        """Claim the folder for a run, or for another start of the run in it.

        Raises:
            ValueError: As `check`.
        """
        saved, resume = self.path / "config.json", self.check(config, resume=resume)
        self._fresh, self._made = not resume, not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(saved, config.as_dict())
        starts = self.path / "run.json"
        entries = json.loads(starts.read_text()) if starts.is_file() else []
        changed = {name: list(values) for name, values in self.changed.items()}
        entries.append({**_description(config, resume), "changed": changed})
        write_json(starts, entries)
        self._claim()

    def _claim(self) -> None:
        """Own the run until another start does: a lock may not reach every machine."""
        write_json(self.path / OWNER, {"start": self._owner})

    def _read_owner(self) -> bytes | None:
        path = self.path / OWNER
        return path.read_bytes() if path.is_file() else None

    def _check_owner(self) -> None:
        """Stop, rather than write between another start's files.

        Raises:
            RunTakenOverError: Another start owns the run now.
        """
        content = self._read_owner()
        owner = None if content is None else json.loads(content).get("start")
        if owner != self._owner:
            raise RunTakenOverError(
                f"another start of the run in {self.where} has taken over; this one stops and "
                "leaves everything as it is"
            )

    def withdraw(self) -> None:
        """Remove what `begin` has written of a new run, so that a corrected command can start."""
        if not self._fresh or self.newest() is not None:
            return
        for name in (*DESCRIPTION, OWNER):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.imitated_policy, ignore_errors=True)
        if self._made and not any(self.path.iterdir()):
            self.path.rmdir()

    def _found(self) -> list[Path]:
        """Folders of checkpoints, whole or not, oldest first."""
        return sorted(path for path in self._checkpoints.glob(f"{_PREFIX}*") if path.is_dir())

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first; damaged ones are named in a warning, once."""
        return [path for path in self._found() if not self._damage(path)]

    def _damage(self, path: Path) -> str:
        if path not in self._damaged:
            self._damaged[path] = "" if _is_older(path) else damage(path)
            if self._damaged[path]:
                logger.warning("the checkpoint %s is left out: %s", path, self._damaged[path])
        return self._damaged[path]

    def save_checkpoint(
        self,
        progress: Progress,
        policy: PruningPolicy,
        save: Callable[[str], Any],
        record: Mapping[str, Any],
        generators: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint beside its final place, rename it, drop the oldest.

        Args:
            progress: Of the run.
            policy: The policy.
            save: Writes the algorithm's own state into the folder it is given.
            record: How the policy was trained, for ``training.json`` beside it.
            generators: States of the random generators, from `read_generators`.

        Raises:
            RunTakenOverError: Another start owns the run now.
        """
        self._check_owner()
        self._checkpoints.mkdir(exist_ok=True)
        final = self._checkpoints / f"{_PREFIX}{progress.iteration:06d}"
        for stale in self._checkpoints.glob(".writing-*"):
            shutil.rmtree(stale)
        draft = Path(tempfile.mkdtemp(prefix=".writing-", dir=self._checkpoints))
        save(str((draft / "rllib").resolve()))
        _export(policy, draft / "policy", record)
        write_json(draft / "progress.json", asdict(progress))
        if generators is not None:
            write_json(draft / GENERATORS, generators)
        seal(draft)
        # later ones are damaged, or this run would not have begun before them
        for undone in [path for path in self._found() if path.name >= final.name]:
            self._drop(undone)
        os.replace(draft, final)
        sync_folder(self._checkpoints)
        self._damaged[final] = ""
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            self._drop(old)
        _export(policy, self.policy, record)
        return final

    def _drop(self, checkpoint: Path) -> None:
        self._damaged.pop(checkpoint, None)
        shutil.rmtree(checkpoint)

    def load_checkpoint(self, path: Path, load: Callable[[str], Any]) -> None:
        """Give the algorithm its own state back.

        Args:
            path: One of `checkpoints`.
            load: Reads the algorithm's state from the folder it is given.

        Raises:
            ValueError: The state names modules or classes that are not there any more.
        """
        try:
            load(str((path / "rllib").resolve()))
        except (ModuleNotFoundError, AttributeError) as error:  # from unpickling
            raise ValueError(
                f"the checkpoint {path} was written by a version of tprl-env or Ray with other "
                f"module paths ({error}) and cannot be resumed; start a new run from its policy: "
                f"tprl train CONFIG --init-policy {path}/policy --out NEW"
            ) from error

    def newest(self) -> tuple[Path, Progress] | None:
        """The newest whole checkpoint, None if there is none.

        Raises:
            ValueError: There are checkpoints, and none of them is whole.
        """
        found = self.checkpoints()
        if found:
            return found[-1], Progress(**json.loads((found[-1] / "progress.json").read_text()))
        damaged = self._found()
        if damaged:
            raise ValueError(
                f"none of the {len(damaged)} checkpoints in {str(self._checkpoints)!r} is whole "
                f"({damaged[-1].name}: {self._damage(damaged[-1])}); restore one from a copy, or "
                "start again with another out"
            )
        return None

    def generators(self, checkpoint: Path) -> dict[str, Any] | None:
        """States of the random generators at a checkpoint, None where it has none."""
        path = checkpoint / GENERATORS
        return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else None

    @contextlib.contextmanager
    def metrics_writer(self, after: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A function that appends one iteration's metrics to the files.

        Args:
            after: Iterations to keep; later lines come from work that a crash has undone.
        """
        from tensorboardX import SummaryWriter

        log = JsonLog(self.metrics)
        log.keep(lambda row: row["iteration"] <= after)
        board = SummaryWriter(str(self.tensorboard), purge_step=after + 1)
        with contextlib.closing(board):

            def write(row: dict[str, Any]) -> None:
                log.append(row)
                for name, value in row.items():
                    if isinstance(value, (int, float)) and name != "iteration":
                        board.add_scalar(name, value, row["iteration"])

            yield write


def _is_older(checkpoint: Path) -> bool:
    """Whether it was written before checkpoints noted checksums; they were renamed when whole."""
    present = [(checkpoint / name).exists() for name in (WHOLE, GENERATORS, "progress.json")]
    return present == [False, False, True]


def _export(policy: PruningPolicy, folder: Path, record: Mapping[str, Any]) -> None:
    policy.save_pretrained(folder)
    write_json(folder / TRAINING_NAME, record)


def _description(config: TrainConfig, resume: bool) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resume": resume,
        "seed": config.seed,
        SOURCE: shared_source(config.source).fingerprint,
        "git_revision": _git_revision(),
        "versions": versions(),
    }


def _git_revision() -> str | None:
    """Revision of the checkout this package lies in, with ``-dirty`` if it was changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
