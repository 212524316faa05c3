"""Several pictures of one question: one visual, in the order in which the prompt shows them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tprl_env.data.features.placement import PICTURE_BREAK, Placement, full_grid, raster
from tprl_env.lvlm.protocol import Visual


def joined_visual(visuals: Sequence[Visual], pictures: Sequence[npt.NDArray[np.uint8]]) -> Visual:
    """The pictures of one question as one :class:`Visual`; a single one as it is.

    Args:
        visuals: One per picture.
        pictures: (H, W, 3) each, for the part that the tokens cover.
    """
    if len(visuals) == 1:
        return visuals[0]
    placement = Placement.joined(
        [_placement(visual, picture) for visual, picture in zip(visuals, pictures, strict=True)]
    )
    return Visual(
        torch.cat([visual.tokens for visual in visuals]),
        torch.cat([visual.tower for visual in visuals]),
        _attention(visuals),
        full_grid(placement.coords[placement.droppable]),
        placement=placement,
        placeholder=PICTURE_BREAK.join(visual.placeholder for visual in visuals),
    )


def _placement(visual: Visual, picture: npt.NDArray[np.uint8]) -> Placement:
    """A picture's placement; one grid that covers a part of the picture says which."""
    if visual.placement is not None:
        return visual.placement
    (rows, columns), tiles = visual.grid, None
    if visual.box is not None:
        height, width = picture.shape[:2]
        top, left, bottom, right = visual.box
        part = [0, top / height, left / width, bottom / height, right / width, rows, columns]
        tiles = np.array([part], np.float32)
    return Placement.in_line(raster(rows, columns), tiles=tiles)


def _attention(visuals: Sequence[Visual]) -> Any:
    rows = [visual.cls_attention for visual in visuals]
    known = [row for row in rows if row is not None]
    return torch.cat(known) if len(known) == len(rows) else None
