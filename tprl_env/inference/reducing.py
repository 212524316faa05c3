"""What reducers look at, from a picture's tokens and a question, and what they leave.

Shapes: n visual tokens of a prompt, D token width, Q question tokens, d_q query width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.data.features.placement import Placement, full_grid
from tprl_env.policy.autoencoder import TokenAutoencoder
from tprl_env.policy.pruner import PolicyPruner
from tprl_env.reducers.interfaces import Merger, PruneInputs, Pruner, Reducer
from tprl_env.reducers.layer_pruner import LayerPruner


def check_reducer(reducer: Reducer, autoencoder: TokenAutoencoder | None) -> None:
    """Refuse a reducer whose inputs cannot be made from a picture and a question.

    Raises:
        ValueError: It needs codes and there is no autoencoder, it needs a label, or it is of no
            known kind.
    """
    if not isinstance(reducer, (Pruner, Merger, LayerPruner)):
        raise ValueError(
            "reducer must be a pruner, a merger or a layer pruner, got "
            f"{type(reducer).__name__}; make_reducer(name) makes one"
        )
    if "codes" in reducer.required() and autoencoder is None:
        raise ValueError(
            f"pruner {reducer.name!r} looks at codes; pass the autoencoder of its store"
        )
    if "relevance" in reducer.required():
        raise ValueError(
            f"pruner {reducer.name!r} knows the built-in scenes' labels; it cannot prune "
            "a new picture, take another pruner"
        )


def wants_question(reducer: Reducer) -> bool:
    """Whether a reducer looks at the question's words."""
    needs = reducer.required()
    return isinstance(reducer, PolicyPruner) or bool({"query", "query_tokens"} & set(needs))


def wants_areas(reducer: Reducer) -> bool:
    """Whether a reducer looks at which part of its picture each token shows."""
    return isinstance(reducer, PolicyPruner) and reducer.policy.config.coordinates


def make_inputs(
    tokens: Tensor,
    placement: Placement,
    question: Tensor | None,
    autoencoder: TokenAutoencoder | None,
    tower: Tensor | None = None,
    cls_attention: Tensor | None = None,
) -> PruneInputs:
    """Inputs for a reducer, of the droppable tokens alone.

    Args:
        tokens: (n, D) of one picture or of all pictures of a prompt.
        placement: Where they lie.
        question: (Q, d_q) embeddings of the question's words, where the reducer looks at them.
        autoencoder: Makes the codes.
        tower: (n, Dv) features before the projector, where the reducer looks at them.
        cls_attention: (n,) likewise.

    Raises:
        ValueError: The autoencoder is for tokens of another width, or for features of the tower
            that are not there.
    """
    shown = torch.from_numpy(placement.droppable)
    seen = tokens.detach().float().cpu()[shown]
    looked = None if tower is None else tower.detach().float().cpu()[shown]
    grid = full_grid(placement.coords[placement.droppable])
    return PruneInputs(
        tokens=seen,
        tower=looked,
        cls_attention=None if cls_attention is None else cls_attention.float().cpu()[shown],
        grid=grid,
        coords=None
        if grid[0] != 1
        else torch.from_numpy(placement.coords[placement.droppable].copy()),
        areas=torch.from_numpy(placement.areas()),
        query=None if question is None else question.mean(0),
        query_tokens=question,
        codes=None if autoencoder is None else _codes(autoencoder, seen, looked),
    )


def _codes(autoencoder: TokenAutoencoder, tokens: Tensor, tower: Tensor | None) -> Tensor:
    """(n, d) codes of what the autoencoder was trained on."""
    config = autoencoder.config
    seen = tower if config.space == "tower" else tokens
    if seen is None or seen.shape[1] != config.input_width:
        raise ValueError(
            f"the autoencoder makes codes of {config.space} of width {config.input_width}, the "
            f"LVLM's have {'none' if seen is None else seen.shape[1]}; use the LVLM that the "
            f"policy was trained on"
        )
    with torch.no_grad():
        return autoencoder.encode(seen)


def reduce_all(
    reducer: Pruner | Merger, inputs: Sequence[PruneInputs], budgets: Sequence[int]
) -> list[tuple[npt.NDArray[np.int64], Tensor | None]]:
    """Places that are left of each inputs' tokens, and new tokens where the reducer merges.

    Inputs of the same budget go to the reducer together. A budget of 0 drops everything, one of
    all tokens keeps everything, without asking the reducer.

    Args:
        reducer: A pruner or a merger.
        inputs: One per picture or prompt.
        budgets: Tokens to leave of each, at most as many as there are.
    """
    found: dict[int, tuple[npt.NDArray[np.int64], Tensor | None]] = {}
    waiting: dict[int, list[int]] = {}
    for number, (one, budget) in enumerate(zip(inputs, budgets, strict=True)):
        if budget == 0 or (budget == one.num_tokens and reducer.exact):
            found[number] = (np.arange(budget), None)
        else:
            waiting.setdefault(budget, []).append(number)
    for budget, numbers in waiting.items():
        some = [inputs[number] for number in numbers]
        found |= dict(zip(numbers, _reduce(reducer, some, budget), strict=True))
    return [found[number] for number in range(len(inputs))]


def _reduce(
    reducer: Pruner | Merger, inputs: Sequence[PruneInputs], budget: int
) -> list[tuple[npt.NDArray[np.int64], Tensor | None]]:
    if isinstance(reducer, Merger):
        merged = reducer.merge_batch(inputs, budget)
        return [(one.places.cpu().numpy(), one.tokens) for one in merged]
    masks = [mask.cpu().numpy() for mask in reducer.prune_batch(inputs, budget)]
    return [(np.flatnonzero(mask), None) for mask in masks]


def joined(parts: Sequence[Placement]) -> Placement:
    """One placement of several pictures."""
    return parts[0] if len(parts) == 1 else Placement.joined(parts)
