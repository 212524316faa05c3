"""LVLMs of published shapes with random weights: time and memory need no trained ones.

Numbers are those of the published config.json files. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tprl_env.checks import check_choice
from tprl_env.lvlm.families.library import LIBRARY_FAMILIES, LibraryLVLM
from tprl_env.lvlm.families.llava import LlavaLVLM
from tprl_env.lvlm.loading.processor import Parts
from tprl_env.lvlm.loading.supported import pick_device, pick_dtype
from tprl_env.lvlm.tiny.families import Sizes, build_random

_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
         "num_attention_heads": 16, "image_size": 336, "patch_size": 14}  # fmt: skip
_QWEN_TOWER = {
    **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16},
    **{"window_size": 112, "patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31]},
}


def _words(
    layers: int, width: int, inner: int, heads: int, kv_heads: int, words: int, **more: Any
) -> dict[str, Any]:
    return {
        **{"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": inner},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": words},
        **{"max_position_embeddings": 32768, "initializer_range": 0.02, **more},
    }


def _mrope(*sections: int) -> dict[str, Any]:
    kind = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    return {"rope_parameters": kind}


@dataclass(frozen=True)
class Shape:
    """A published LVLM's sizes.

    Attributes:
        family: Name in ``lvlm.tiny.families.RANDOM_FAMILIES``.
        sizes: Of its language model and tower.
        picture: Height and width of the picture that it is measured on.
        checkpoint: Whose sizes these are.
    """

    family: str
    sizes: Sizes
    picture: tuple[int, int]
    checkpoint: str


SHAPES: Mapping[str, Shape] = {
    "tiny": Shape("llava", Sizes(), (28, 28), "none: 16 tokens, 4 layers of width 64"),
    "small": Shape(
        "llava",
        Sizes(
            _words(8, 768, 2048, 12, 12, 8192),
            {
                **_CLIP,
                "hidden_size": 384,
                "intermediate_size": 1536,
                "num_hidden_layers": 8,
                "num_attention_heads": 6,
            },
        ),
        (336, 336),
        "none: LLaVA-1.5's 576 tokens on a model that a CPU runs",
    ),
    "llava-1.5-7b": Shape(
        "llava",
        Sizes(_words(32, 4096, 11008, 32, 32, 32064), _CLIP),
        (336, 336),
        "llava-hf/llava-1.5-7b-hf",
    ),
    "llava-1.5-13b": Shape(
        "llava",
        Sizes(_words(40, 5120, 13824, 40, 40, 32064), _CLIP),
        (336, 336),
        "llava-hf/llava-1.5-13b-hf",
    ),
    "llava-next-7b": Shape(
        "llava_next",
        Sizes(_words(32, 4096, 14336, 32, 8, 32064), _CLIP),
        (672, 672),
        "llava-hf/llava-v1.6-mistral-7b-hf",
    ),
    "qwen2.5-vl-3b": Shape(
        "qwen2_5_vl",
        Sizes(
            _words(36, 2048, 11008, 16, 2, 151936, **_mrope(16, 24, 24)),
            {**_QWEN_TOWER, "out_hidden_size": 2048},
        ),
        (672, 672),
        "Qwen/Qwen2.5-VL-3B-Instruct",
    ),
    "qwen2.5-vl-7b": Shape(
        "qwen2_5_vl",
        Sizes(
            _words(28, 3584, 18944, 28, 4, 152064, **_mrope(16, 24, 24)),
            {**_QWEN_TOWER, "out_hidden_size": 3584},
        ),
        (672, 672),
        "Qwen/Qwen2.5-VL-7B-Instruct",
    ),
}


def random_lvlm(
    name: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
) -> Any:
    """An LVLM of a published shape, built on its device.

    Args:
        name: A name in :data:`SHAPES`.
        device: Default: the GPU if there is one.
        dtype: Default: bfloat16 on a GPU, float32 on the CPU.
        seed: Of the weights.

    Raises:
        ValueError: There is no such shape, device or number type.
    """
    check_choice("shape", name, SHAPES)
    shape = SHAPES[name]
    place = pick_device(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(pick_dtype(dtype, place))
    try:
        with torch.device(place):
            model, words, images = build_random(shape.family, shape.sizes, seed)
    finally:
        torch.set_default_dtype(before)
    if shape.family == "qwen2_5_vl":  # the tiny checkpoint's processor stops at 24 tokens
        images.size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 1280 * 28 * 28}
    parts = Parts(words, images, words.chat_template)
    fingerprint = f"random:{name}:{seed}"
    if shape.family in LIBRARY_FAMILIES:
        return LibraryLVLM.of_parts(model, parts, name, fingerprint)
    return LlavaLVLM(model, parts, name, fingerprint)
