"""``results.json``: the record of a comparison, written atomically and checked.

The file is meant to be read by scripts; :func:`check_results` is the definition of its layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
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
METHOD_FIELDS: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "knowledge": str,
    "budget": int,
    "mean_tokens": (int, float),
    "accuracy": (int, float),
    "ci95": list,
}


def _check_fields(
    row: Mapping[str, Any], fields: Mapping[str, type | tuple[type, ...]], where: str
) -> None:
    for name, wanted in fields.items():
        if name not in row:
            raise ValueError(f"{where} has no {name!r}; write the file with this version")
        if not isinstance(row[name], wanted) or isinstance(row[name], bool):
            raise ValueError(f"{where}: {name!r} must be {wanted}, got {row[name]!r}")


def _check_method(row: Mapping[str, Any], where: str) -> None:
    _check_fields(row, METHOD_FIELDS, where)
    if row["knowledge"] not in KNOWLEDGE:
        raise ValueError(f"{where}: knowledge must be one of {KNOWLEDGE}, got {row['knowledge']!r}")
    if len(row["ci95"]) != 2 or not 0 <= row["ci95"][0] <= row["accuracy"] <= row["ci95"][1] <= 1:
        raise ValueError(
            f"{where}: expected 0 <= ci95[0] <= accuracy <= ci95[1] <= 1, got {row['ci95']} "
            f"around {row['accuracy']}"
        )


def check_training(training: Mapping[str, Any], where: str = "results: 'training'") -> None:
    """Refuse an incomplete record of a training; an empty one says that nothing was trained.

    Raises:
        ValueError: A field is missing or of the wrong type.
    """
    if training:
        _check_fields(training, TRAINING_FIELDS, where)


def check_results(results: Mapping[str, Any], budgets: Sequence[int] = (48, 29, 14, 7, 4)) -> None:
    """Refuse a results file that does not hold what readers rely on.

    ``training`` is empty where nothing was trained (heuristics alone, or a policy that came
    without a record of its training); otherwise it must be complete.

    Args:
        results: Content of ``results.json``.
        budgets: Budgets that every method must have been measured at.

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
        if not isinstance(results.get(name), wanted):
            raise ValueError(f"results: {name!r} must be a {wanted.__name__}")
    _check_fields(
        results["full"],
        {"accuracy": (int, float), "questions": int, "by_type": dict},
        "results: 'full'",
    )
    check_training(results["training"])
    measured: dict[str, set[int]] = {}
    for number, row in enumerate(results["methods"]):
        _check_method(row, f"results: methods[{number}]")
        measured.setdefault(row["name"], set()).add(row["budget"])
    if not measured:
        raise ValueError("results: 'methods' is empty, expected at least one method")
    for name, seen in measured.items():
        missing = sorted(set(budgets) - seen, reverse=True)
        if missing:
            raise ValueError(f"results: method {name!r} was not measured at {missing} tokens")


def read_results(path: str | Path, budgets: Sequence[int] = (48, 29, 14, 7, 4)) -> dict[str, Any]:
    """Read and check a results file.

    Args:
        path: The file.
        budgets: Budgets that every method must have been measured at.

    Raises:
        ValueError: The file is missing, is not JSON, or lacks something.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"no results file at {path}; `tprl evaluate` or `tprl quickstart` write it"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was not written here") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    check_results(content, budgets)
    return content
