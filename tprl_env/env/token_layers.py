"""Tokens that are not one grid, such as tiles and an overview: where to draw them.

Only numpy. A layer covers the picture once; tiles together are one, an overview another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.source import TokenSource

__all__ = ["Layer", "layers_of", "layers_text", "panels", "token_map"]

_WHOLE = 1e-3  # how far from the picture's edges a tile of all of it may end


@dataclass(frozen=True)
class Layer:
    """Tokens that show every place of the picture at most once.

    Attributes:
        name: "tiles" or "whole picture".
        index: int64 (k,), their places among the sample's tokens.
        areas: float32 (k, 4), top, left, bottom, right, shares of the picture.
    """

    name: str
    index: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float32]


def layers_of(
    source: TokenSource, sample: int, places: npt.NDArray[np.float32] | None = None
) -> list[Layer] | None:
    """The layers of a sample's tokens, tiles first; None where they are one grid.

    Args:
        source: Knows where tokens are.
        sample: Its number.
        places: (P, 4) where each of several pictures lies on their sheet; the layers are about the
            sheet then, see `tprl_env.env.token_picture.sheet`.
    """
    rows, _ = source.grid(sample)
    find = getattr(source, "coords", None)  # a source of somebody's own may lack it
    if rows != 1 or find is None:
        return None
    tiles, found = find(sample)[:, 0], source.areas(sample)
    numbers, areas = found[:, 0].astype(np.int64), found[:, 1:]
    views = [_views(tiles, areas, numbers == number) for number in np.unique(numbers)]
    if places is not None:
        origin = places[numbers]
        areas = np.tile(origin[:, :2], 2) + areas * np.tile(origin[:, 2:] - origin[:, :2], 2)
    layers = []
    for panel in zip_longest(*views):  # views of one picture lie over each other, pictures do not
        parts = [view for view in panel if view is not None]
        index = np.concatenate([view for _, view in parts])
        name = "tiles" if any(cut for cut, _ in parts) else "whole picture"
        layers.append(Layer(name, index, areas[index]))
    return layers


def _views(
    tiles: npt.NDArray[np.int64], areas: npt.NDArray[np.float32], own: npt.NDArray[np.bool_]
) -> list[tuple[bool, npt.NDArray[np.int64]]]:
    """The tokens of one picture by view, and whether they cut it: its tiles, then overviews."""
    known = np.unique(tiles[own])
    whole = [tile for tile in known if _covers(areas[tiles == tile])]
    cut = np.flatnonzero(own & ~np.isin(tiles, whole))
    views = [(len(known) > 1, cut)] if len(cut) else []
    return [*views, *((False, np.flatnonzero(tiles == tile)) for tile in whole)]


def _covers(areas: npt.NDArray[np.float32]) -> bool:
    first, last = areas[:, :2].min(0), areas[:, 2:].max(0)
    return bool((first <= _WHOLE).all() and (last >= 1 - _WHOLE).all())


def token_map(layer: Layer, shape: tuple[int, int]) -> npt.NDArray[np.int64]:
    """int64 (height, width): the token under each pixel of the picture, -1 where there is none."""
    height, width = shape
    found = np.full(shape, -1, np.int64)
    edges = np.rint(layer.areas * np.array([height, width, height, width])).astype(np.int64)
    for token, (top, left, bottom, right) in zip(layer.index, edges.clip(min=0), strict=True):
        found[top:bottom, left:right] = token
    return found


def panels(
    count: int, area: tuple[int, int], shape: tuple[int, ...]
) -> list[tuple[int, int, int, int]]:
    """Top, left, height, width of ``count`` panels in an area, so that pictures are largest.

    Args:
        count: How many.
        area: Height and width of all.
        shape: (H, W, ...) of the picture.
    """
    height, width = area
    gap = max(min(area) // 40, 2) if count > 1 else 0
    across = (width - gap * (count - 1)) // count
    down = (height - gap * (count - 1)) // count
    beside = min(height / shape[0], across / shape[1])
    if beside >= min(down / shape[0], width / shape[1]):
        return [(0, i * (across + gap), height, across) for i in range(count)]
    return [(i * (down + gap), 0, down, width) for i in range(count)]


def layers_text(layers: Sequence[Layer], alive: npt.NDArray[np.bool_]) -> list[str]:
    """Lines of ``#`` for kept and ``.`` for pruned tokens, a block per layer."""
    lines: list[str] = []
    for layer in layers:
        row = np.unique(layer.areas[:, 0].round(5), return_inverse=True)[1]
        column = np.unique(layer.areas[:, 1].round(5), return_inverse=True)[1]
        cells = np.full((row.max() + 1, column.max() + 1), " ")
        cells[row, column] = np.where(alive[layer.index], "#", ".")
        lines += [f"{layer.name}:", *("".join(one) for one in cells)]
    return lines
