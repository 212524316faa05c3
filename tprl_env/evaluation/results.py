"""``results.json``: the record of a comparison, written atomically and checked.

The file is meant to be read by scripts; :func:`check_results` is the definition of its layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

TRAINING_NAME = "training.json"
"""File beside a policy's weights that says how it was trained; `tprl_env.rllib` writes it."""
KNOWLEDGE = ("policy", "heuristic", "oracle", "random")
TRAINING_FIELDS: dict[str, type | tuple[type, ...]] = {
    "algorithm": str,
    "preset": str,
    "seconds": (int, float),
    "lvlm_scores": int,
    "env_steps": int,
    "seed": int,
}
"""Fields of ``training.json`` and of ``training`` in a results file.

    algorithm    PPO, GRPO or MAPO
    preset       name of the config, "custom" where it has none
    seconds      of training over all starts of the run, with the imitation it began from
    lvlm_scores  scores asked for, over all starts
    env_steps    steps of all episodes
    seed         of the run
"""
RUN_KEY = b"tprl_run"
"""Metadata of the Parquet file's schema that holds ``run`` of the results file it belongs to."""
METHOD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "knowledge": str,
    "budget": int,
    "mean_tokens": (int, float),
    "accuracy": (int, float),
    "ci95": list,
}


def _check_fields(row: Any, fields: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} must be an object, got {_short(row)}")
    for name, wanted in fields.items():
        if name not in row:
            raise ValueError(f"{where} has no {name!r}; write the file with this version")
        if not isinstance(row[name], wanted) or isinstance(row[name], bool):
            raise ValueError(f"{where}: {name!r} must be {wanted}, got {_short(row[name])}")
        if isinstance(row[name], (int, float)):
            _check_number(row[name], f"{where}: {name!r}")


def _check_number(value: Any, where: str, most: float = math.inf) -> None:
    """Refuse what is not a finite number in [0, most]; a whole number must fit into 64 bits."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= min(most, 2**63) or value != value:
        bound = f"in [0, {most:g}]" if most < math.inf else "that is not negative"
        raise ValueError(f"{where} must be a finite number {bound}, got {_short(value)}")


def _check_finite(value: Any, where: str) -> None:
    """Refuse NaN and infinity anywhere, also in what is only for people to read."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    if isinstance(value, Mapping):
        for name, part in value.items():
            _check_finite(part, f"{where}[{name!r}]")
    if isinstance(value, list):
        for number, part in enumerate(value):
            _check_finite(part, f"{where}[{number}]")


def _check_shares(shares: Any, where: str) -> None:
    """Refuse a table of accuracies that holds anything but numbers in [0, 1]."""
    if not isinstance(shares, Mapping):
        raise ValueError(f"{where} must be an object, got {_short(shares)}")
    for name, value in shares.items():
        _check_number(value, f"{where}[{name!r}]", 1)


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**63 else "a huge number"
    return text if len(text) <= 60 else f"{text[:60]}..."


def _check_bounds(row: Mapping[str, Any], where: str) -> None:
    bounds, accuracy = row["ci95"], row["accuracy"]
    _check_number(accuracy, f"{where}: 'accuracy'", 1)
    if not isinstance(bounds, list) or len(bounds) != 2:
        raise ValueError(f"{where}: 'ci95' must be a list of two numbers, got {_short(bounds)}")
    for bound in bounds:
        _check_number(bound, f"{where}: 'ci95'", 1)
    if not bounds[0] <= accuracy <= bounds[1]:
        raise ValueError(
            f"{where}: expected 0 <= ci95[0] <= accuracy <= ci95[1] <= 1, got {bounds} "
            f"around {accuracy}"
        )


def _check_method(row: Any, where: str, visual_tokens: int) -> None:
    _check_fields(row, METHOD_FIELDS, where)
    if row["knowledge"] not in KNOWLEDGE:
        raise ValueError(f"{where}: knowledge must be one of {KNOWLEDGE}, got {row['knowledge']!r}")
    _check_bounds(row, where)
    _check_shares(row.get("by_type", {}), f"{where}: 'by_type'")
    for name in ("std_tokens", "seconds"):
        _check_number(row.get(name, 0), f"{where}: {name!r}")
    if not 1 <= row["budget"] <= visual_tokens or row["mean_tokens"] > visual_tokens:
        raise ValueError(
            f"{where}: budget and mean_tokens must lie within the {visual_tokens} visual tokens, "
            f"got {row['budget']} and {row['mean_tokens']}"
        )


def check_training(training: Mapping[str, Any], where: str = "results: 'training'") -> None:
    """Refuse an incomplete record of a training; an empty one says that nothing was trained.

    Raises:
        ValueError: A field is missing or of the wrong type.
    """
    if training or not isinstance(training, Mapping):
        _check_fields(training, TRAINING_FIELDS, where)


def check_results(results: Mapping[str, Any], budgets: Sequence[int] | None = None) -> None:
    """Refuse a results file that does not hold what readers rely on.

    ``training`` is empty where nothing was trained (heuristics alone, or a policy that came
    without a record of its training); otherwise it must be complete.

    Args:
        results: Content of ``results.json``.
        budgets: Budgets that every method must have been measured at; by default those of the
            file.

    Raises:
        ValueError: Something is missing or of the wrong type; the sentence says what.
    """
    for name, wanted in {
        "task": str,
        "visual_tokens": int,
        "full": dict,
        "methods": list,
        "training": dict,
        "versions": dict,
    }.items():
        if not isinstance(results.get(name), wanted) or isinstance(results[name], bool):
            raise ValueError(f"results: {name!r} must be a {wanted.__name__}")
    _check_fields(
        results["full"],
        {"accuracy": (int, float), "questions": int, "by_type": dict},
        "results: 'full'",
    )
    _check_number(results["full"]["accuracy"], "results: 'full': 'accuracy'", 1)
    if "ci95" in results["full"]:
        _check_bounds(results["full"], "results: 'full'")
    _check_shares(results["full"]["by_type"], "results: 'full': 'by_type'")
    _check_number(results["visual_tokens"], "results: 'visual_tokens'")
    if results["visual_tokens"] < 1 or results["full"]["questions"] < 1:
        raise ValueError("results: 'visual_tokens' and 'questions' must be at least 1")
    check_training(results["training"])
    _check_finite(results, "results")
    measured: dict[str, set[int]] = {}
    for number, row in enumerate(results["methods"]):
        _check_method(row, f"results: methods[{number}]", results["visual_tokens"])
        seen = measured.setdefault(row["name"], set())
        if row["budget"] in seen:
            raise ValueError(f"results: {row['name']!r} at {row['budget']} tokens is there twice")
        seen.add(row["budget"])
    if not measured:
        raise ValueError("results: 'methods' is empty, expected at least one method")
    wanted_budgets = set().union(*measured.values()) if budgets is None else set(budgets)
    for name, seen in measured.items():
        missing = sorted(wanted_budgets - seen, reverse=True)
        if missing:
            raise ValueError(f"results: method {name!r} was not measured at {missing} tokens")
