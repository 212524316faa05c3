"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: one grid of any size, three rotary axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tprl_env.lvlm.families.family import Placed
from tprl_env.lvlm.protocol import Placement, raster


def place(model: Any, prepared: Mapping[str, Any], placeholder: str) -> Placed:
    """Rows and columns of the merged grid; text goes on behind the longer side."""
    merge = model.config.vision_config.spatial_merge_size
    frames, height, width = (int(n) for n in prepared["image_grid_thw"][0])
    rows, columns = height // merge, width // merge
    coords = np.concatenate([raster(rows, columns, frame) for frame in range(frames)])
    return Placement(coords, (len(coords),), coords.T.copy(), (max(rows, columns),)), placeholder
