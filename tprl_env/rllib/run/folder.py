"""The folder of a run: its config, its results, and the checkpoints to resume from.

    config.json        the resolved TrainConfig
    run.json           one entry per start: versions, git revision, seed
    metrics.jsonl      one line per iteration
    tensorboard/       the same for TensorBoard
    checkpoints/       iteration_000020/{rllib, policy, progress.json}; a folder is whole or absent
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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tprl_env.evaluation.results import TRAINING_NAME
from tprl_env.files import JsonLog, versions, write_json
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import TrainConfig

__all__ = ["Progress", "Resume", "RunFolder", "training_record"]

logger = logging.getLogger(__name__)

Resume = bool | Literal["auto"]
"""Whether a run has to exist already; "auto" resumes an existing run and else starts one."""

KEPT_CHECKPOINTS = 3
_PREFIX = "iteration_"
_LIMITS = ("iterations", "max_scores", "max_seconds", "checkpoint_every", "checkpoint_seconds")
_FREE = (  # settings that a run may change between its starts without becoming another one
    *(f"limits.{name}" for name in (*_LIMITS, "report_every")),
    *("resources.torch_threads", "resources.start_timeout", "resources.sample_timeout"),
    *("resources.num_scorers", "resources.scorer_cpus", "resources.scorer_gpus"),
    *("resources.scorer_resources", "resources.gpus_per_learner"),
    *("scoring.device", "scoring.max_outstanding", "scoring.max_crashes_per_row"),
    "scoring.cache_size",
)


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
    """

    iteration: int = 0
    env_steps: int = 0
    episodes: int = 0
    scores: int = 0
    computed: int = 0
    seconds: float = 0.0
    imitation_seconds: float = 0.0


def training_record(config: TrainConfig, progress: Progress, preset: str) -> dict[str, Any]:
    """How a policy was trained; the fields are those of `evaluation.results.TRAINING_FIELDS`."""
    return {
        "algorithm": config.algorithm.name.upper(),
        "preset": preset,
        "seconds": round(progress.seconds + progress.imitation_seconds, 2),
        "lvlm_scores": progress.scores,
        "env_steps": progress.env_steps,
        "seed": config.seed,
    }


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

    def begin(self, config: TrainConfig, *, resume: Resume) -> None:
        """Claim the folder for a run, or check that the run in it can be resumed.

        Args:
            config: The run.
            resume: False wants an empty folder, True a run; ``"auto"`` takes either, so that the
                same command resumes the run.

        Raises:
            ValueError: If the folder holds a run already and ``resume`` is off, holds none and
                ``resume`` is on, or holds a run with another policy.
        """
        saved = self.path / "config.json"
        if resume == "auto":
            resume = saved.is_file()
        if resume:
            if not saved.is_file():
                raise ValueError(f"there is no run in {self.where!r} to resume")
            self._check_same_policy(TrainConfig.from_dict(json.loads(saved.read_text())), config)
        elif saved.exists():
            raise ValueError(
                f"{self.where!r} holds a run already; resume it with --resume, or choose "
                "another --out"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(saved, config.as_dict())
        starts = self.path / "run.json"
        entries = json.loads(starts.read_text()) if starts.is_file() else []
        entries.append(_description(config, resume))
        write_json(starts, entries)

    def _check_same_policy(self, old: TrainConfig, new: TrainConfig) -> None:
        before, now = _shape(old), _shape(new)
        different = [name for name in before if before[name] != now[name]]
        if different:
            table = ", ".join(f"{name} {before[name]!r}, now {now[name]!r}" for name in different)
            raise ValueError(
                f"the run in {self.where!r} trains a policy of another shape ({table}); resume "
                "with its own settings, or choose another --out"
            )
        old_table, new_table = old.flat(), new.flat()
        changed = [n for n in new_table if n not in _FREE and old_table[n] != new_table[n]]
        if changed:
            table = ", ".join(f"{n} {old_table[n]!r}, now {new_table[n]!r}" for n in changed)
            logger.warning("the run in %s resumes with other settings: %s", self.where, table)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = self._checkpoints.glob(f"{_PREFIX}*/progress.json")
        return sorted(path.parent for path in found)

    def save_checkpoint(
        self,
        progress: Progress,
        policy: PruningPolicy,
        save: Callable[[str], Any],
        record: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint beside its final place, rename it, drop the oldest.

        Args:
            progress: Of the run.
            policy: The policy.
            save: Writes the algorithm's own state into the folder it is given.
            record: How the policy was trained, for ``training.json`` beside it.
        """
        self._checkpoints.mkdir(exist_ok=True)
        final = self._checkpoints / f"{_PREFIX}{progress.iteration:06d}"
        for stale in self._checkpoints.glob(".writing-*"):
            shutil.rmtree(stale)
        draft = Path(tempfile.mkdtemp(prefix=".writing-", dir=self._checkpoints))
        save(str((draft / "rllib").resolve()))
        _export(policy, draft / "policy", record)
        write_json(draft / "progress.json", asdict(progress))
        if final.exists():
            shutil.rmtree(final)
        os.replace(draft, final)
        for old in self.checkpoints()[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)
        _export(policy, self.policy, record)
        return final

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
        """The newest whole checkpoint, None if there is none."""
        found = self.checkpoints()
        if not found:
            return None
        return found[-1], Progress(**json.loads((found[-1] / "progress.json").read_text()))

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


def _export(policy: PruningPolicy, folder: Path, record: Mapping[str, Any]) -> None:
    policy.save_pretrained(folder)
    write_json(folder / TRAINING_NAME, record)


def _shape(config: TrainConfig) -> dict[str, Any]:
    """What a policy's weights and their meaning, and the learner's state, depend on."""
    table = {name: value for name, value in config.flat().items() if name.startswith("policy.")}
    del table["policy.initial_keep"]
    table |= {"rules.query": config.rules.query, "algorithm": config.algorithm.name}
    # without the step as input the weights serve any number of steps
    return table | {"rules.max_steps": config.policy.step_input and config.rules.max_steps}


def _description(config: TrainConfig, resume: bool) -> dict[str, Any]:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resume": resume,
        "seed": config.seed,
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
