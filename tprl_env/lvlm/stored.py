"""Prompts, visual tokens and masks of samples as an LVLM takes them.

A store shows its droppable tokens only. Those that show no place of the picture, such as the
newlines behind rows of tiles, are put back here, and kept in every mask.

Shapes: n droppable tokens, m tokens that are always kept.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.data.features.store import FeatureStore
from tprl_env.lvlm.protocol import Placement, Prompt
from tprl_env.reducers.interfaces import Merged


def stored_prompt(store: FeatureStore, sample: int) -> Prompt:
    """The prompt of a sample, without its text."""
    ids = tuple(store.prompt_ids(sample).tolist())
    start, stop = store.question_span(sample)
    placement = store.placement(store.image_number(sample))
    return Prompt(ids, store.visual_at(sample), (start, stop), placement=placement)


def with_fixed(
    store: FeatureStore, sample: int, values: npt.NDArray[Any], fixed: Any
) -> npt.NDArray[Any]:
    """(n + m,) values of all tokens from (n,) of the droppable ones and one for the others."""
    placement = store.placement(store.image_number(sample))
    if placement is None:
        return values
    shown = placement.droppable
    whole = np.full(len(shown), fixed, values.dtype)
    whole[shown] = values
    return whole


def without_fixed(store: FeatureStore, sample: int, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(n,) values of the droppable tokens from (n + m,) of all."""
    placement = store.placement(store.image_number(sample))
    return values if placement is None else values[placement.droppable]


def beside_fixed(
    merged: Merged, whole: Tensor, placement: Placement | None
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Merged tokens among those that are always kept, in the order of their places.

    Args:
        merged: Made from the n droppable tokens; its places count those only.
        whole: (n + m, D) all tokens of the picture.
        placement: Where they stand; ``None`` if all are droppable.

    Returns:
        The tokens, and the place of each among all n + m.
    """
    places: npt.NDArray[np.int64] = merged.places.cpu().numpy()
    if placement is None or placement.droppable.all():
        return merged.tokens, places
    fixed = np.flatnonzero(~placement.droppable)
    every = np.concatenate([np.flatnonzero(placement.droppable)[places], fixed])
    order = every.argsort(kind="stable")
    beside = whole[torch.from_numpy(fixed).to(whole.device)].to(merged.tokens)
    return torch.cat([merged.tokens, beside])[torch.from_numpy(order)], every[order]
