"""Video-LLaVA's pictures: one square grid of the image tower; frames are pictures here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tprl_env.lvlm.families.family import Placed
from tprl_env.lvlm.protocol import Placement, raster


def place(model: Any, prepared: Mapping[str, Any], placeholder: str) -> Placed:
    """Rows and columns of patches of the processed picture."""
    patch = model.config.vision_config.patch_size
    height, width = prepared["pixel_values_images"].shape[-2:]
    return Placement.in_line(raster(height // patch, width // patch)), placeholder
