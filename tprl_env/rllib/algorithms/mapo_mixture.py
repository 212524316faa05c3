"""MAPO's batch: remembered episodes with their share of the policy, and new ones outside.

For one group, the draws of a sample, with B the remembered episodes of that sample and budget
(Liang et al. 2018, eq. 5-7):

    w = max(pi(B), w_min), 0 where nothing is remembered
    objective = w sum_b pi(b)/pi(B) R(b) + (1 - w) mean of R over the draws that are not in B

pi is the policy that the draws were made with, the current one when the batch is learned from;
whole masks of hundreds of tokens have probabilities far below the smallest float, so all of it is
computed from logarithms, and w sits at w_min until the policy has come close to its memory.

Returns are compared with the mean of the same mixture, sum of weight x return. Where w = pi(B) the
mixture is the policy itself, and a baseline changes no expected gradient. Where w was raised to
w_min it matters: with this baseline a group's pull towards its memory is proportional to
w (1 - w) (return inside - return outside), nothing if the memory is no better than new draws. The
mean contains the episode itself, as GRPO's does: a factor of 1 - 1/number of draws.

Shapes: R rows, B episodes of a rollout, M remembered episodes, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing
from torch import Tensor

from tprl_env.policy.observations import to_tensors
from tprl_env.rllib.algorithms.losses import ROW_WEIGHT
from tprl_env.rllib.algorithms.mapo_memory import EpisodeMemory, Key
from tprl_env.rllib.rollout.episodes import (
    EPISODE,
    GROUP,
    RETURN,
    EpisodeColumns,
    join_columns,
    numbered_observation,
)

__all__ = ["Judge", "MixtureReport", "Weights", "mix", "mixture_weights"]

Judge = Callable[[dict[str, Tensor], Tensor], tuple[Tensor, Tensor]]
"""Observation of R rows and their actions -> distribution inputs (R, ...) and log-probs (R,)."""

_MARGIN = 1e-6  # a return must exceed the group's mean by more than rounding
_NEW_STATES = 1 << 32  # numbers of states that no draw has been in


@dataclass(frozen=True)
class MixtureReport:
    """What a batch was mixed from; means over its groups.

    Attributes:
        groups: Share of groups with a memory.
        weight: Mean w of these, None without any.
        log_probability: Mean log pi(B) of these, None without any.
        rejected: Share of draws that were remembered already.
        remembered: Episodes that are new in the memory.
    """

    groups: float
    weight: float | None
    log_probability: float | None
    rejected: float
    remembered: int


@dataclass(frozen=True)
class Weights:
    """Mixture of G groups.

    Attributes:
        memory: w, (G,).
        log_probability: log pi(B), (G,), -inf where nothing is remembered.
        inside: (M,), weight of each remembered episode.
        outside: (B,), weight of each draw, 0 where remembered.
        baseline: (G,), mean return of the mixture.
    """

    memory: npt.NDArray[np.float64]
    log_probability: npt.NDArray[np.float64]
    inside: npt.NDArray[np.float64]
    outside: npt.NDArray[np.float64]
    baseline: npt.NDArray[np.float64]


def mixture_weights(
    groups: int,
    inside: tuple[npt.NDArray[np.int64], npt.NDArray[Any], npt.NDArray[Any]],
    draws: tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[Any]],
    least: float,
) -> Weights:
    """Weights and baselines, see the module's text.

    Args:
        groups: G.
        inside: Group, log-probability and return of each remembered episode, (M,).
        draws: Group, whether remembered, and return of each draw, (B,).
        least: w_min.
    """
    place, logp, value = inside
    peak = np.full(groups, -np.inf)
    np.maximum.at(peak, place, logp)
    total = np.bincount(place, np.exp(logp - peak[place]), groups)
    has = total > 0
    log_probability = np.where(has, peak + np.log(np.where(has, total, 1.0)), -np.inf)
    weight = np.where(has, np.maximum(np.exp(np.minimum(log_probability, 0.0)), least), 0.0)
    share = weight[place] * np.exp(logp - log_probability[place])
    group, known, returns = draws
    number = np.bincount(group, ~known, groups)
    outside = np.where(known, 0.0, (1.0 - weight)[group] / np.maximum(number, 1.0)[group])
    mass = np.bincount(place, share, groups) + np.bincount(group, outside, groups)
    gained = np.bincount(place, share * value, groups) + np.bincount(
        group, outside * returns, groups
    )
    return Weights(weight, log_probability, share, outside, gained / mass)


def mix(
    batches: list[EpisodeColumns],
    memory: EpisodeMemory,
    judge: Judge,
    least: float,
    normalize: bool,
) -> tuple[list[EpisodeColumns], MixtureReport]:
    """Mix rollouts with the memory, then remember the best new episodes.

    An episode is remembered if its return exceeds the mean of its group, that is, what this policy
    gets from this sample on average. The memory that a batch is mixed with is the one
    before the batch, otherwise being good would decide whether a draw counts as drawn.

    Args:
        batches: Whole groups as the runners return them.
        memory: Is added to.
        judge: The policy that made the draws.
        least: w_min.
        normalize: Divide the advantages by their deviation over the batch.

    Returns:
        Stores with advantages and row weights of mean 1, and a report.
    """
    parts = [_Part(batch, memory, judge, least) for batch in batches]
    rows = [part.rows for part in parts]
    weights = np.concatenate([columns[ROW_WEIGHT] for columns in rows])
    gains = np.concatenate([columns[Postprocessing.ADVANTAGES] for columns in rows])
    scale = 1.0
    if normalize:
        scale = max(float(np.sqrt((weights * gains**2).sum() / weights.sum())), 1e-4)
    for columns in rows:
        columns[ROW_WEIGHT] = (columns[ROW_WEIGHT] / weights.mean()).astype(np.float32)
        gain = columns[Postprocessing.ADVANTAGES] / scale
        columns[Postprocessing.ADVANTAGES] = gain.astype(np.float32)
    remembered = sum(part.remember(memory) for part in parts)
    mixed = [EpisodeColumns(columns, len(columns[ROW_WEIGHT])) for columns in rows]
    return mixed, _report(parts, remembered)


def _report(parts: list[_Part], remembered: int) -> MixtureReport:
    weight = np.concatenate([part.weights.memory for part in parts])
    log_probability = np.concatenate([part.weights.log_probability for part in parts])
    known = np.concatenate([part.known for part in parts])
    has = np.isfinite(log_probability)
    return MixtureReport(
        groups=float(has.mean()),
        weight=float(weight[has].mean()) if has.any() else None,
        log_probability=float(log_probability[has].mean()) if has.any() else None,
        rejected=float(known.mean()),
        remembered=remembered,
    )


class _Part:
    """One rollout and what is remembered of its samples."""

    def __init__(
        self, batch: EpisodeColumns, memory: EpisodeMemory, judge: Judge, least: float
    ) -> None:
        columns = batch.columns
        obs, episode = columns[Columns.OBS], columns[EPISODE]
        number = int(episode.max()) + 1  # every episode takes the first step: B rows of step 0
        self.group, self.returns = columns[GROUP][:number], columns[RETURN][:number]
        groups = int(self.group.max()) + 1
        first = np.searchsorted(self.group, np.arange(groups))  # a row of each group
        budgets = obs["budget"][:, 0] if "budget" in obs else np.zeros(number)
        self.keys: list[Key] = [(int(obs["sample"][row]), int(budgets[row])) for row in first]
        self.masks = _packed(columns, number)
        found = [memory.recall(key) for key in self.keys]
        sets = [{each.masks for each in several} for several in found]
        self.known = np.array(
            [masks in sets[place] for masks, place in zip(self.masks, self.group, strict=True)]
        )
        place = np.repeat(np.arange(groups), [len(several) for several in found])
        value = np.array([each.value for several in found for each in several])
        inside: dict[str, Any] = {}
        logp: npt.NDArray[Any] = np.zeros(0)
        if len(place):
            packed = [each.masks for several in found for each in several]
            inside, owner = _rows(packed, obs, first[place])
            inputs, row_logp = judge(
                to_tensors(inside[Columns.OBS]), torch.from_numpy(inside[Columns.ACTIONS])
            )
            inside[Columns.ACTION_LOGP] = row_logp.cpu().numpy()
            if Columns.ACTION_DIST_INPUTS in columns:
                inside[Columns.ACTION_DIST_INPUTS] = inputs.cpu().numpy()
            logp = np.bincount(owner, inside[Columns.ACTION_LOGP].astype(np.float64))
        self.weights = mixture_weights(
            groups, (place, logp, value), (self.group, self.known, self.returns), least
        )
        drawn = _few(columns, np.flatnonzero(~self.known[episode]))
        kept = drawn.pop(EPISODE)
        del drawn[GROUP], drawn[RETURN]
        gains = self.returns - self.weights.baseline[self.group]
        drawn |= {ROW_WEIGHT: self.weights.outside[kept], Postprocessing.ADVANTAGES: gains[kept]}
        self.rows = drawn
        if len(place):
            gains = (value - self.weights.baseline[place])[owner]
            inside |= {ROW_WEIGHT: self.weights.inside[owner], Postprocessing.ADVANTAGES: gains}
            self.rows = join_columns([drawn, inside])

    def remember(self, memory: EpisodeMemory) -> int:
        """Add the episodes that are better than their group; returns how many are new."""
        mean = np.bincount(self.group, self.returns) / np.bincount(self.group)
        better = np.flatnonzero(self.returns > mean[self.group] + _MARGIN)
        return sum(
            memory.add(self.keys[self.group[row]], self.masks[row], float(self.returns[row]))
            for row in better
        )


def _packed(columns: dict[str, Any], number: int) -> list[bytes]:
    """Masks after each step of each episode, packed; dead tokens' actions do not count."""
    alive = columns[Columns.OBS]["alive"].astype(np.bool_)
    packed = np.packbits(columns[Columns.ACTIONS].astype(np.bool_) & alive, axis=1)
    order = np.argsort(columns[EPISODE], kind="stable")  # rows come step by step
    stops = np.cumsum(np.bincount(columns[EPISODE], minlength=number)) * packed.shape[1]
    content, starts = packed[order].tobytes(), [0, *stops[:-1].tolist()]
    return [content[start:stop] for start, stop in zip(starts, stops.tolist(), strict=True)]


