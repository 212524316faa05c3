"""Supported language models and vision towers; default device, dtype and end tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from tprl_env.checks import quoted
from tprl_env.lvlm.execution.decoder import TEXT_MODELS

CLS_TOWERS = ("clip_vision_model",)
"""Vision towers whose first place is a CLS token."""

TOWERS = (*CLS_TOWERS, "siglip_vision_model")
"""Vision towers that give one token per patch, in raster order."""

WORKS = "LlavaLVLM runs CLIP and SigLIP towers with Llama, Mistral and Qwen2 language models"


def check_kinds(config: Mapping[str, Any], name: str) -> None:
    """Refuse other towers and language models by the plain content of config.json.

    The library fails on them with a traceback, or long after the first gigabyte.

    Raises:
        ValueError: A part is of another kind, or its description is not an object.
    """
    for field, default, known in (
        ("vision_config", CLS_TOWERS[0], TOWERS),
        ("text_config", TEXT_MODELS[0], TEXT_MODELS),
    ):
        part = config.get(field) or {}
        if not isinstance(part, Mapping):
            raise ValueError(
                f"{name!r}: {field} of config.json must be an object, got {quoted(part)}; "
                f"fetch it again"
            )
        kind = part.get("model_type", default)
        if kind not in known:
            role = "vision tower" if field == "vision_config" else "language model"
            raise ValueError(
                f"{name!r} has a {kind!r} {role} ({field}.model_type of config.json); {WORKS}, "
                f"take such a checkpoint"
            )


def read_model_config(config_class: Any, source: str, name: str, **options: Any) -> Any:
    """The library's reading of config.json.

    Raises:
        ValueError: A field cannot be read, in the library's words.
    """
    try:
        return config_class.from_pretrained(source, **options)
    except (KeyError, TypeError, AttributeError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name!r}: config.json does not describe a {_family(config_class)} ({reason}); "
            f"fetch it again"
        ) from error


def _family(config_class: Any) -> str:
    name = str(config_class.__name__).removesuffix("Config")
    return "LLaVA" if name == "Llava" else name


def check_text_model(config: Any, name: str) -> None:
    """Refuse language models whose computation this package does not reproduce.

    Raises:
        ValueError: Another decoder layer, or a sliding window, which would count dropped tokens.
    """
    text = config.get_text_config()
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    if text.model_type not in TEXT_MODELS or layers != {"full_attention"}:
        found = ", ".join(sorted(layers))
        raise ValueError(
            f"{name!r} has a {text.model_type!r} language model with layers of {found}; known are "
            f"{', '.join(TEXT_MODELS)} with full attention in every layer. Take such a checkpoint"
        )
    if getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise ValueError(
            f"{name!r} attends through a sliding window of {text.sliding_window} places, which "
            f"would count dropped tokens; where prompts stay shorter, set "
            f"text_config.sliding_window to null in config.json"
        )


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
            f"{name!r} has a {text.model_type!r} language model (sliding window {window}); {WORKS} "
            f"with full attention in every layer. Take such a checkpoint, or, where prompts stay "
            f"shorter than the window, set text_config.sliding_window to null in config.json"
        )
    if tower.model_type in CLS_TOWERS and config.vision_feature_select_strategy != "default":
        raise ValueError(
            f"{name!r} feeds the CLS token to the language model "
            f"(vision_feature_select_strategy {config.vision_feature_select_strategy!r}); "
            f"pruning needs 'default', one token per patch"
        )


def check_vocabulary(config: Any, tokenizer: Any, name: str) -> None:
    """Refuse ids that the embedding does not have.

    Raises:
        ValueError: The image placeholder or a word of the tokenizer lies beyond the vocabulary.
    """
    size, image = int(config.text_config.vocab_size), config.image_token_id
    if not isinstance(image, int):
        raise ValueError(
            f"{name!r}: image_token_id (image_token_index in config.json) must be a whole number, "
            f"got {quoted(image)}; set it to the id of the image placeholder"
        )
    if not 0 <= image < min(size, len(tokenizer)):
        raise ValueError(
            f"{name!r}: image_token_id {image} (image_token_index in config.json) is beyond the "
            f"vocabulary of {size} embeddings and {len(tokenizer)} words; set it to the id of the "
            f"image placeholder"
        )
    ids = tokenizer.get_vocab().values()
    if not all(isinstance(number, int) for number in ids):
        raise ValueError(f"{name!r}: the tokenizer has ids that are no numbers; fetch it again")
    largest = max(ids)
    if largest >= size:
        raise ValueError(
            f"{name!r}: the tokenizer has ids up to {largest}, but text_config.vocab_size of "
            f"config.json is {size}; save tokenizer and model of one checkpoint"
        )


def end_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """All end tokens, the tokenizer's own first; ids that the head cannot write are left out.

    Raises:
        ValueError: There is none, or what is listed is no id.
    """
    listed = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(listed if isinstance(listed, list) else [listed])]
    size = int(model.config.text_config.vocab_size)
    for one in found:
        if one is not None and not isinstance(one, int):
            raise ValueError(
                f"eos_token_id of generation_config.json must be an id or a list of ids, got "
                f"{quoted(listed)}; fetch it again"
            )
    ids = tuple(dict.fromkeys(int(i) for i in found if i is not None and 0 <= i < size))
    if not ids:
        raise ValueError("the checkpoint names no end token; set eos_token in its tokenizer")
    return ids


def pick_device(device: str | torch.device | None) -> torch.device:
    """The requested device, else the GPU if there is one.

    Raises:
        ValueError: torch knows no such device, or the machine has none.
    """
    try:
        wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device must be like 'cpu' or 'cuda:0', got {device!r}") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        built = "" if torch.backends.cuda.is_built() else ", and this torch is built for the CPU"
        raise ValueError(
            f"device {str(wanted)!r} is not there: this machine shows torch "
            f"{torch.cuda.device_count()} GPUs{built}; use 'cpu', or install torch for CUDA"
        )
    return wanted


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
