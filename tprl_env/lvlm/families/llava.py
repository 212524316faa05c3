"""LLaVA-1.5 and every checkpoint saved as ``LlavaForConditionalGeneration``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from tprl_env.lvlm.families.base import FrozenLVLM
from tprl_env.lvlm.loading.checkpoint import check_folder, is_local, read_config
from tprl_env.lvlm.loading.devices import DeviceMap, first_device, load_onto
from tprl_env.lvlm.loading.processor import check_pictures, load_processor
from tprl_env.lvlm.loading.supported import (
    check_kinds,
    check_parts,
    check_vocabulary,
    pick_dtype,
    read_model_config,
)
from tprl_env.lvlm.loading.vision import VisionEncoder
from tprl_env.lvlm.loading.weights import check_size


class LlavaLVLM(FrozenLVLM):
    """A frozen LLaVA: encodes images, and scores or answers from the tokens that are kept.

    Attributes:
        cls_attention_layer: Tower layer whose CLS attention ``encode_images`` reports. It is
            ``config.cls_attention_layer`` where the checkpoint's config.json has that field, else
            -2, the layer that makes LLaVA-1.5's features (FasterVLM, VisPruner).
    """

    def __init__(self, model: Any, processor: Any, name: str, fingerprint: str | Path) -> None:
        """Freeze ``model``; most callers want :meth:`from_pretrained`.

        Args:
            model: A ``LlavaForConditionalGeneration``.
            processor: Its ``LlavaProcessor``.
            name: For messages and manifests.
            fingerprint: The fingerprint, or the folder to compute it from when first asked.

        Raises:
            ValueError: The tokenizer or the template cannot be used; see :class:`Prompter`.
        """
        vision = VisionEncoder(model, processor.image_processor)
        text = model.model.language_model
        super().__init__(model, text, processor, vision, name, fingerprint)
        self.cls_attention_layer = vision.cls_attention_layer

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        device_map: DeviceMap | None = None,
    ) -> LlavaLVLM:
        """Load a checkpoint from a local folder or the hub; safetensors only, no remote code.

        Args:
            checkpoint: Folder, or hub id ``owner/name``.
            device: Default: the GPU if there is one, else the CPU.
            dtype: Default: bfloat16 on a GPU, float32 on the CPU. A name like ``"bfloat16"`` will
                do; on CPUs with bfloat16 instructions it scores up to twice as fast.
            revision: Branch, tag or commit of a hub repository.
            device_map: Several GPUs instead of ``device``, as for ``load_lvlm``.

        Raises:
            FileNotFoundError: No such folder or repository.
            ImportError: A device map without accelerate.
            ValueError: Not a LLaVA, parts that cannot be run, pickle weights, weights that are
                missing, left over or of another shape, or no such dtype.
        """
        checkpoint = str(checkpoint)
        plain = read_config(checkpoint, revision)
        kind = plain.get("model_type")
        if kind != "llava":
            raise ValueError(
                f"{checkpoint!r} has model_type {kind!r}, but LlavaLVLM loads 'llava'; "
                f"use load_lvlm(), which picks the class"
            )
        place = first_device(device, device_map)
        local = check_folder(checkpoint) if is_local(checkpoint) else None
        source = str(local or checkpoint)
        options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        check_kinds(plain, checkpoint)
        config = read_model_config(LlavaConfig, source, checkpoint, **options)
        check_parts(config, checkpoint)
        processor = load_processor(LlavaProcessor, source, checkpoint, **options)
        check_vocabulary(config, processor.tokenizer, checkpoint)
        check_pictures(processor.image_processor, checkpoint, ("pixel_values",), axes=4, rows=1)
        if local:
            check_size(LlavaForConditionalGeneration, config, local, checkpoint)
        model = load_onto(
            LlavaForConditionalGeneration,
            source,
            place,
            device_map,
            checkpoint=checkpoint,
            dtype=pick_dtype(dtype, place),
            **options,
        )
        commit = getattr(model.config, "_commit_hash", None)
        name = local.resolve().name if local else checkpoint
        return cls(model, processor, name, local or f"{checkpoint}@{commit or revision}")