def _rows(
    packed: list[bytes], obs: dict[str, npt.NDArray[Any]], like: npt.NDArray[np.int64]
) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """Remembered episodes as rows of a batch.

    Args:
        packed: Masks of the M episodes.
        obs: Observation of the draws.
        like: (M,), a first row of each episode's group.

    Returns:
        Observation and actions of the rows, and each row's episode.
    """
    tokens = obs["alive"].shape[1]
    bits = np.frombuffer(b"".join(packed), np.uint8).reshape(-1, (tokens + 7) // 8)
    masks = np.unpackbits(bits, axis=1, count=tokens).astype(np.bool_)
    lengths = np.array([len(each) for each in packed]) // bits.shape[1]
    owner = np.repeat(np.arange(len(packed)), lengths)
    starts = np.cumsum(lengths) - lengths
    step = np.arange(len(owner)) - starts[owner]
    row = like[owner]
    before = np.concatenate([masks[:1], masks[:-1]])  # the mask after the step before
    state = np.where(step == 0, obs["state"][row], _NEW_STATES + np.arange(len(owner)))
    alive = np.where(step[:, None] == 0, obs["alive"][row], before)
    budget = obs["budget"][row, 0] if "budget" in obs else None
    result = numbered_observation(obs["sample"][row], state, alive, step, budget)
    return {Columns.OBS: result, Columns.ACTIONS: masks.astype(np.int8)}, owner


def _few(columns: dict[str, Any], rows: npt.NDArray[np.int64]) -> dict[str, Any]:
    return {
        name: _few(part, rows) if isinstance(part, dict) else part[rows]
        for name, part in columns.items()
    }
