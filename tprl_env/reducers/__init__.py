"""Published ways to use fewer tokens: one file per method, one line each in ``PRUNERS``.

Reducers stand one step above ``data``: they read stores through the protocol
`tprl_env.data.features.source.TokenSource` and import nothing else from there; ``data`` never
imports ``reducers``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tprl_env.checks import did_you_mean
from tprl_env.reducers.interfaces import (
    Merged,
    Merger,
    PruneInputs,
    Pruner,
    RankingPruner,
    Reducer,
    prune_inputs,
)
from tprl_env.reducers.prune.cls_attention import ClsAttentionPruner
from tprl_env.reducers.prune.divprune import DivPrune
from tprl_env.reducers.prune.oracle import OraclePruner
from tprl_env.reducers.prune.question_attention import QuestionAttentionPruner
from tprl_env.reducers.prune.random import RandomPruner
from tprl_env.reducers.prune.uniform import UniformPruner
from tprl_env.reducers.prune.vispruner import VisPruner

__all__ = [
    "PRUNERS",
    "ClsAttentionPruner",
    "DivPrune",
    "Merged",
    "Merger",
    "OraclePruner",
    "PruneInputs",
    "Pruner",
    "QuestionAttentionPruner",
    "RandomPruner",
    "RankingPruner",
    "Reducer",
    "UniformPruner",
    "VisPruner",
    "make_pruner",
    "prune_inputs",
]

PRUNERS: dict[str, type[Pruner]] = {
    "random": RandomPruner,
    "uniform": UniformPruner,
    "cls_attention": ClsAttentionPruner,
    "vispruner": VisPruner,
    "divprune": DivPrune,
    "question_attention": QuestionAttentionPruner,
    "oracle": OraclePruner,
}


def make_pruner(name: str, **fields: Any) -> Pruner:
    """Build a pruner by name.

    Args:
        name: Key of ``PRUNERS``.
        **fields: Hyper-parameters of the method.

    Raises:
        ValueError: An unknown name or field; the message names the nearest.
    """
    if name == "policy":
        raise ValueError(
            "the pruner 'policy' needs weights; use "
            "tprl_env.policy.PolicyPruner.from_pretrained(folder), or give its folder as --policy"
        )
    if name not in PRUNERS:
        raise ValueError(
            f"unknown pruner {name!r}, the pruners are {', '.join(PRUNERS)}"
            f"{did_you_mean(name, PRUNERS)}"
        )
    cls: Any = PRUNERS[name]
    all_fields = dataclasses.fields(cls)
    known = [field.name for field in all_fields]
    for given in fields:
        if given not in known:
            raise ValueError(
                f"pruner {name!r} has no field {given!r}, its fields are "
                f"{', '.join(known) or 'none'}{did_you_mean(given, known)}"
            )
    for field in all_fields:
        if field.default is dataclasses.MISSING and field.name not in fields:
            raise ValueError(f"pruner {name!r} needs {field.name}=...; pass it to make_pruner")
    pruner: Pruner = cls(**fields)
    return pruner
