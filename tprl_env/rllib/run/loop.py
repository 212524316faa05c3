"""The iterations of one start of a run: train, note, save, until a limit or a reason to stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)

from tprl_env.data.features import shared_source
from tprl_env.policy.network import PruningPolicy
from tprl_env.rllib.config import TrainConfig, policy_config
from tprl_env.rllib.run.folder import Progress, RunFolder, training_record
from tprl_env.rllib.run.metrics_row import IterationRow, ProgressLines, iteration_row

__all__ = ["Loop", "OnIteration"]

logger = logging.getLogger(__name__)

OnIteration = Callable[[dict[str, Any], PruningPolicy], None]

_EMPTY_ITERATIONS = 5


class Loop:
    """Iterations of one call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        algorithm: Algorithm,
        lines: ProgressLines,
        on_iteration: OnIteration | None,
        begun: Progress,
        preset: str,
    ) -> None:
        self.config, self.folder, self.algorithm = config, folder, algorithm
        self.lines, self.on_iteration = lines, on_iteration
        self.progress, self.row, self.preset = begun, {"iteration": 0}, preset
        self._saved_at = time.monotonic()
        newest = folder.newest()
        if newest is not None:
            path, self.progress = newest
            folder.load_checkpoint(path, algorithm.restore_from_path)
            # Restoring leaves remote runners with the weights they were built with.
            algorithm.env_runner_group.sync_weights(
                from_worker_or_learner_group=algorithm.learner_group, inference_only=True
            )
            self.row = {"iteration": self.progress.iteration}
            lines.say(f"resuming after iteration {self.progress.iteration}")

    def run(self) -> str:
        """Iterate until a limit is reached; returns its name."""
        saved, whole = self.progress.iteration, self.folder.newest() is not None
        with self.folder.metrics_writer(after=self.progress.iteration) as write:
            while not (limit := self._limit()):
                self.row = self._iterate().as_dict()
                write(self.row)
                self.lines.show(self.row)
                if self.on_iteration is not None:
                    self.on_iteration(self.row, self.policy())
                if self._due(saved):
                    saved, whole = self._save(), True
        if not whole or saved != self.progress.iteration:
            self._save()
        return limit

    def _limit(self) -> str:
        """Name of the limit that is reached, empty if none."""
        limits, done = self.config.limits, self.progress
        reached = {"iterations": done.iteration, "max_scores": done.scores}
        reached["max_seconds"] = done.seconds  # type: ignore[assignment]
        for name, value in reached.items():
            limit = getattr(limits, name)
            if limit is not None and value >= limit:
                return name
        return ""

    def _iterate(self) -> IterationRow:
        """One iteration that delivered something."""
        for _ in range(_EMPTY_ITERATIONS):
            begin = time.monotonic()
            result = self.algorithm.train()
            seconds = time.monotonic() - begin
            self.progress.seconds += seconds
            row = iteration_row(result, self.progress, seconds, self.config)
            if row is not None:
                return row
            logger.warning("no runner delivered in this iteration; trying again")
        raise RuntimeError(
            f"the env runners delivered nothing in {_EMPTY_ITERATIONS} iterations; their logs say "
            "why (ray logs), and resources.sample_timeout may be too short for the scorers"
        )

    def _due(self, saved: int) -> bool:
        often = self.progress.iteration - saved >= self.config.limits.checkpoint_every
        return often and time.monotonic() - self._saved_at >= self.config.limits.checkpoint_seconds

    def _save(self) -> int:
        save = self.algorithm.save_to_path
        self.folder.save_checkpoint(self.progress, self.policy(), save, self.record())
        self._saved_at = time.monotonic()
        return self.progress.iteration

    def record(self) -> dict[str, Any]:
        """How the policy was trained so far."""
        return training_record(self.config, self.progress, self.preset)

    def policy(self) -> PruningPolicy:
        """The learner's policy, on the CPU."""
        component = f"{COMPONENT_LEARNER}/{COMPONENT_RL_MODULE}/{DEFAULT_MODULE_ID}"
        state = self.algorithm.learner_group.get_state(components=[component])
        weights = state[COMPONENT_LEARNER][COMPONENT_RL_MODULE][DEFAULT_MODULE_ID]
        head = "pruning_policy."
        policy = PruningPolicy(policy_config(self.config, shared_source(self.config.source)))
        policy.load_state_dict(
            {
                name.removeprefix(head): torch.as_tensor(part)
                for name, part in weights.items()
                if name.startswith(head)  # GRPO's learner also holds the start policy
            }
        )
        return policy.eval()
