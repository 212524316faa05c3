"""Families that the library alone can run: one path for all of them.

Shapes: n visual tokens of one picture, D token width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from torch import Tensor

from tprl_env.lvlm.families import anyres, internvl, qwen_vl, smolvlm
from tprl_env.lvlm.families.base import FrozenLVLM
from tprl_env.lvlm.families.family import Family
from tprl_env.lvlm.loading.checkpoint import check_folder, is_local, read_config
from tprl_env.lvlm.loading.processor import load_parts
from tprl_env.lvlm.loading.supported import (
    check_text_model,
    check_vocabulary,
    pick_device,
    pick_dtype,
    read_model_config,
)
from tprl_env.lvlm.loading.weights import check_size, load_model
from tprl_env.lvlm.protocol import Visual
from tprl_env.reducers.vision import VisionSignals

_ROWS_AND_COLUMNS = {"return_row_col_info": True}

LIBRARY_FAMILIES: Mapping[str, Family] = {
    "llava_next": Family("LlavaNextForConditionalGeneration", anyres.place),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", anyres.place),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", qwen_vl.place),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", qwen_vl.place),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", qwen_vl.place),
    "internvl": Family("InternVLForConditionalGeneration", internvl.place),
    "smolvlm": Family("SmolVLMForConditionalGeneration", smolvlm.place, _ROWS_AND_COLUMNS),
    "idefics3": Family("Idefics3ForConditionalGeneration", smolvlm.place, _ROWS_AND_COLUMNS),
}
"""Family by the ``model_type`` of config.json."""


class LibraryLVLM(FrozenLVLM):
    """A frozen LVLM of any of :data:`LIBRARY_FAMILIES`."""

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
    ) -> LibraryLVLM:
        """Load a checkpoint from a local folder or the hub; safetensors only, no remote code.

        Args:
            checkpoint: Folder, or hub id ``owner/name``.
            device: Default: the GPU if there is one, else the CPU.
            dtype: Default: bfloat16 on a GPU, float32 on the CPU.
            revision: Branch, tag or commit of a hub repository.

        Raises:
            FileNotFoundError: No such folder or repository.
            ValueError: Another family, parts that cannot be run, pickle weights, weights that are
                missing, left over or of another shape, or no such dtype.
        """
        checkpoint = str(checkpoint)
        kind = str(read_config(checkpoint, revision).get("model_type"))
        if kind not in LIBRARY_FAMILIES:
            raise ValueError(
                f"{checkpoint!r} has model_type {kind!r}, but LibraryLVLM loads "
                f"{', '.join(LIBRARY_FAMILIES)}; use load_lvlm(), which picks the class"
            )
        family = LIBRARY_FAMILIES[kind]
        device = pick_device(device)
        local = check_folder(checkpoint) if is_local(checkpoint) else None
        source = str(local or checkpoint)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        model_class = getattr(transformers, family.model)
        config = read_model_config(model_class.config_class, source, checkpoint, **options)
        check_text_model(config, checkpoint)
        parts = load_parts(source, checkpoint, **options)
        check_vocabulary(config, parts.tokenizer, checkpoint)
        if local:
            check_size(model_class, config, local, checkpoint)
        model = load_model(
            model_class,
            source,
            checkpoint=checkpoint,
            dtype=pick_dtype(dtype, device),
            **options,
        )
        model.to(device)
        commit = getattr(model.config, "_commit_hash", None)
        name = local.resolve().name if local else checkpoint
        inner = model.base_model
        text = getattr(inner, "language_model", None) or inner.text_model
        levels = len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())
        vision = LibraryVision(model, parts, family)
        fingerprint = local or f"{checkpoint}@{commit or revision}"
        return cls(model, text, parts, vision, name, fingerprint, levels)


class LibraryVision:
    """Everything in front of the language model, by the library's ``get_image_features``.

    Attributes:
        backend: "pil" or "torchvision", which differ by a grey level here and there.
        width: 0: the library hands out projected tokens only.
    """

    def __init__(self, model: Any, parts: Any, family: Family) -> None:
        """Use a model, its image processor and its family's row of the table."""
        self._model, self._family = model, family
        self._image_processor = parts.image_processor
        self._placeholder = parts.tokenizer.convert_ids_to_tokens(int(model.config.image_token_id))
        self.backend = str(getattr(parts.image_processor, "backend", "pil"))
        self.width = 0
        known = inspect.signature(model.base_model.get_image_features).parameters
        self._known = [name for name in known if name != "kwargs"]

    def encode(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Visual]:
        """Encode (H, W, 3) uint8 RGB pictures, one after the other: their sizes differ."""
        return [self._encode(Image.fromarray(image)) for image in images]

    def project(self, features: Tensor) -> Tensor:
        """Refused: there is no projector that takes single features.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self._why("project the features of single tokens"))

    def signals(self, image: npt.NDArray[np.uint8]) -> VisionSignals:
        """Refused: the towers differ.

        Raises:
            ValueError: Always.
        """
        raise ValueError(self._why("look into its vision tower"))

    def _why(self, what: str) -> str:
        kind = self._model.config.model_type
        return (
            f"methods that {what} need a checkpoint of model_type 'llava'; this one is {kind!r}. "
            f"Take a method on tokens or inside the language model, such as divprune or fastv"
        )

    def _encode(self, picture: Image.Image) -> Visual:
        prepared = self._image_processor(
            images=[picture], return_tensors="pt", **self._family.prepare
        )
        weight = next(self._model.parameters())
        inputs = {name: prepared[name] for name in self._known if name in prepared}
        inputs = {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        found = self._model.base_model.get_image_features(**inputs, return_dict=True)
        tokens = _flat(found.pooler_output)
        levels = [_flat(level) for level in getattr(found, "deepstack_features", None) or ()]
        placement, text = self._family.place(self._model, prepared, self._placeholder)
        if len(placement.coords) != len(tokens):
            raise ValueError(
                f"{self._model.config.model_type} made {len(tokens)} tokens of a picture of "
                f"{picture.width} x {picture.height} pixels where its layout has "
                f"{len(placement.coords)}; the image processor does not fit the model, fetch both "
                f"of one checkpoint"
            )
        shown = placement.coords[placement.droppable]
        grid = (1, len(tokens)) if len(shown) == 0 else _grid(placement.coords)
        nothing = tokens.new_zeros(len(tokens), 0)
        joined = torch.cat([tokens, *levels], 1)
        return Visual(joined, nothing, None, grid, placement=placement, placeholder=text)


def _grid(coords: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Rows and columns where the tokens are one full grid, else one row of all."""
    rows, columns = int(coords[:, 1].max()) + 1, int(coords[:, 2].max()) + 1
    return (rows, columns) if rows * columns == len(coords) else (1, len(coords))


def _flat(parts: Any) -> Tensor:
    """(n, D) from one tensor (parts, n, D) or a list of (n, D)."""
    width = parts[0].shape[-1]
    return torch.cat([part.reshape(-1, width) for part in parts])
