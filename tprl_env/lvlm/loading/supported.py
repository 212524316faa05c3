"""Supported language models and vision towers; default device, dtype and end tokens."""

from __future__ import annotations

from typing import Any

import torch

from tprl_env.lvlm.execution.decoder import TEXT_MODELS

CLS_TOWERS = ("clip_vision_model",)
"""Vision towers whose first place is a CLS token."""


def check_parts(config: Any, name: str) -> None:
    """Refuse language models and towers whose computation this package does not reproduce.

    Raises:
        ValueError: Another decoder layer, a sliding window (it would count dropped tokens), or a
            CLS token among the visual tokens.
    """
    text, tower = config.text_config, config.vision_config
    window = getattr(text, "sliding_window", None)
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    if text.model_type not in TEXT_MODELS or window or layers != {"full_attention"}:
        raise ValueError(
            f"{name!r} has a {text.model_type!r} language model (sliding window {window}); "
            f"LlavaLVLM runs {', '.join(TEXT_MODELS)} with full attention in every layer"
        )
    if tower.model_type in CLS_TOWERS and config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{name!r} feeds the CLS token to the language model "
            f"(vision_feature_select_strategy {config.vision_feature_select_strategy!r}); "
            f"pruning needs 'default', one token per patch"
        )


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """All end tokens, the tokenizer's own first.

    Raises:
        ValueError: There is none.
    """
    listed = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    ids = tuple(dict.fromkeys(int(i) for i in found if i is not None))
    if not ids:
        raise ValueError("the checkpoint names no end token; set eos_token in its tokenizer")
    return ids


def pick_device(device: str | torch.device | None) -> torch.device:
    """The requested device, else the GPU if there is one.

    Raises:
        ValueError: torch knows no such device.
    """
    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be like 'cpu' or 'cuda:0', got {device!r}") from error


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The requested dtype, else bfloat16 on a GPU and float32 on the CPU.

    Raises:
        ValueError: Not a floating-point type.
    """
    if dtype is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be like 'float32' or 'bfloat16', got {dtype!r}")
    return found
