"""LLaVA-NeXT and LLaVA-OneVision: the whole picture, then tiles whose rows end in a newline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from tprl_env.data.features.placement import tile_row
from tprl_env.lvlm.families.family import Placed
from tprl_env.lvlm.protocol import Placement, raster


def place(model: Any, prepared: Mapping[str, Any], placeholder: str) -> Placed:
    """Send coordinates through the model's own packing of tiles.

    Unpadding, newlines and the shrinking of very large pictures are then the model's own; a token
    that the shrinking made of several lies at their mean, rounded.
    """
    config = model.config
    tower, sizes = config.vision_config, prepared["image_sizes"]
    side = tower.image_size // tower.patch_size
    points = config.image_grid_pinpoints
    count = image_size_to_num_patches(sizes[0], points, tower.image_size)
    maps = torch.from_numpy(np.stack([raster(side, side, tile) for tile in range(count)])).float()
    more = (
        {"vision_feature_select_strategy": "default"}
        if config.model_type == "llava_next"
        else {"vision_aspect_ratio": config.vision_aspect_ratio}
    )
    newline = torch.full((3,), math.nan)
    packed = model.base_model.pack_image_features([maps], sizes, image_newline=newline, **more)
    coords = packed[0][0].nan_to_num(-1.0).round().long().numpy()
    table = _tiles(tuple(int(n) for n in sizes[0]), points, tower.image_size, side)
    return Placement.in_line(coords, tiles=table[:count]), placeholder


def _tiles(size: tuple[int, ...], points: Any, tile: int, side: int) -> npt.NDArray[np.float32]:
    """The whole picture, stretched to a square, then tiles of it with its shape kept, padded."""
    canvas = select_best_resolution(size, points)
    scale = min(canvas[0] / size[0], canvas[1] / size[1])
    gaps = [(1 - min(math.ceil(n * scale), c) / c) / 2 for n, c in zip(size, canvas, strict=True)]
    cut = tile_row(canvas[0] // tile, canvas[1] // tile, side, (gaps[0], gaps[1]))
    return np.concatenate([tile_row(1, 1, side), cut])
