"""Which reducers a comparison measures: ``all``, or ``name,name(field=value)``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tprl_env.checks import check_choice
from tprl_env.reducers import REDUCERS, make_reducer
from tprl_env.reducers.interfaces import Merger, Positions, Pruner, Reducer
from tprl_env.reducers.layer import LAYER_PRUNERS
from tprl_env.reducers.layer_pruner import LayerPruner

WantedPositions = Literal["own", "original", "contiguous", "both"]
POSITIONS = ("own", "original", "contiguous", "both")

# Methods of which `all` measures more, or another one, than the defaults.
VARIANTS: dict[str, tuple[str, ...]] = {
    "cdpruner": ("cdpruner", "cdpruner(relevance=query)"),
    "trim": ("trim", "trim(relevance=query)"),
    "sparsevlm": (
        "sparsevlm(version=v1)",
        "sparsevlm(version=v1.5)",
        "sparsevlm(version=v2)",
    ),
    "question_rows": ("question_rows(layer=0)", "question_rows"),
}


@dataclass(frozen=True)
class Contender:
    """One row of the comparison at every budget.

    Attributes:
        label: Name in tables, unique.
        make: From the budget to the reducer.
        positions: Rotary positions of what is left.
        fields: Field values that were given.
    """

    label: str
    make: Callable[[int], Reducer]
    positions: Positions
    fields: dict[str, Any]


def all_names() -> tuple[str, ...]:
    """What ``all`` stands for: every entry of both tables."""
    names = {**REDUCERS, **LAYER_PRUNERS}
    return tuple(text for name in names for text in VARIANTS.get(name, (name,)))


def split_names(text: str) -> list[str]:
    """``"a,b(x=1,y=2)"`` to its parts; commas inside brackets do not separate.

    Raises:
        ValueError: A name is empty or a bracket is not closed.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    parts = [part.strip() for part in parts]
    if depth or not all(parts):
        raise ValueError(
            "expected all, or names separated by commas such as divprune,fastv(layer=2), got "
            f"{text!r}"
        )
    return parts


def parse_reducer(text: str) -> tuple[str, dict[str, Any]]:
    """``"fastv(layer=2)"`` to ``("fastv", {"layer": 2})``.

    Raises:
        ValueError: It is not written so.
    """
    name, bracket, rest = text.partition("(")
    if not bracket:
        return text, {}
    fields: dict[str, Any] = {}
    inside = rest.removesuffix(")")
    if inside == rest:
        raise ValueError(f"expected name(field=value), got {text!r}")
    for part in split_names(inside):
        key, equals, value = (one.strip() for one in part.partition("="))
        if not equals or not value:
            raise ValueError(f"expected name(field=value), got {text!r}")
        try:
            fields[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            fields[key] = value
    return name.strip(), fields


def contenders(names: Sequence[str], positions: WantedPositions = "own") -> list[Contender]:
    """Build what is to be measured.

    Args:
        names: As in ``--reducers``; ``("all",)`` takes every entry of the tables.
        positions: "own", what each method's code does with positions; "original" or "contiguous"
            for all of them; "both", their own, and kept ones too where their own are closed up.

    Raises:
        ValueError: An unknown name, field or choice of positions, or a name given twice.
    """
    check_choice("positions", positions, POSITIONS)
    chosen = all_names() if list(names) == ["all"] else tuple(names)
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"every reducer can be named once, got {', '.join(chosen)}")
    return [one for text in chosen for one in _contenders(text, positions)]


def _contenders(text: str, wanted: WantedPositions) -> Iterator[Contender]:
    name, fields = parse_reducer(text)
    reducer = make_reducer(name, **fields)
    own = reducer.positions if wanted == "own" or wanted == "both" else wanted
    yield Contender(text, lambda budget: reducer, own, fields)
    if wanted == "both" and own == "contiguous":
        yield Contender(f"{text}, positions kept", lambda budget: reducer, "original", fields)


def kind_of(reducer: Reducer) -> str:
    """``pruner``, ``merger`` or ``layer pruner``.

    Raises:
        ValueError: It is none of them.
    """
    kinds = {Pruner: "pruner", Merger: "merger", LayerPruner: "layer pruner"}
    for cls, kind in kinds.items():
        if isinstance(reducer, cls):
            return kind
    raise ValueError(
        f"a reducer must be a Pruner, a Merger or a LayerPruner, got {type(reducer).__name__}"
    )


def substitute_of(reducer: Reducer) -> str:
    """What stands in for something that the LVLM lacks; empty where nothing does."""
    if getattr(reducer, "relevance", None) == "query":
        return "the question's token embeddings instead of CLIP's text tower"
    return ""
