"""InternVL: tiles in order with a thumbnail last, all in one run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

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
    return Placement.in_line(coords), f"{_BEFORE}{placeholder}{_BEHIND}"
