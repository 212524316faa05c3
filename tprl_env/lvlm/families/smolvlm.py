"""SmolVLM and Idefics3: tiles, each a run behind a text that names it, the whole last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tprl_env.data.features.placement import tile_row
from tprl_env.lvlm.families.family import Placed
from tprl_env.lvlm.protocol import Placement, raster

_AROUND, _WHOLE = "<fake_token_around_image>", "<global-img>"


def place(model: Any, prepared: Mapping[str, Any], placeholder: str) -> Placed:
    """A square of tokens per tile; the text is what the library's processor writes."""
    tower = model.config.vision_config
    side = tower.image_size // tower.patch_size // model.config.scale_factor
    rows, columns = int(prepared["rows"][0][0]), int(prepared["cols"][0][0])
    tiles = rows * columns + 1
    text = ""
    for row in range(rows):
        for column in range(columns):
            text += f"{_AROUND}<row_{row + 1}_col_{column + 1}>{placeholder}"
        text += "\n"
    text += ("\n" if rows else "") + f"{_AROUND}{_WHOLE}{placeholder}{_AROUND}"
    coords = np.concatenate([raster(side, side, tile) for tile in range(tiles)])
    table = np.concatenate([tile_row(rows, columns, side), tile_row(1, 1, side)])
    return Placement.in_line(coords, [side * side] * tiles, table), text
