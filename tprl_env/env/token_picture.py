"""A picture with a mask over it: kept tokens in colour, pruned ones faded, unseen parts grey.

Only numpy and Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from tprl_env.data.features.source import Box
from tprl_env.env.token_layers import Layer, panels, token_map

__all__ = [
    "PAPER",
    "Box",
    "Picture",
    "check_picture",
    "cut_off",
    "frame",
    "layered_picture",
    "sheet",
    "token_picture",
]

Picture = npt.NDArray[np.uint8]

PAPER = (250, 250, 248)
_KEPT_EDGE = (255, 140, 0)
_GRID = np.array([128, 128, 128], np.float32)
_FADED = 240.0  # grey level that pruned tokens are blended towards
_FADE = 0.78  # how far
_UNSEEN = 150.0  # grey level that parts without tokens are blended towards
_UNSEEN_FADE = 0.7
_PADDING = 128  # grey level of what an image processor puts around a picture
_GRID_OPACITY = 0.22
_HATCH = 0.11  # darkening of the stripes that tell pruned tokens from pale kept ones
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def frame(shape: tuple[int, ...], box: Box | None) -> Box:
    """The smallest box around a picture of ``shape`` (H, W, ...) and its tokens."""
    height, width = shape[:2]
    top, left, bottom, right = box or (0, 0, height, width)
    return min(top, 0), min(left, 0), max(bottom, height), max(right, width)


def cut_off(shape: tuple[int, ...], box: Box | None) -> float:
    """Share of a picture of ``shape`` (H, W, ...) that lies outside of the box."""
    if box is None:
        return 0.0
    height, width = shape[:2]
    rows = max(min(box[2], height) - max(box[0], 0), 0)
    columns = max(min(box[3], width) - max(box[1], 0), 0)
    return float(1 - rows * columns / (height * width))


def token_picture(
    picture: Picture, mask: npt.NDArray[np.bool_], area: tuple[int, int], box: Box | None = None
) -> Picture:
    """The picture centred on (height, width), pruned tokens faded, kept regions outlined.

    Args:
        picture: uint8 (H, W, 3).
        mask: bool (rows, columns), True = kept.
        area: Height and width of the result.
        box: Part of the picture under the mask; all of it where None. The rest is greyed.
    """
    outer = frame(picture.shape, box)
    height, width = outer[2] - outer[0], outer[3] - outer[1]
    scale = min(area[0] / height, area[1] / width)
    shape = max(round(height * scale), 1), max(round(width * scale), 1)
    rows, columns = (_tokens_under(shape, axis, outer, box, mask.shape) for axis in (0, 1))
    seen = (rows >= 0)[:, None] & (columns >= 0)[None, :]
    kept = mask[rows[:, None], columns[None, :]] & seen
    lines = np.zeros(shape, bool)
    lines[1:] |= (np.diff(rows) > 0)[:, None]
    lines[:, 1:] |= (np.diff(columns) > 0)[None, :]
    return _painted(_resized(picture, shape, scale, outer), kept, seen, lines, area)


def sheet(pictures: Sequence[Picture]) -> tuple[Picture, npt.NDArray[np.float32] | None]:
    """Several pictures beside each other, all as high as the highest.

    Args:
        pictures: uint8 (H, W, 3) each.

    Returns:
        The sheet, and (P, 4) top, left, bottom, right of each picture as shares of it; a single
        picture as it is, and None.
    """
    if len(pictures) == 1:
        return pictures[0], None
    height = max(picture.shape[0] for picture in pictures)
    shapes = [(height, max(round(p.shape[1] * height / p.shape[0]), 1)) for p in pictures]
    gap = max(height // 20, 1)
    width = sum(shape[1] for shape in shapes) + gap * (len(pictures) - 1)
    found = np.full((height, width, 3), PAPER, np.uint8)
    places, left = [], 0
    for picture, shape in zip(pictures, shapes, strict=True):
        scaled = _resized(picture, shape, 1.0, frame(picture.shape, None))
        found[:, left : left + shape[1]] = np.rint(scaled).clip(0, 255).astype(np.uint8)
        places.append([0.0, left / width, 1.0, (left + shape[1]) / width])
        left += shape[1] + gap
    return found, np.array(places, np.float32)


def layered_picture(
    picture: Picture,
    alive: npt.NDArray[np.bool_],
    layers: Sequence[Layer],
    area: tuple[int, int],
) -> Picture:
    """As :func:`token_picture` for tokens in layers, one panel per layer in the same area.

    Args:
        picture: uint8 (H, W, 3).
        alive: bool (n,), True = kept.
        layers: Where the tokens are.
        area: Height and width of the result.
    """
    canvas = np.full((*area, 3), PAPER, np.uint8)
    places = panels(len(layers), area, picture.shape)
    for layer, (top, left, height, width) in zip(layers, places, strict=True):
        scale = min(height / picture.shape[0], width / picture.shape[1])
        shape = tuple(max(round(side * scale), 1) for side in picture.shape[:2])
        token = token_map(layer, (shape[0], shape[1]))
        seen = token >= 0
        lines = np.zeros(token.shape, bool)
        lines[1:] |= np.diff(token, axis=0) != 0
        lines[:, 1:] |= np.diff(token, axis=1) != 0
        outer = frame(picture.shape, None)
        pixels = _resized(picture, (shape[0], shape[1]), scale, outer)
        kept = np.append(alive, False)[token]
        panel = _painted(pixels, kept, seen, lines, (height, width))
        canvas[top : top + height, left : left + width] = panel
    return canvas


def _painted(
    pixels: npt.NDArray[np.float32],
    kept: npt.NDArray[np.bool_],
    seen: npt.NDArray[np.bool_],
    lines: npt.NDArray[np.bool_],
    area: tuple[int, int],
) -> Picture:
    """A picture of its final size with tokens that are kept, pruned, or not there."""
    shape = pixels.shape[:2]
    grey = pixels @ _LUMA
    faded = (1 - _FADE) * grey + _FADE * _FADED
    period, stroke = max(area[1] // 60, 4), max(area[1] // 240, 1)
    stripes = np.add.outer(np.arange(shape[0]), np.arange(shape[1])) % period < stroke
    faded *= 1 - _HATCH * stripes
    unseen = (1 - _UNSEEN_FADE) * grey + _UNSEEN_FADE * _UNSEEN
    shown = np.where(kept[..., None], pixels, np.where(seen, faded, unseen)[..., None])
    lines &= seen
    shown[lines] += _GRID_OPACITY * (_GRID - shown[lines])
    shown[_outline(kept, stroke)] = _KEPT_EDGE
    canvas = np.full((*area, 3), PAPER, np.uint8)
    top, left = (area[0] - shape[0]) // 2, (area[1] - shape[1]) // 2
    canvas[top : top + shape[0], left : left + shape[1]] = np.rint(shown).astype(np.uint8)
    return canvas


def _tokens_under(
    shape: tuple[int, int], axis: int, outer: Box, box: Box | None, grid: tuple[int, ...]
) -> npt.NDArray[np.int64]:
    """The token row (or column) under each pixel row (or column); -1 where there is none."""
    pixels, count = np.arange(shape[axis]), grid[axis]
    if box is None:
        return pixels * count // shape[axis]
    scale = shape[axis] / (outer[axis + 2] - outer[axis])
    start, stop = ((edge - outer[axis]) * scale for edge in (box[axis], box[axis + 2]))
    tokens = np.floor((pixels + 0.5 - start) / (stop - start) * count).astype(np.int64)
    return np.where((tokens >= 0) & (tokens < count), tokens, -1)


def _resized(
    picture: Picture, shape: tuple[int, int], scale: float, outer: Box
) -> npt.NDArray[np.float32]:
    """The picture at its place in the frame, grey where the frame is larger."""
    height, width = picture.shape[:2]
    size = (shape[1], shape[0])
    whole = outer == (0, 0, height, width)
    if not whole:
        size = max(round(width * scale), 1), max(round(height * scale), 1)
    # Tiny pictures are diagrams whose pixels mean something; others look better smoothed.
    method = Image.Resampling.NEAREST if max(height, width) <= 64 else Image.Resampling.BICUBIC
    large = Image.fromarray(picture).resize(size, method)
    if not whole:
        padded = Image.new("RGB", (shape[1], shape[0]), (_PADDING,) * 3)
        padded.paste(large, (round(-outer[1] * scale), round(-outer[0] * scale)))
        large = padded
    return np.asarray(large, np.float32)


def _outline(kept: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.bool_]:
    """Pixels inside kept regions within ``width`` of a pruned pixel."""
    inner = kept.copy()
    for _ in range(width):
        padded = np.pad(inner, 1, constant_values=True)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return kept & ~inner


def check_picture(picture: npt.ArrayLike) -> Picture:
    """The picture as an array.

    Raises:
        ValueError: It is not uint8 (H, W, 3), or empty.
    """
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise ValueError(f"picture must be uint8 (H, W, 3), got {array.dtype}{array.shape}")
    return array
