"""Published ways to use fewer tokens: one file per method, one line each in ``REDUCERS``.

Reducers stand one step above ``data``: they read stores through the protocol
`tprl_env.data.features.source.TokenSource` and import nothing else from there; ``data`` never
imports ``reducers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tprl_env.checks import check_fields, did_you_mean
from tprl_env.reducers.interfaces import (
    Merged,
    Merger,
    PruneInputs,
    Pruner,
    RankingPruner,
    Reducer,
    prune_inputs,
)
from tprl_env.reducers.layer import LAYER_PRUNERS
from tprl_env.reducers.merge.flowcut import FlowCut
from tprl_env.reducers.merge.pooled import Pooled
from tprl_env.reducers.merge.prumerge import PruMerge, PruMergePlus
from tprl_env.reducers.merge.tome import ToMe
from tprl_env.reducers.merge.trim import Trim
from tprl_env.reducers.merge.visionzip import VisionZip
from tprl_env.reducers.prune.cdpruner import CDPruner
from tprl_env.reducers.prune.cls_attention import ClsAttentionPruner
from tprl_env.reducers.prune.divprune import DivPrune
from tprl_env.reducers.prune.hiprune import HiPrune
from tprl_env.reducers.prune.holov import HoloV
from tprl_env.reducers.prune.oracle import OraclePruner
from tprl_env.reducers.prune.question_attention import QuestionAttentionPruner
from tprl_env.reducers.prune.question_rows import QuestionRowsPruner
from tprl_env.reducers.prune.random import RandomPruner
from tprl_env.reducers.prune.scope import Scope
from tprl_env.reducers.prune.uniform import UniformPruner
from tprl_env.reducers.prune.vispruner import VisPruner

__all__ = [
    "PRUNERS",
    "REDUCERS",
    "CDPruner",
    "ClsAttentionPruner",
    "DivPrune",
    "FlowCut",
    "HiPrune",
    "HoloV",
    "Merged",
    "Merger",
    "OraclePruner",
    "Pooled",
    "PruMerge",
    "PruMergePlus",
    "PruneInputs",
    "Pruner",
    "QuestionAttentionPruner",
    "QuestionRowsPruner",
    "RandomPruner",
    "RankingPruner",
    "Reducer",
    "Scope",
    "ToMe",
    "Trim",
    "UniformPruner",
    "VisPruner",
    "VisionZip",
    "make_pruner",
    "make_reducer",
    "prune_inputs",
]

REDUCERS: dict[str, type[Reducer]] = {
    "random": RandomPruner,
    "uniform": UniformPruner,
    "cls_attention": ClsAttentionPruner,
    "vispruner": VisPruner,
    "divprune": DivPrune,
    "question_attention": QuestionAttentionPruner,
    "question_rows": QuestionRowsPruner,
    "oracle": OraclePruner,
    "cdpruner": CDPruner,
    "holov": HoloV,
    "hiprune": HiPrune,
    "scope": Scope,
    "pooled": Pooled,
    "prumerge": PruMerge,
    "prumerge_plus": PruMergePlus,
    "visionzip": VisionZip,
    "trim": Trim,
    "tome": ToMe,
    "flowcut": FlowCut,
}

PRUNERS: dict[str, type[Pruner]] = {
    name: cls for name, cls in REDUCERS.items() if issubclass(cls, Pruner)
}

# Methods that papers know by another name: one word per thing here.
_PAPER_NAMES = {"fastervlm": "cls_attention", "prumerge+": "prumerge_plus"}


def make_reducer(name: str, /, **fields: Any) -> Reducer:
    """Build a reducer of any kind by name.

    Args:
        name: Key of ``REDUCERS`` or of ``LAYER_PRUNERS``. What is in both (``question_rows``) is
            the one inside the LLM; `make_pruner` gives the other.
        **fields: Hyper-parameters of the method.

    Raises:
        ValueError: An unknown name or field (the message names the nearest), or a value of another
            type than the field's.
    """
    reducer: Reducer = _make("reducer", {**REDUCERS, **LAYER_PRUNERS}, name, fields)
    return reducer


def make_pruner(name: str, /, **fields: Any) -> Pruner:
    """Build a pruner by name.

    Args:
        name: Key of ``PRUNERS``, the part of ``REDUCERS`` that keeps tokens as they are.
        **fields: Hyper-parameters of the method.

    Raises:
        ValueError: An unknown name or field; the message names the nearest.
    """
    if name in REDUCERS and name not in PRUNERS:
        raise ValueError(f"{name!r} is no pruner: it makes new tokens; use make_reducer")
    pruner: Pruner = _make("pruner", PRUNERS, name, fields)
    return pruner


def _make(kind: str, table: Mapping[str, type[Reducer]], name: str, fields: dict[str, Any]) -> Any:
    """An entry of a table of reducers, built."""
    if name == "policy":
        raise ValueError(
            "the pruner 'policy' needs weights; use "
            "tprl_env.policy.PolicyPruner.from_pretrained(folder), or give its folder as --policy"
        )
    if name not in table:
        known_as = _PAPER_NAMES.get(str(name).lower())
        near = f"; it is called {known_as!r} here" if known_as else did_you_mean(name, table)
        raise ValueError(f"unknown {kind} {name!r}, the {kind}s are {', '.join(table)}{near}")
    cls: Any = table[name]
    check_fields(f"{kind} {name!r}", cls, fields)
    return cls(**fields)
