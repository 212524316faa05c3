"""The metrics row of one training iteration, and the progress line printed from it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray.rllib.core import DEFAULT_MODULE_ID

from tprl_env.rllib.config import TrainConfig
from tprl_env.rllib.run.folder import Progress

__all__ = ["IterationRow", "ProgressLines", "iteration_row"]


@dataclass(frozen=True)
class IterationRow:
    """Metrics of one iteration; totals count over all starts of the run.

    Attributes:
        iteration: Number of the iteration, from 1.
        seconds: Training time in total.
        iteration_seconds: Of this iteration.
        sample_seconds: Rolling out and scoring per iteration, smoothed by RLlib.
        learn_seconds: Gradient steps per iteration, smoothed by RLlib.
        env_steps: In total.
        episodes: In total.
        scores: Requested in total.
        computed: Computed by the LVLM in total.
        mean_return: Undiscounted return per episode.
        score: Of the final masks.
        full_score: Of the same samples with all tokens.
        kept: Tokens in the final masks.
        keep_ratio: Of the tokens that exist.
        explained_variance: By the critic before the update.
        policy_loss: Last minibatch.
        value_loss: Last minibatch.
        entropy: Last minibatch, as weighted in the loss.
        kl: Estimate of KL(old || new), last minibatch.
        clipped: Share of clipped ratios, last minibatch.
        reference_kl: Estimate of KL(policy || start policy) of whole masks, last minibatch (GRPO).
        memory_weight: Mean w of the groups with a memory (MAPO).
        memory_groups: Share of groups with a memory (MAPO).
        memory_episodes: Episodes remembered (MAPO).
        scores_per_second: Requested in this iteration over its seconds.
        busy_share: Busy seconds of the scorers over their number times the iteration's seconds.
        batch_fill: Mean rows of a pass over the batch size.
        duplicates: Scores of this iteration copied inside a request.
        cache_hits: Scores of this iteration remembered.
        retries: Requests of this iteration sent again.
        runners: Healthy remote runners.
    """

    iteration: int
    seconds: float
    iteration_seconds: float
    sample_seconds: float
    learn_seconds: float
    env_steps: int
    episodes: int
    scores: int
    computed: int
    mean_return: float
    score: float
    full_score: float
    kept: float
    keep_ratio: float
    explained_variance: float
    policy_loss: float
    value_loss: float
    entropy: float
    kl: float
    clipped: float
    reference_kl: float
    memory_weight: float
    memory_groups: float
    memory_episodes: float
    scores_per_second: float
    busy_share: float
    batch_fill: float
    duplicates: int
    cache_hits: int
    retries: int
    runners: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: rounded to six digits, None for what is not a number."""
        return {
            name: _rounded(value) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


def iteration_row(
    result: Mapping[str, Any], progress: Progress, seconds: float, config: TrainConfig
) -> IterationRow | None:
    """Pick the numbers out of RLlib's result and advance the run's totals.

    Returns:
        None if no runner delivered anything in this iteration.
    """
    runners = result.get("env_runners", {})
    learner = result.get("learners", {}).get(DEFAULT_MODULE_ID)
    if learner is None or not runners.get("num_env_steps_sampled"):
        return None
    scorer = runners.get("scorer", {})
    timers, memory = result.get("timers", {}), result.get("memory", {})
    progress.iteration += 1
    progress.env_steps += int(runners["num_env_steps_sampled"])
    progress.episodes += int(runners.get("num_episodes", 0))
    progress.scores += int(scorer.get("scores", 0))
    progress.computed += int(scorer.get("computed", 0))

    def number(table: Mapping[str, Any], name: str) -> float:
        return float(table.get(name, float("nan")))

    healthy = result.get("fault_tolerance", {}).get("num_healthy_workers", 0)
    return IterationRow(
        iteration=progress.iteration,
        seconds=progress.seconds,
        iteration_seconds=seconds,
        sample_seconds=number(timers, "env_runner_sampling_timer"),
        learn_seconds=number(timers, "learner_update_timer"),
        env_steps=progress.env_steps,
        episodes=progress.episodes,
        scores=progress.scores,
        computed=progress.computed,
        mean_return=number(runners, "episode_return_mean"),
        score=number(runners, "score"),
        full_score=number(runners, "full_score"),
        kept=number(runners, "kept"),
        keep_ratio=number(runners, "keep_ratio"),
        explained_variance=number({**learner, **runners}, "explained_variance"),
        policy_loss=number(learner, "policy_loss"),
        value_loss=number(learner, "vf_loss"),
        entropy=number(learner, "entropy"),
        kl=number(learner, "mean_kl_loss"),
        clipped=number(learner, "clipped_share"),
        reference_kl=number(learner, "reference_kl"),
        memory_weight=number(memory, "weight"),
        memory_groups=number(memory, "groups"),
        memory_episodes=number(memory, "episodes"),
        scores_per_second=float(scorer.get("scores", 0)) / max(seconds, 1e-9),
        busy_share=float(scorer.get("busy_seconds", 0))
        / max(seconds, 1e-9)
        / max(1, config.resources.num_scorers),
        batch_fill=number(scorer, "batch_fill"),
        duplicates=int(scorer.get("duplicates", 0)),
        cache_hits=int(scorer.get("cache_hits", 0)),
        retries=int(scorer.get("retries", 0)),
        runners=int(healthy),
    )


def _rounded(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


class ProgressLines:
    """A table that grows by a line every few iterations.

    Each of the first ``every`` iterations has a line, so that a short run shows all of its own;
    then one in ``every`` has, and the last one always.

    Args:
        every: Iterations between lines; 0 prints nothing at all.
    """

    _COLUMNS = (
        ("iteration", "iteration", "{:d}"),
        ("seconds", "seconds", "{:.0f}"),
        ("scores", "scores", "{:d}"),
        ("mean_return", "return", "{:.3f}"),
        ("score", "score", "{:.3f}"),
        ("kept", "tokens kept", "{:.1f}"),
        ("scores_per_second", "scores/s", "{:.0f}"),
        ("busy_share", "scorers busy", "{:.0%}"),
    )

    def __init__(self, every: int) -> None:
        self._every, self._headed = every, False

    def say(self, text: str) -> None:
        """Print a remark."""
        if self._every:
            print(text, flush=True)

    def show(self, row: Mapping[str, Any], *, last: bool = False) -> None:
        """Print an iteration's line if it is due, or if it is the last."""
        every, iteration = self._every, row["iteration"]
        if not every or not (last or iteration <= every or (iteration - 1) % every == 0):
            return
        if not self._headed:
            print(*(f"{title:>{_width(title)}}" for _, title, _ in self._COLUMNS), sep="  ")
            self._headed = True
        cells = [
            f"{'-' if row[name] is None else form.format(row[name]):>{_width(title)}}"
            for name, title, form in self._COLUMNS
        ]
        print(*cells, sep="  ", flush=True)


def _width(title: str) -> int:
    return max(9, len(title))
