"""Training from a config to an exported policy: scorers, imitation, iterations, checkpoints."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import (
    COMPONENT_LEARNER,
    COMPONENT_RL_MODULE,
    DEFAULT_MODULE_ID,
)

from tprl_env.data.features import TokenSource, shared_source
from tprl_env.policy.imitation import ImitationReport
from tprl_env.policy.network import PruningPolicy
from tprl_env.ray_session import ray_session
from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.config import TrainConfig, policy_config, scorer_spec
from tprl_env.rllib.rollout.module import load_policy
from tprl_env.rllib.run.folder import Progress, Resume, RunFolder, training_record
from tprl_env.rllib.run.imitate import HEURISTICS, imitate, imitation_seconds
from tprl_env.rllib.run.metrics_row import IterationRow, ProgressLines, iteration_row
from tprl_env.rllib.run.mirror import open_run_folder
from tprl_env.rllib.run.placement import actor_cpus, check_room
from tprl_env.scoring.pool import ScorerPool
from tprl_env.scoring.spec import PoolAddress

__all__ = ["TrainResult", "train"]

logger = logging.getLogger(__name__)

OnIteration = Callable[[dict[str, Any], PruningPolicy], None]

_EMPTY_ITERATIONS = 5
_NOISY_LOGGERS = (  # warn about RLlib's own internals at every start
    "ray._common.deprecation",
    "ray._private.authentication.authentication_token_setup",
    "ray.rllib.algorithms.algorithm_config",
    "ray.tune.trainable.trainable",
    "ray.tune.utils.util",
)


@dataclass(frozen=True)
class TrainResult:
    """What a call of `train` has reached.

    Attributes:
        out: The run's folder on this machine.
        where: The run's place as it was given, a path or a URI.
        policy_path: Exported policy (safetensors + config.json + training.json).
        record: How the policy was trained, the content of its ``training.json``.
        progress: Iterations, steps and scores over all starts.
        metrics: Row of the last iteration.
        stopped_by: ``"iterations"``, ``"max_scores"`` or ``"max_seconds"``.
        imitation: Report of the imitation, None if there was none in this call.
    """

    out: Path
    where: str
    policy_path: Path
    record: dict[str, Any]
    progress: Progress
    metrics: dict[str, Any]
    stopped_by: str
    imitation: ImitationReport | None = None


def train(
    config: TrainConfig,
    out: str | Path | RunFolder,
    *,
    resume: Resume = False,
    init_policy: str | Path | None = None,
    preset: str = "custom",
    progress: bool = True,
    iterations: int | None = None,
    max_scores: int | None = None,
    max_seconds: float | None = None,
    on_iteration: OnIteration | None = None,
) -> TrainResult:
    """Train a policy.

    Args:
        config: The run.
        out: Folder or URI for everything that is written, see `tprl_env.rllib.run.folder`.
        resume: From the newest complete checkpoint in ``out``; ``"auto"`` starts a run if there
            is none.
        init_policy: Policy folder to start from instead of imitation or random weights.
        preset: Name of the config, for ``training.json`` beside the exported policy.
        progress: Print a line every ``limits.report_every`` iterations.
        iterations: Overrides ``limits.iterations``.
        max_scores: Overrides ``limits.max_scores``; counts requested scores over all starts.
        max_seconds: Overrides ``limits.max_seconds``; counts training time over all starts.
        on_iteration: Called after each iteration with the row of metrics and the policy.

    Raises:
        ValueError: For a run without an end, a folder or a policy that does not fit.
        ScoringError: If the scorers cannot be started, or a mask cannot be scored.
        PlacementError: If the cluster lacks resources for the env runners or learners.
        RuntimeError: If the remote runners deliver nothing.
    """
    given = {"iterations": iterations, "max_scores": max_scores, "max_seconds": max_seconds}
    limits = {f"limits.{name}": limit for name, limit in given.items() if limit is not None}
    config = config.replace(**limits)
    if all(getattr(config.limits, name) is None for name in given):
        raise ValueError(
            "this run would never end; set limits.iterations, limits.max_scores or "
            "limits.max_seconds"
        )
    config = _absolute(config)
    _check_inputs(config, init_policy)
    folder = open_run_folder(out)
    folder.begin(config, resume=resume)
    lines = ProgressLines(config.limits.report_every if progress else 0)
    with _quiet(), _threads(config.resources.torch_threads), ray_session(actor_cpus(config)):
        start, imitation = _start_policy(config, folder, init_policy, lines)
        with _scorers(config, lines) as pool:
            settings = algorithm_config(config, pool=pool, init_policy=start)
            check_room(settings, config.resources.start_timeout)  # RLlib waits without a timeout
            algorithm = settings.build_algo()
            try:
                begun = Progress(imitation_seconds=imitation_seconds(start))
                loop = _Loop(config, folder, algorithm, lines, on_iteration, begun, preset)
                stopped_by = loop.run()
            finally:
                algorithm.stop()
    return TrainResult(
        out=folder.path,
        where=folder.where,
        policy_path=folder.policy,
        record=loop.record(),
        progress=loop.progress,
        metrics=loop.row,
        stopped_by=stopped_by,
        imitation=imitation,
    )


def _absolute(config: TrainConfig) -> TrainConfig:
    """Paths as actors need them: their working folder may be another."""
    changes = {
        name: str(Path(value).resolve())
        for name, value in (("source", config.source), ("lvlm", config.lvlm))
        if value and Path(value).is_dir()
    }
    return config.replace(**changes)


def _check_inputs(config: TrainConfig, init_policy: str | Path | None) -> None:
    """Refuse a source, LVLM or policy that does not fit, before anything is written or started.

    Raises:
        ValueError: Naming what does not fit.
        FileNotFoundError: For a missing LVLM.
    """
    scorer_spec(config)
    source = shared_source(config.source)
    wanted = policy_config(config, source)
    if init_policy is not None:
        load_policy(str(init_policy), wanted)
    budget = config.rules.budget
    if (budget if isinstance(budget, int) else (budget or (0, 0))[0]) > source.max_tokens:
        raise ValueError(
            f"rules.budget {budget} asks for more tokens than the {source.max_tokens} of "
            f"{config.source}; lower it"
        )
    if config.scoring.scorer == "lvlm":
        _check_lvlm(config, source)
    free = ("none", *HEURISTICS)
    channel = config.imitation.demonstrator
    missing = channel not in free and not source.has_channel(channel)
    if missing and init_policy is None:
        raise ValueError(
            f"imitation.demonstrator {channel!r} needs a channel that {config.source} does not "
            f"hold; encode it with --question-attention, or set it to {', '.join(free)}"
        )


def _check_lvlm(config: TrainConfig, source: TokenSource) -> None:
    """Refuse an LVLM that cannot be loaded, or another one than the store was encoded with.

    Raises:
        StoreError: The store is another LVLM's.
        ValueError: The checkpoint is of no known family.
        FileNotFoundError: There is no such checkpoint.
    """
    from tprl_env.data.features.store import FeatureStore
    from tprl_env.lvlm import find_lvlm
    from tprl_env.lvlm.loading.checkpoint import folder_fingerprint, is_local

    place, _ = find_lvlm(config.lvlm)
    if isinstance(source, FeatureStore) and is_local(place):
        FeatureStore.open(source.path, lvlm_fingerprint=folder_fingerprint(Path(place)))


def _start_policy(
    config: TrainConfig, folder: RunFolder, init_policy: str | Path | None, lines: ProgressLines
) -> tuple[str | None, ImitationReport | None]:
    """Folder of the policy to start from; None for random weights or a checkpoint."""
    if folder.newest() is not None:
        return None, None
    source = shared_source(config.source)
    if init_policy is not None:
        return str(Path(init_policy).resolve()), None
    if config.imitation.demonstrator == "none":
        return None, None
    report = None
    if not (folder.imitated_policy / "config.json").is_file():  # else a killed run had finished it
        lines.say(f"imitating {config.imitation.demonstrator} for {config.imitation.steps} steps")
        report = imitate(config, source, folder.imitated_policy)
        lines.say(
            f"imitation took {report.seconds:.0f} s: loss {report.final_loss:.3f}, "
            f"{report.agreement:.0%} of the demonstrated tokens"
        )
    return str(folder.imitated_policy.resolve()), report


class _Loop:
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
                self.lines.show(self.row, last=bool(self._limit()))
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


@contextlib.contextmanager
def _scorers(config: TrainConfig, lines: ProgressLines) -> Iterator[PoolAddress | None]:
    """Address of the run's scorer actors; None where the runners score in their own process."""
    resources, scoring = config.resources, config.scoring
    if not resources.num_scorers:
        yield None
        return
    lines.say(f"starting {resources.num_scorers} scorers")
    pool = ScorerPool.start(
        scorer_spec(config),
        resources.num_scorers,
        num_cpus=resources.scorer_cpus,
        num_gpus=resources.scorer_gpus,
        resources=resources.scorer_resources,
        start_timeout=resources.start_timeout,
        max_outstanding=scoring.max_outstanding,
        max_crashes_per_row=scoring.max_crashes_per_row,
        cache_size=scoring.cache_size,
    )
    with contextlib.closing(pool):
        yield pool.address


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep RLlib's notes about its own internals off the screen."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    """Torch threads of the driver: the scorers need the other cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
