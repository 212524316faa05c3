"""Families that the library alone can run: one path for all of them.

Shapes: n visual tokens of one picture, D token width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from PIL import Image
from torch import Tensor

from tprl_env.data.features.placement import full_grid
from tprl_env.data.pictures import PictureError
from tprl_env.lvlm.families import anyres, internvl, qwen_vl, smolvlm, video_llava
from tprl_env.lvlm.families.base import FrozenLVLM
from tprl_env.lvlm.families.family import Family
from tprl_env.lvlm.loading.checkpoint import check_folder, is_local, read_config
from tprl_env.lvlm.loading.devices import DeviceMap, first_device, load_onto
from tprl_env.lvlm.loading.processor import check_pictures, load_parts
from tprl_env.lvlm.loading.supported import (
    check_text_model,
    check_vocabulary,
    pick_dtype,
    read_model_config,
)
from tprl_env.lvlm.loading.weights import check_size
from tprl_env.lvlm.protocol import Visual
from tprl_env.reducers.vision import VisionSignals

_ROWS_AND_COLUMNS = {"return_row_col_info": True}
_TILES = (("pixel_values", "image_sizes"), 5)
_PATCHES = (("pixel_values", "image_grid_thw"), 2)
# its image processor would take a picture of 1 or 3 pixels height for one with its channels first
_CHANNELS_LAST = (("pixel_values_images",), 4, {"input_data_format": "channels_last"})
_NAMED_TILES = (("pixel_values", "rows", "cols"), 5, _ROWS_AND_COLUMNS)

LIBRARY_FAMILIES: Mapping[str, Family] = {
    "llava_next": Family("LlavaNextForConditionalGeneration", anyres.place, *_TILES),
    "llava_onevision": Family("LlavaOnevisionForConditionalGeneration", anyres.place, *_TILES),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", qwen_vl.place, *_PATCHES),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", qwen_vl.place, *_PATCHES),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", qwen_vl.place, *_PATCHES),
    "internvl": Family(
        "InternVLForConditionalGeneration", internvl.place, ("pixel_values", "num_patches"), 4
    ),
    "smolvlm": Family("SmolVLMForConditionalGeneration", smolvlm.place, *_NAMED_TILES),
    "idefics3": Family("Idefics3ForConditionalGeneration", smolvlm.place, *_NAMED_TILES),
    "video_llava": Family("VideoLlavaForConditionalGeneration", video_llava.place, *_CHANNELS_LAST),
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
        device_map: DeviceMap | None = None,
    ) -> LibraryLVLM:
        """Load a checkpoint from a local folder or the hub; safetensors only, no remote code.

        Args:
            checkpoint: Folder, or hub id ``owner/name``.
            device: Default: the GPU if there is one, else the CPU.
            dtype: Default: bfloat16 on a GPU, float32 on the CPU.
            revision: Branch, tag or commit of a hub repository.
            device_map: Several GPUs instead of ``device``, as for ``load_lvlm``.

        Raises:
            FileNotFoundError: No such folder or repository.
            ImportError: A device map without accelerate.
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
        place = first_device(device, device_map)
        local = check_folder(checkpoint) if is_local(checkpoint) else None
        source = str(local or checkpoint)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        model_class = getattr(transformers, family.model)
        config = read_model_config(model_class.config_class, source, checkpoint, **options)
        check_text_model(config, checkpoint)
        parts = load_parts(source, checkpoint, **options)
        check_vocabulary(config, parts.tokenizer, checkpoint)
        check_fit(parts.image_processor, config, family, checkpoint)
        if local:
            check_size(model_class, config, local, checkpoint)
        model = load_onto(
            model_class,
            source,
            place,
            device_map,
            checkpoint=checkpoint,
            dtype=pick_dtype(dtype, place),
            **options,
        )
        commit = getattr(model.config, "_commit_hash", None)
        name = local.resolve().name if local else checkpoint
        return cls.of_parts(model, parts, name, local or f"{checkpoint}@{commit or revision}")

    @classmethod
    def of_parts(cls, model: Any, parts: Any, name: str, fingerprint: str | Path) -> LibraryLVLM:
        """Freeze a model of :data:`LIBRARY_FAMILIES` with its tokenizer and image processor.

        Args:
            model: The library's.
            parts: Its tokenizer, image processor and chat template.
            name: For messages and manifests.
            fingerprint: The fingerprint, or the folder to compute it from when first asked.
        """
        inner = model.base_model
        text = getattr(inner, "language_model", None) or inner.text_model
        levels = len(getattr(model.config.vision_config, "deepstack_visual_indexes", None) or ())
        vision = LibraryVision(model, parts, LIBRARY_FAMILIES[model.config.model_type])
        return cls(model, text, parts, vision, name, fingerprint, levels)


