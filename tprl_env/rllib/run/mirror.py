"""A run folder on this machine whose results live in shared storage.

Every start begins with the contents of the storage, so that a job can resume on another machine:
the newest complete checkpoint is fetched, each checkpoint is uploaded after it was written,
completely or not at all. Two starts at a time would overwrite each other: the last one to start
owns the run, and the others stop at their next upload.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.run.folder import (
    DESCRIPTION,
    KEPT_CHECKPOINTS,
    OWNER,
    Progress,
    Resume,
    RunFolder,
    RunTakenOverError,
)
from tprl_env.rllib.run.storage import Storage, StorageError, is_uri

__all__ = ["MirroredRunFolder", "RunTakenOverError", "open_run_folder"]

logger = logging.getLogger(__name__)

_CHECKPOINTS = "checkpoints"


def open_run_folder(place: str | Path | RunFolder) -> RunFolder:
    """The folder of a run, on this machine or mirrored to a URI.

    Args:
        place: A path, a URI such as ``s3://bucket/run``, or a folder that is open already.

    Raises:
        ValueError: For an empty place.
    """
    if isinstance(place, RunFolder):
        return place
    if not str(place).strip():
        raise ValueError("out must be a folder or a URI for the run, got nothing")
    return MirroredRunFolder(Storage.open(str(place))) if is_uri(place) else RunFolder(place)


class MirroredRunFolder(RunFolder):
    """A run folder in a temporary place, removed with the process, and its copy in the storage.

    Args:
        storage: Where the run lives.
    """

    def __init__(self, storage: Storage) -> None:
        scratch = tempfile.mkdtemp(prefix="tprl-run-")
        atexit.register(functools.partial(shutil.rmtree, scratch, ignore_errors=True))
        super().__init__(scratch)
        self.where, self.storage = storage.name, storage
        self._fetch()

    def _fetch(self) -> None:
        """Bring in what a start needs: the description, the metrics, the newest whole state."""
        for name in (*DESCRIPTION, self.metrics.name):
            content = self.storage.read(name)
            if content is not None:
                (self.path / name).write_bytes(content)
        if self.imitated_policy.name in self.storage.folders(""):
            self.storage.fetch_folder(self.imitated_policy.name, self.imitated_policy)
        self._checkpoints.mkdir()
        for name in reversed(self.storage.folders(_CHECKPOINTS)):
            local = self._checkpoints / name
            try:
                self.storage.fetch_folder(f"{_CHECKPOINTS}/{name}", local)
            except StorageError as error:
                logger.warning("%s; trying an older checkpoint", error)
                continue
            shutil.copytree(local / "policy", self.policy)
            break

    def begin(self, config: TrainConfig, *, resume: Resume) -> None:
        """Claim the run, here and in the storage.

        Raises:
            ValueError: As `RunFolder.begin`.
        """
        super().begin(config, resume=resume)
        self._push_files(DESCRIPTION)
        self.storage.drop_torn(_CHECKPOINTS)

    def _claim(self) -> None:
        self.storage.write(OWNER, json.dumps({"start": self._owner}).encode())

    def _read_owner(self) -> bytes | None:
        return self.storage.read(OWNER)

    def withdraw(self) -> None:
        """Remove what `begin` has written of a new run, here and in the storage."""
        super().withdraw()
        if not (self.path / DESCRIPTION[0]).exists():
            for name in (*DESCRIPTION, OWNER):
                self.storage.drop_file(name)

    def save_checkpoint(
        self,
        progress: Progress,
        policy: PruningPolicy,
        save: Callable[[str], Any],
        record: Mapping[str, Any],
        generators: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write a checkpoint here and upload it; the oldest ones go.

        Raises:
            RunTakenOverError: Another start owns the run now.
        """
        final = super().save_checkpoint(progress, policy, save, record, generators)
        self._check_owner()
        if self.imitated_policy.is_dir() and self.imitated_policy.name not in self.storage.folders(
            ""
        ):
            self.storage.push_folder(self.imitated_policy, self.imitated_policy.name)
        # The metrics go first: those of iterations after the checkpoint are cut off on resuming.
        boards = [f"{self.tensorboard.name}/{path.name}" for path in self.tensorboard.glob("*")]
        self._push_files((self.metrics.name, *boards))
        self.storage.push_folder(final, f"{_CHECKPOINTS}/{final.name}")
        self.storage.push_folder(self.policy, self.policy.name)
        for old in list(self.storage.folders(_CHECKPOINTS))[:-KEPT_CHECKPOINTS]:
            self.storage.drop_folder(f"{_CHECKPOINTS}/{old}")
        return final

    def _push_files(self, names: tuple[str, ...]) -> None:
        for name in names:
            if (self.path / name).is_file():
                self.storage.write(name, (self.path / name).read_bytes())
