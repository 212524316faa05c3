"""How well a built-in LVLM answers: all tokens, the question's oracle, simple pruners.

Makes the tables of docs/tiny_lvlm.md and the accuracies in a checkpoint's ``training.json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tprl_env.checks import check_choice
from tprl_env.data.scenes import QUESTION_TYPES, load_scenes
from tprl_env.evaluation.measure import MethodResult, evaluate
from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.encoding.encode import encode_dataset
from tprl_env.reducers import ClsAttentionPruner, DivPrune, OraclePruner, Pruner, RandomPruner
from tprl_env.scoring import local_scorer

__all__ = ["measure_tiny_lvlm"]

BUDGETS = (72, 48, 29, 14, 7, 4)
PRUNERS: dict[str, Pruner] = {
    "oracle": OraclePruner(),
    "oracle_spread": OraclePruner(ties="spread"),
    "divprune": DivPrune(),
    "cls": ClsAttentionPruner(),
    "random": RandomPruner(),
}


def measure_tiny_lvlm(
    folder: str | Path,
    task: str,
    scenes: int = 500,
    *,
    split: str = "test",
    budgets: Sequence[int] = BUDGETS,
    pruners: Sequence[str] = tuple(PRUNERS),
) -> dict[str, Any]:
    """Measure a checkpoint on scenes of one split, six questions each.

    Args:
        folder: Checkpoint folder.
        task: Task of the scenes.
        scenes: Number of scenes.
        split: Split of the scenes.
        budgets: Numbers of kept tokens.
        pruners: Names in `PRUNERS`.

    Returns:
        ``split``, ``questions``, ``full`` (accuracy over all questions and per question type) and
        the same per pruner and budget.

    Raises:
        ValueError: Unknown pruner, task or split.
    """
    for name in pruners:
        check_choice("pruners", name, PRUNERS)
    samples = load_scenes(task, split, scenes)
    lvlm = load_lvlm(folder, device="cpu", dtype="float32")
    with TemporaryDirectory() as scratch:
        store = encode_dataset(lvlm, samples, scratch, progress=False)
        chosen = {name: PRUNERS[name] for name in pruners}
        full, *rows = evaluate(store, local_scorer(lvlm, store), chosen, budgets)
    found: dict[str, Any] = {"split": split, "questions": len(samples), "full": _accuracies(full)}
    for row in rows:
        found.setdefault(row.name, {})[str(row.budget)] = _accuracies(row)
    return found


def _accuracies(row: MethodResult) -> dict[str, float]:
    types = [name for name in QUESTION_TYPES if name in row.by_type]
    return {
        "all": round(row.accuracy, 4),
        **{name: round(row.by_type[name], 4) for name in types},
    }
