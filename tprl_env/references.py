"""Untrained pruners on the test split of an experiment, measured once and shared by its arms."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.data.features.store import FeatureStore
from tprl_env.evaluate import evaluate
from tprl_env.files import write_json
from tprl_env.lvlm import load_lvlm
from tprl_env.reducers import PRUNERS, make_pruner, prune_inputs
from tprl_env.scoring import local_scorer

__all__ = ["measure_references"]


def measure_references(
    lvlm: str, store: str | Path, budgets: Sequence[int], path: Path
) -> dict[str, Any]:
    """Accuracy of every untrained pruner that a store has the inputs for.

    Args:
        lvlm: What `tprl_env.lvlm.load_lvlm` opens.
        store: Test store.
        budgets: Token counts.
        path: JSON file with the result; read instead where it is there already.

    Returns:
        ``{"full_accuracy", "questions", "pruners": {name: {"kind", "budgets": [row, ...]}}}``
    """
    if path.is_file():
        return dict(json.loads(path.read_text("utf-8")))
    test = FeatureStore.open(store)
    scorer = local_scorer(load_lvlm(lvlm), test)
    example = prune_inputs(test, 0)
    pruners = {name: make_pruner(name) for name in PRUNERS}
    usable = {
        name: pruner
        for name, pruner in pruners.items()
        if all(getattr(example, need) is not None for need in pruner.needs)
    }
    found: dict[str, Any] = {}
    for row in evaluate(test, scorer, usable, budgets)[1:]:
        entry = found.setdefault(row.name, {"kind": row.kind, "budgets": []})
        entry["budgets"].append(row.as_dict())
    content = {
        "full_accuracy": float(np.asarray(test.full_scores("exact")).mean()),
        "questions": len(test),
        "pruners": found,
    }
    write_json(path, content)
    return content