class LibraryVision:
    """Everything in front of the language model, by the library's ``get_image_features``.

    Attributes:
        backend: "pil" or "torchvision", which differ by a grey level here and there.
        width: 0: the library hands out projected tokens only.
        placed: Prompts need their pictures.
    """

    placed = True

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
        """Encode (H, W, 3) uint8 RGB pictures, one after the other: their sizes differ.

        Raises:
            PictureError: The image processor refuses one, such as a very long and thin one.
        """
        found = []
        for number, image in enumerate(images):
            picture = Image.fromarray(image)
            try:
                prepared = self._image_processor(
                    images=[picture], return_tensors="pt", **self._family.prepare
                )
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise PictureError(
                    f"picture {number} of {picture.width} x {picture.height} pixels cannot be "
                    f"prepared for {self._model.config.model_type} ({reason}); crop or pad it"
                ) from error
            found.append(self._encode(picture, prepared))
        return found

    def tower_pass(self, image: npt.NDArray[np.uint8]) -> Callable[[], object]:
        """What runs tower and projector on a picture that is prepared already."""
        prepared = self._image_processor(
            images=[Image.fromarray(image)], return_tensors="pt", **self._family.prepare
        )
        inputs = self._inputs(prepared)
        return lambda: self._model.base_model.get_image_features(**inputs, return_dict=True)

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

    def _inputs(self, prepared: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the image processor made, as the tower takes it."""
        weight = next(self._model.parameters())
        inputs = {name: prepared[name] for name in self._known if name in prepared}
        return {
            name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }

    def _encode(self, picture: Image.Image, prepared: Mapping[str, Any]) -> Visual:
        inputs = self._inputs(prepared)
        found = self._model.base_model.get_image_features(**inputs, return_dict=True)
        tokens = _flat(found.pooler_output)
        levels = [_flat(level) for level in getattr(found, "deepstack_features", None) or ()]
        limits = [getattr(self._image_processor, f"{end}_patches", 1) for end in ("min", "max")]
        seen = {**prepared, "picture": (picture.height, picture.width), "tile_limits": limits}
        placement, text = self._family.place(self._model, seen, self._placeholder)
        if len(placement.coords) != len(tokens):
            raise ValueError(
                f"{self._model.config.model_type} made {len(tokens)} tokens of a picture of "
                f"{picture.width} x {picture.height} pixels where its layout has "
                f"{len(placement.coords)}; the image processor does not fit the model, fetch both "
                f"of one checkpoint"
            )
        shown = placement.coords[placement.droppable]
        grid = full_grid(shown)
        nothing = tokens.new_zeros(len(tokens), 0)
        joined = torch.cat([tokens, *levels], 1)
        return Visual(joined, nothing, None, grid, placement=placement, placeholder=text)


def check_fit(image_processor: Any, config: Any, family: Family, checkpoint: str) -> None:
    """Refuse an image processor of another model before its weights are loaded.

    Args:
        image_processor: The checkpoint's.
        config: The library's configuration.
        family: Its row of the table.
        checkpoint: What the user called it.

    Raises:
        ValueError: It gives other arrays, tiles or patches than the model takes.
    """
    tower = config.vision_config
    size: Any = getattr(tower, "image_size", None)
    if "image_grid_thw" in family.needs:
        last = int(tower.in_channels * tower.temporal_patch_size * tower.patch_size**2)
    else:
        last = int(size[0] if isinstance(size, (list, tuple)) else size)
    check_pictures(
        image_processor, checkpoint, family.needs, family.axes, last, **dict(family.prepare)
    )
    for name, wanted in (
        ("merge_size", getattr(tower, "spatial_merge_size", None)),
        ("image_grid_pinpoints", getattr(config, "image_grid_pinpoints", None)),
    ):
        found = getattr(image_processor, name, None)
        if wanted is not None and found is not None and _plain(found) != _plain(wanted):
            raise ValueError(
                f"{checkpoint!r}: {name} of the image processor is {_plain(found)!r}, config.json "
                f"has {_plain(wanted)!r}; fetch both of one checkpoint"
            )


def _plain(value: Any) -> Any:
    """Lists for tuples, so that both compare."""
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _flat(parts: Any) -> Tensor:
    """(n, D) from one tensor (parts, n, D) or a list of (n, D)."""
    width = parts[0].shape[-1]
    return torch.cat([part.reshape(-1, width) for part in parts])
