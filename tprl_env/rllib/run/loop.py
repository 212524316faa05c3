"""The iterations of one start of a run: train, note, save, until a limit or a reason to stop."""

from __future__ import annotations

import functools
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
from tprl_env.rllib.run.changes import has_effect
from tprl_env.rllib.run.diverged import DivergedError, not_finite
from tprl_env.rllib.run.folder import Progress, RunFolder, training_record
from tprl_env.rllib.run.generators import read_generators, resumes_exactly, write_generators
from tprl_env.rllib.run.metrics_row import IterationRow, ProgressLines, iteration_row
from tprl_env.rllib.run.termination import Terminated, Termination

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
        ending: Termination,
    ) -> None:
        self.config, self.folder, self.algorithm = config, folder, algorithm
        self.lines, self.on_iteration, self._ending = lines, on_iteration, ending
        self.progress, self.row, self.preset = begun, {"iteration": 0}, preset
        self._source = shared_source(config.source)
        self._saved_at = time.monotonic()
        newest = folder.newest()
        if newest is not None:
            path, self.progress = newest
            folder.load_checkpoint(path, algorithm.restore_from_path)
            # Restoring leaves remote runners with the weights they were built with.
            algorithm.env_runner_group.sync_weights(
                from_worker_or_learner_group=algorithm.learner_group, inference_only=True
            )
            self._set_rates()
            states = folder.generators(path)
            if states is not None:
                write_generators(algorithm, states)
            changed = any(has_effect(name) for name in folder.changed)
            if states is None or changed or not resumes_exactly(config):
                self.progress.resumed += 1
            self.row = {"iteration": self.progress.iteration}
            lines.say(f"resuming after iteration {self.progress.iteration}")

    def _set_rates(self) -> None:
        """Let this start's learning rate act at once: the optimiser's state brings the old one."""
        self.algorithm.learner_group.foreach_learner(
            functools.partial(_set_rate, rate=self.config.algorithm.lr)
        )

    def run(self) -> str:
        """Iterate until a limit is reached; returns its name."""
        saved, whole = self.progress.iteration, self.folder.newest() is not None
        with self.folder.metrics_writer(after=self.progress.iteration) as write:
            while not (limit := self._limit()):
                with self._ending.finishing():
                    self.row = self._iterate().as_dict()
                    write(self.row)
                    self.lines.show(self.row, last=bool(self._limit()))
                    if self.on_iteration is not None:
                        self.on_iteration(self.row, self.policy())
                    if self._ending.asked or self._due(saved):
                        saved, whole = self._save(), True
                if self._ending.asked:
                    raise Terminated(f"stopped by SIGTERM after iteration {saved}, which is saved")
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
            result = self._train()
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

    def _train(self) -> dict[str, Any]:
        """RLlib's iteration; a run that has diverged stops in it.

        Raises:
            DivergedError: The loss, the weights or the logits are not finite.
        """
        number = self.progress.iteration + 1
        try:
            result: dict[str, Any] = self.algorithm.train()
        except (ValueError, FloatingPointError) as error:
            wrong = not_finite({}, self.policy(), self._source)
            if wrong:
                raise self._diverged(number, wrong) from error
            raise
        wrong = not_finite(result, self.policy(), self._source)
        if wrong:
            raise self._diverged(number, wrong)
        return result

    def _diverged(self, number: int, wrong: str) -> DivergedError:
        newest = self.folder.newest()
        kept = "there is no checkpoint before it" if newest is None else f"{newest[0]} is kept"
        return DivergedError(
            f"the run diverged in iteration {number}: {wrong}; {kept}; lower algorithm.lr "
            f"({self.config.algorithm.lr:g} now) and resume, or start again with another out"
        )

    def _due(self, saved: int) -> bool:
        often = self.progress.iteration - saved >= self.config.limits.checkpoint_every
        return often and time.monotonic() - self._saved_at >= self.config.limits.checkpoint_seconds

    def _save(self) -> int:
        save = self.algorithm.save_to_path
        states = read_generators(self.algorithm)
        self.folder.save_checkpoint(self.progress, self.policy(), save, self.record(), states)
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
        policy = PruningPolicy(policy_config(self.config, self._source))
        policy.load_state_dict(
            {
                name.removeprefix(head): torch.as_tensor(part)
                for name, part in weights.items()
                if name.startswith(head)  # GRPO's learner also holds the start policy
            }
        )
        return policy.eval()


def _set_rate(learner: Any, rate: float) -> None:
    for _, optimizer in learner.get_optimizers_for_module(DEFAULT_MODULE_ID):
        for group in optimizer.param_groups:
            group["lr"] = rate
