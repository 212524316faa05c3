"""Published ways to use fewer tokens: one file per method, one line each in ``PRUNERS``.

Reducers stand one step above ``data``: they read stores through the protocol
`tprl_env.data.features.source.TokenSource` and import nothing else from there; ``data`` never
imports ``reducers``.
"""

from __future__ import annotations

from typing import Any

from tprl_env.checks import check_fields, did_you_mean
from tprl_env.reducers.interfaces import PruneInputs, Pruner, RankingPruner, prune_inputs
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
    "OraclePruner",
    "PruneInputs",
    "Pruner",
    "QuestionAttentionPruner",
    "RandomPruner",
    "RankingPruner",
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


def make_pruner(name: str, /, **fields: Any) -> Pruner:
    """Build a pruner by name.

    Args:
        name: Key of ``PRUNERS``.
        **fields: Hyper-parameters of the method.

    Raises:
        ValueError: An unknown name or field (the message names the nearest), or a value of another
            type than the field's.
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
    check_fields(f"pruner {name!r}", cls, fields)
    pruner: Pruner = cls(**fields)
    return pruner
