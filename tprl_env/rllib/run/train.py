"""Training from a config to an exported policy: scorers, imitation, iterations, checkpoints."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tprl_env.data.features import shared_source
from tprl_env.data.features.manifest import trusting
from tprl_env.files import folder_lock
from tprl_env.policy.imitation import ImitationReport
from tprl_env.ray_session import ray_session
from tprl_env.rllib.algorithms import algorithm_config
from tprl_env.rllib.config import TrainConfig, scorer_spec
from tprl_env.rllib.run.folder import Progress, Resume, RunFolder
from tprl_env.rllib.run.imitate import MARK, imitate, imitation_seconds
from tprl_env.rllib.run.inputs import check_inputs
from tprl_env.rllib.run.loop import Loop, OnIteration
from tprl_env.rllib.run.metrics_row import ProgressLines
from tprl_env.rllib.run.mirror import open_run_folder
from tprl_env.rllib.run.placement import actor_cpus, check_room
from tprl_env.rllib.run.termination import termination
from tprl_env.scoring.pool import ScorerPool
from tprl_env.scoring.spec import PoolAddress

__all__ = ["TrainResult", "train"]

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


@trusting
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
    trust: bool = False,
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
        trust: Compare sizes of the store's files only, not their checksums (``--trust``).

    Raises:
        ValueError: For a run without an end, a folder or a policy that does not fit, a folder that
            another process writes (`FolderInUseError`), or a run that diverged (`DivergedError`).
        RunTakenOverError: Another start of the run has taken its folder or storage over.
        Terminated: After SIGTERM.
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
    check_inputs(config, init_policy)
    folder = open_run_folder(out)
    folder.check(config, resume=resume)
    lines = ProgressLines(config.limits.report_every if progress else 0)
    with (
        folder_lock(folder.path, "tprl train"),
        _quiet(),
        _threads(config.resources.torch_threads),
        termination() as ending,
        ray_session(actor_cpus(config)),
        contextlib.ExitStack() as started,
    ):
        ending.listen()  # ray.init has taken the signal for itself
        folder.begin(config, resume=resume)
        started.push(functools.partial(_withdraw, folder))  # until the first iteration
        start, imitation = _start_policy(config, folder, init_policy, lines)
        with _scorers(config, lines) as pool:
            settings = algorithm_config(config, pool=pool, init_policy=start)
            check_room(settings, config.resources.start_timeout)  # RLlib waits without a timeout
            algorithm = settings.build_algo()
            try:
                begun = Progress(imitation_seconds=imitation_seconds(start))
                loop = Loop(config, folder, algorithm, lines, on_iteration, begun, preset, ending)
                started.pop_all()
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


def _withdraw(folder: RunFolder, kind: type[BaseException] | None, *rest: object) -> None:
    """Leave no folder behind a run that was refused; one that was interrupted can resume."""
    if kind is not None and issubclass(kind, Exception):
        folder.withdraw()


def _absolute(config: TrainConfig) -> TrainConfig:
    """Paths as actors need them: their working folder may be another."""
    changes = {
        name: str(Path(value).resolve())
        for name, value in (("source", config.source), ("lvlm", config.lvlm))
        if value and Path(value).is_dir()
    }
    return config.replace(**changes)


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
    if not (folder.imitated_policy / MARK).is_file():  # else a killed run had finished it
        lines.say(f"imitating {config.imitation.demonstrator} for {config.imitation.steps} steps")
        report = imitate(config, source, folder.imitated_policy)
        lines.say(
            f"imitation took {report.seconds:.0f} s: loss {report.final_loss:.3f}, "
            f"{report.agreement:.0%} of the demonstrated tokens"
        )
    return str(folder.imitated_policy.resolve()), report


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
