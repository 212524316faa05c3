"""Imitation before reinforcement (TPRL eq. 7, 8), as configured by a `TrainConfig`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tprl_env.data.features.source import TokenSource
from tprl_env.files import write_json
from tprl_env.policy.demonstrations import nested_masks, pruner_budgets, saliency_demonstrator
from tprl_env.policy.imitation import ImitationReport, pretrain
from tprl_env.policy.network import PruningPolicy
from tprl_env.reducers import DivPrune, Pruner, VisPruner
from tprl_env.rllib.config import TrainConfig, policy_config

__all__ = ["HEURISTICS", "MARK", "imitate", "imitation_counts", "imitation_seconds"]

MARK = "imitated.json"  # written last, so that it marks a finished imitation

# Demonstrators that read pictures only; every other name is a per-sample channel of the store.
HEURISTICS: dict[str, type[Pruner]] = {"vispruner": VisPruner, "divprune": DivPrune}


def imitate(
    config: TrainConfig,
    source: TokenSource,
    folder: Path,
    progress: Callable[[int, float], None] | None = None,
) -> ImitationReport:
    """Train a fresh policy on demonstrations and save it, with its time and agreement.

    Args:
        config: Names the demonstrator and its settings.
        source: The samples.
        folder: Gets the policy, which `algorithm_config` takes as ``init_policy``.
        progress: Called with (step, loss).

    Raises:
        ValueError: If the source lacks what the demonstrator needs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        # a demonstration is a mask of one step, whatever T of the runs that start from it
        shape = dataclasses.replace(policy_config(config, source), trained_steps=1)
        policy = PruningPolicy(shape)
    report = pretrain(
        policy,
        source,
        _demonstrator(config, source),
        steps=config.imitation.steps,
        batch_size=config.imitation.batch_size,
        lr=config.imitation.lr,
        seed=config.seed,
        pos_weight=config.imitation.class_weights,
        progress=progress,
    )
    policy.save_pretrained(folder)
    seconds, agreement = round(report.seconds, 2), round(report.agreement, 4)
    write_json(folder / MARK, {"seconds": seconds, "agreement": agreement})
    return report


def imitation_seconds(folder: str | Path | None) -> float:
    """Seconds of the imitation that made the policy in a folder, 0 where none did."""
    mark = None if folder is None else Path(folder) / MARK
    if mark is None or not mark.is_file():
        return 0.0
    return float(json.loads(mark.read_text(encoding="utf-8"))["seconds"])


def imitation_counts(config: TrainConfig, source: TokenSource) -> tuple[int, int] | None:
    """Least and most tokens that are demonstrated; None for the paper's keep-rates.

    Raises:
        ValueError: If the config does not say how many.
    """
    demonstrator, budget = config.imitation.demonstrator, config.rules.budget
    if demonstrator in HEURISTICS and budget is None and not config.algorithm.count_target:
        return None
    wanted = round(config.algorithm.count_target or 0)
    low, high = config.rules.counts(source.max_tokens) or (wanted, wanted)
    if low < 1:
        raise ValueError(
            f"imitation.demonstrator={demonstrator!r} ranks tokens and needs to know how many to "
            "keep; set rules.budget or algorithm.count_target"
        )
    return low, min(high, source.max_tokens)


def _demonstrator(config: TrainConfig, source: TokenSource) -> Any:
    heuristic = HEURISTICS.get(config.imitation.demonstrator)
    counts = imitation_counts(config, source)
    if heuristic is None:
        return saliency_demonstrator(source, config.imitation.demonstrator, *(counts or (1, 1)))
    if counts is None:
        return nested_masks(source, pruner=heuristic())  # the paper's keep-rates, .75 then .5
    return pruner_budgets(source, heuristic(), *counts, config.seed)
