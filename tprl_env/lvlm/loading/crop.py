"""Which part of a picture an image processor lets the vision tower see."""

from __future__ import annotations

import functools
import logging
from typing import Any

from tprl_env.data.features.source import Box

logger = logging.getLogger(__name__)

_TOLERANCE = 0.005  # of a side; rounding to whole pixels is no crop


def seen_box(
    processor: Any, picture: tuple[int, int], output: tuple[int, int], covered: tuple[int, int]
) -> Box | None:
    """The part of a picture under the token grid.

    Follows what processors of CLIP, SigLIP and LLaVA do: pad to a square, resize, crop the centre.

    Args:
        processor: The checkpoint's image processor.
        picture: Height and width of the picture.
        output: Height and width of the processed picture.
        covered: Height and width of its upper left part that whole patches cover.

    Returns:
        (top, left, bottom, right) in pixels of the picture, beyond its edges where the processor
        padded; None for all of it, and where the processor is of an unknown kind.
    """
    pad_top = pad_left = 0
    height, width = picture
    if getattr(processor, "do_pad", False) and hasattr(processor, "pad_to_square"):
        side = max(picture)
        pad_top, pad_left = (side - height) // 2, (side - width) // 2
        height = width = side
    resized = _resized(processor, height, width)
    crop = getattr(processor, "crop_size", None)
    final = resized
    if getattr(processor, "do_center_crop", False) and crop is not None:
        final = (crop["height"], crop["width"])
    if resized is None or final != output:
        _say_unknown(type(processor).__name__)
        return None
    scale_y, scale_x = height / resized[0], width / resized[1]
    top, left = (resized[0] - output[0]) // 2, (resized[1] - output[1]) // 2
    box = (
        top * scale_y - pad_top,
        left * scale_x - pad_left,
        (top + covered[0]) * scale_y - pad_top,
        (left + covered[1]) * scale_x - pad_left,
    )
    whole = (0, 0, *picture)
    near = (abs(a - b) <= _TOLERANCE * s for a, b, s in zip(box, whole, picture * 2, strict=True))
    return None if all(near) else box


def _resized(processor: Any, height: int, width: int) -> tuple[int, int] | None:
    if not getattr(processor, "do_resize", False):
        return height, width
    size = {name: value for name, value in dict(processor.size).items() if value}
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) != {"shortest_edge"}:
        return None
    short = size["shortest_edge"]
    if height <= width:
        return short, int(short * width / height)
    return int(short * height / width), short


@functools.cache
def _say_unknown(kind: str) -> None:
    logger.warning(
        "the image processor %s resizes or crops in a way that is not known here; drawn masks are "
        "laid over whole pictures",
        kind,
    )
