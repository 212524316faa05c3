"""Methods that drop visual tokens between decoder layers: one file each, one line in the table."""

from __future__ import annotations

import dataclasses
from typing import Any

from tprl_env.checks import did_you_mean
from tprl_env.reducers.layer.autoprune import AutoPrune
from tprl_env.reducers.layer.btp import BTP
from tprl_env.reducers.layer.fastv import FastV
from tprl_env.reducers.layer.pact import PACT
from tprl_env.reducers.layer.pyramiddrop import PyramidDrop
from tprl_env.reducers.layer.question_rows import QuestionRows
from tprl_env.reducers.layer.sparsevlm import SparseVLM
from tprl_env.reducers.layer_pruner import LayerPruner

__all__ = [
    "BTP",
    "LAYER_PRUNERS",
    "PACT",
    "AutoPrune",
    "FastV",
    "PyramidDrop",
    "QuestionRows",
    "SparseVLM",
    "make_layer_pruner",
]

LAYER_PRUNERS: dict[str, type[LayerPruner]] = {
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVLM,
    "btp": BTP,
    "autoprune": AutoPrune,
    "pact": PACT,
    "question_rows": QuestionRows,
}


def make_layer_pruner(name: str, **fields: Any) -> LayerPruner:
    """Build a method by name.

    Args:
        name: Key of ``LAYER_PRUNERS``.
        **fields: Its hyper-parameters.

    Raises:
        ValueError: An unknown name or field; the message names the nearest.
    """
    if name not in LAYER_PRUNERS:
        raise ValueError(
            f"unknown reducer inside the language model {name!r}, they are "
            f"{', '.join(LAYER_PRUNERS)}{did_you_mean(name, LAYER_PRUNERS)}"
        )
    cls: Any = LAYER_PRUNERS[name]
    known = [field.name for field in dataclasses.fields(cls)]
    for given in fields:
        if given not in known:
            raise ValueError(
                f"{name!r} has no field {given!r}, its fields are {', '.join(known)}"
                f"{did_you_mean(given, known)}"
            )
    reducer: LayerPruner = cls(**fields)
    return reducer
