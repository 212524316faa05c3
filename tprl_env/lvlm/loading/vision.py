"""From pictures to visual tokens: processor, vision tower, projector.

Shapes: n visual tokens of one image, D token width, Dv tower width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tprl_env.lvlm.execution.attention import IMPLEMENTATION, ClsProbe, probing
from tprl_env.lvlm.loading.crop import seen_box
from tprl_env.lvlm.loading.signals import TowerSignals
from tprl_env.lvlm.loading.supported import CLS_TOWERS
from tprl_env.lvlm.protocol import Visual

_IMAGES_PER_PASS = 16
DEFAULT_CLS_LAYER = -2
"""The tower layer that makes LLaVA-1.5's features, used by FasterVLM and VisPruner."""


class VisionEncoder:
    """The part of a LLaVA in front of the language model.

    Attributes:
        backend: "pil" or "torchvision", which differ by a grey level here and there.
        width: Dv; the widths of all selected tower layers together.
        cls_attention_layer: Tower layer whose CLS attention is reported: the field of that name
            in the checkpoint's config.json, else :data:`DEFAULT_CLS_LAYER`.
        placed: False: one run of tokens at consecutive positions.
    """

    placed = False

    def __init__(self, model: Any, image_processor: Any) -> None:
        """Use the tower and projector of a ``LlavaForConditionalGeneration``.

        Raises:
            ValueError: ``cls_attention_layer`` is not a layer of the tower.
        """
        config = model.config
        self._tower = model.model.vision_tower
        self._tower.set_attn_implementation(IMPLEMENTATION)
        self._projector = model.model.multi_modal_projector
        self._image_processor = image_processor
        self.backend = str(getattr(image_processor, "backend", "pil"))
        layers = config.vision_feature_layer
        self._feature_layers = [layers] if isinstance(layers, int) else list(layers)
        self._drop_cls = config.vision_feature_select_strategy == "default"
        self._patch = int(config.vision_config.patch_size)
        self.width = int(config.vision_config.hidden_size) * len(self._feature_layers)
        self.cls_attention_layer = int(getattr(config, "cls_attention_layer", DEFAULT_CLS_LAYER))
        self._probed: Any = None
        if config.vision_config.model_type in CLS_TOWERS:
            # transformers 5.23 gives the tower's encoder directly, earlier releases nest it
            inner = getattr(self._tower, "vision_model", self._tower)
            stack = inner.encoder.layers
            if not -len(stack) <= self.cls_attention_layer < len(stack):
                raise ValueError(
                    f"config.json asks for the CLS attention of tower layer "
                    f"{self.cls_attention_layer}, but the tower has {len(stack)} layers"
                )
            self._probed = stack[self.cls_attention_layer].self_attn

    def encode(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Visual]:
        """Encode (H, W, 3) uint8 RGB pictures, a few at a time."""
        found: list[Visual] = []
        weight = next(self._projector.parameters())
        for start in range(0, len(images), _IMAGES_PER_PASS):
            some = images[start : start + _IMAGES_PER_PASS]
            pictures = [Image.fromarray(image) for image in some]
            pixels = self._image_processor(images=pictures, return_tensors="pt")["pixel_values"]
            visuals = self._encode(pixels.to(weight.device, weight.dtype))
            output = (int(pixels.shape[-2]), int(pixels.shape[-1]))
            for image, visual in zip(some, visuals, strict=True):
                covered = (visual.grid[0] * self._patch, visual.grid[1] * self._patch)
                shape = (image.shape[0], image.shape[1])
                box = seen_box(self._image_processor, shape, output, covered)
                found.append(replace(visual, box=box))
        return found

    def signals(self, image: npt.NDArray[np.uint8]) -> TowerSignals:
        """The tower and the projector on one (H, W, 3) uint8 RGB picture, on request."""
        pixels = self._image_processor(images=[Image.fromarray(image)], return_tensors="pt")
        weight = next(self._projector.parameters())
        return TowerSignals(
            self._tower,
            self._projector,
            pixels["pixel_values"].to(weight.device, weight.dtype),
            self._feature_layers,
            self._probed is not None,
            self.cls_attention_layer,
        )

    def tower_pass(self, image: npt.NDArray[np.uint8]) -> Callable[[], object]:
        """What runs tower and projector on a picture that is prepared already."""
        pixels = self._image_processor(images=[Image.fromarray(image)], return_tensors="pt")
        weight = next(self._projector.parameters())
        placed = pixels["pixel_values"].to(weight.device, weight.dtype)
        return lambda: self._encode(placed)

    def project(self, features: Tensor) -> Tensor:
        """(m, D) tokens for (m, Dv) features of the tower."""
        weight = next(self._projector.parameters())
        projected: Tensor = self._projector(features.to(weight.device, weight.dtype)[None])[0]
        return projected

    def _encode(self, pixels: Tensor) -> list[Visual]:
        probe = ClsProbe(self._probed)
        with probing(probe):
            states = self._tower(pixels, output_hidden_states=True).hidden_states
        chosen = [states[layer] for layer in self._feature_layers]
        if self._drop_cls:
            chosen = [state[:, 1:] for state in chosen]
        tower = torch.cat(chosen, -1)
        tokens = self._projector(tower)
        grid = (pixels.shape[-2] // self._patch, pixels.shape[-1] // self._patch)
        rows = probe.rows
        return [
            Visual(tokens[i], tower[i], rows[i] if rows is not None else None, grid)
            for i in range(len(pixels))
        ]
