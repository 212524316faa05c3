"""InternVL: tiles in order with a thumbnail last, all in one run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from tprl_env.data.features.placement import tile_row
from tprl_env.lvlm.families.family import Placed
from tprl_env.lvlm.protocol import Placement, raster

_BEFORE, _BEHIND = "<img>", "</img>"


def place(model: Any, prepared: Mapping[str, Any], placeholder: str) -> Placed:
    """A square of tokens per tile, each token of 2 x 2 patches."""
    tower = model.config.vision_config
    patches = (tower.image_size[0] // tower.patch_size[0]) ** 2
    side = math.isqrt(int(patches * model.config.downsample_ratio**2))
    tiles = int(prepared["num_patches"][0])
    coords = np.concatenate([raster(side, side, tile) for tile in range(tiles)])
    height, width = prepared["picture"]
    # as the image processor chose it: columns and rows nearest to the picture's shape
    options = prepared["tile_limits"]
    columns, rows = get_optimal_tiled_canvas((height, width), tuple(tower.image_size), *options)
    cut = tile_row(rows, columns, side) if tiles > 1 else tile_row(1, 1, side)
    table = np.concatenate([cut, tile_row(1, 1, side)])[:tiles]
    return Placement.in_line(coords, tiles=table), f"{_BEFORE}{placeholder}{_BEHIND}"
