"""Checkpoints with random weights of every supported family, in exactly its published format.

They stand in for real checkpoints where none can be had: a folder holds the configuration,
safetensors, tokenizer with chat template and image processor that the library would save. All
sizes can be overridden, so that a benchmark builds the true shapes with the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TILE, PATCH = 28, 7
"""Side of a square tile and of a patch in pixels: 4 x 4 patches per tile."""

TEXT: Mapping[str, Any] = {
    **{"vocab_size": 700, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048},
    **{"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2},
}
TOWER: Mapping[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "image_size": TILE, "patch_size": PATCH},
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]
_CORPUS = ["what color is the 7 ? yes no red green blue two three", "user assistant image video"]
_VICUNA = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>user\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_QWEN = (
    *("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|im_start|>", "<|im_end|>"),
)


@dataclass(frozen=True)
class Sizes:
    """Overrides of the tiny sizes.

    Attributes:
        text: Fields of the text configuration.
        tower: Fields of the vision configuration.
    """

    text: Mapping[str, Any] = field(default_factory=dict)
    tower: Mapping[str, Any] = field(default_factory=dict)

    def for_text(self, **more: Any) -> dict[str, Any]:
        """All fields of the text configuration."""
        return {**TEXT, **more, **self.text}

    def for_tower(self, **more: Any) -> dict[str, Any]:
        """All fields of a CLIP-like vision configuration."""
        return {**TOWER, **more, **self.tower}


Parts = tuple[Any, Any, Any]
"""Model, tokenizer, image processor."""


def make_tokenizer(
    template: str, extra: tuple[str, ...], size: int, **named: str
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer.

    Args:
        template: Chat template.
        extra: Special tokens of the family.
        size: Most words of the vocabulary.
        **named: Special tokens that the tokenizer knows by name, such as ``image_token``.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<pad>", *extra]
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, 700),
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(_CORPUS * 3, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"},
        extra_special_tokens=named or list(extra),
        padding_side="left",
    )
    made.chat_template = template
    return made


def _id(words: Any, token: str) -> int:
    found: int = words.convert_tokens_to_ids(token)
    return found


def _config(name: str, **fields: Any) -> Any:
    """A configuration of the library, whose older field names its own types still list."""
    return getattr(transformers, name)(**fields)


def _clip(sizes: Sizes) -> Any:
    return transformers.CLIPVisionConfig(**sizes.for_tower(projection_dim=16))


def _siglip(sizes: Sizes) -> Any:
    return transformers.SiglipVisionConfig(**sizes.for_tower(vision_use_head=False))


def _side(tower: Any) -> dict[str, int]:
    return {"height": tower.image_size, "width": tower.image_size}


def _clip_images(kind: Any, tower: Any, **more: Any) -> Any:
    return kind(size={"shortest_edge": tower.image_size}, crop_size=_side(tower), **more)


def _llava(sizes: Sizes, text: Any, tower: Any) -> Parts:
    words = make_tokenizer(_VICUNA, ("<image>",), text.vocab_size, image_token="<image>")
    clip = tower.model_type == "clip_vision_model"
    config = _config(
        "LlavaConfig",
        vision_config=tower,
        text_config=text,
        image_token_id=_id(words, "<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if clip else "full",
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
    )
    images = (
        _clip_images(transformers.CLIPImageProcessorPil, tower)
        if clip
        else transformers.SiglipImageProcessorPil(size=_side(tower))
    )
    return transformers.LlavaForConditionalGeneration(config), words, images


def llava(sizes: Sizes) -> Parts:
    """LLaVA-1.5: CLIP and Llama."""
    return _llava(sizes, transformers.LlamaConfig(**sizes.for_text()), _clip(sizes))


def llava_siglip_qwen2(sizes: Sizes) -> Parts:
    """LLaVA with SigLIP and Qwen2."""
    return _llava(sizes, transformers.Qwen2Config(**sizes.for_text()), _siglip(sizes))


def llava_mistral(sizes: Sizes) -> Parts:
    """LLaVA with CLIP and Mistral, full attention."""
    text = transformers.MistralConfig(**sizes.for_text(sliding_window=None))
    return _llava(sizes, text, _clip(sizes))


def llava_next(sizes: Sizes) -> Parts:
    """LLaVA-NeXT (1.6): CLIP, Mistral, tiles by aspect ratio."""
    words = make_tokenizer(_VICUNA, ("<image>",), TEXT["vocab_size"], image_token="<image>")
    tower = _clip(sizes)
    points = [[tower.image_size * n // TILE for n in pair] for pair in _PINPOINTS]
    config = _config(
        "LlavaNextConfig",
        vision_config=tower,
        text_config=transformers.MistralConfig(**sizes.for_text(sliding_window=None)),
        image_token_id=_id(words, "<image>"),
        vision_feature_layer=-2,
        image_grid_pinpoints=points,
    )
    images = _clip_images(
        transformers.LlavaNextImageProcessorPil, tower, image_grid_pinpoints=points
    )
    return transformers.LlavaNextForConditionalGeneration(config), words, images


def llava_onevision(sizes: Sizes) -> Parts:
    """LLaVA-OneVision: SigLIP, Qwen2, tiles by aspect ratio."""
    extra = ("<image>", "<video>")
    template = _CHATML.replace("IMAGE", "<image>\n")
    words = make_tokenizer(
        template,
        (*extra, "<|im_start|>", "<|im_end|>"),
        TEXT["vocab_size"],
        **{"image_token": extra[0], "video_token": extra[1]},
    )
    tower = _siglip(sizes)
    points = [[tower.image_size * n // TILE for n in pair] for pair in _PINPOINTS]
    config = _config(
        "LlavaOnevisionConfig",
        vision_config=tower,
        text_config=transformers.Qwen2Config(**sizes.for_text()),
        image_token_id=_id(words, extra[0]),
        video_token_id=_id(words, extra[1]),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=points,
    )
    images = transformers.LlavaOnevisionImageProcessorPil(
        size=_side(tower), image_grid_pinpoints=points
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config), words, images


def _qwen(config: Any, model: Any, sizes: Sizes, tower: dict[str, Any], **text: Any) -> Parts:
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    words = make_tokenizer(_CHATML.replace("IMAGE", image), _QWEN, TEXT["vocab_size"])
    ids = [_id(words, token) for token in _QWEN]
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    full = sizes.for_text(rope_parameters=_MROPE, **text)
    vision = {
        **{"patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2},
        **{"in_channels": 3, "num_heads": 4, **tower, **sizes.tower},
    }
    made = model(
        config(
            vision_config=vision,
            text_config=full,
            tie_word_embeddings=False,
            **dict(zip(names, ids, strict=False)),
        )
    )
    unit = vision["patch_size"] * 2
    images = transformers.Qwen2VLImageProcessorPil(
        **{"patch_size": vision["patch_size"], "merge_size": 2, "temporal_patch_size": 2},
        min_pixels=4 * unit * unit,
        max_pixels=24 * unit * unit,
    )
    return made, words, images


def qwen2_vl(sizes: Sizes) -> Parts:
    """Qwen2-VL: three rotary axes."""
    width = sizes.for_text()["hidden_size"]
    return _qwen(
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLForConditionalGeneration,
        sizes,
        {"depth": 3, "embed_dim": 32, "hidden_size": width, "mlp_ratio": 2},
    )


def qwen2_5_vl(sizes: Sizes) -> Parts:
    """Qwen2.5-VL: windows in the tower."""
    width = sizes.for_text()["hidden_size"]
    return _qwen(
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
        sizes,
        {
            **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": width},
            **{"window_size": 28, "fullatt_block_indexes": [1]},
        },
    )


def qwen3_vl(sizes: Sizes) -> Parts:
    """Qwen3-VL: normed queries and keys, DeepStack."""
    width = sizes.for_text()["hidden_size"]
    return _qwen(
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLForConditionalGeneration,
        sizes,
        {
            **{"depth": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": width},
            **{"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        },
        head_dim=16,
    )


def internvl(sizes: Sizes) -> Parts:
    """InternVL3: tiles, 2 x 2 patches per token, Qwen2."""
    extra = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|im_start|>", "<|im_end|>")
    words = make_tokenizer(
        _CHATML.replace("IMAGE", "<IMG_CONTEXT>\n"),
        extra,
        TEXT["vocab_size"],
        **{"context_image_token": extra[0], "start_image_token": extra[1]},
        **{"end_image_token": extra[2], "video_token": extra[3]},
    )
    fields = sizes.for_tower()
    fields["image_size"] = [fields["image_size"]] * 2
    fields["patch_size"] = [fields["patch_size"]] * 2
    tower = _config("InternVLVisionConfig", **fields)
    side = tower.image_size[0]
    config = _config(
        "InternVLConfig",
        vision_config=tower,
        text_config=transformers.Qwen2Config(**sizes.for_text()),
        image_seq_length=(side // tower.patch_size[0] // 2) ** 2,
        image_token_id=_id(words, extra[0]),
        downsample_ratio=0.5,
    )
    images = transformers.GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, crop_to_patches=True, min_patches=1, max_patches=4
    )
    return transformers.InternVLForConditionalGeneration(config), words, images


def smolvlm(sizes: Sizes) -> Parts:
    """SmolVLM2: tiles with text before each, Llama."""
    grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    extra = (
        *("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"),
        *("<video>", *grid),
    )
    template = (
        "{% for message in messages %}User:{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<end_of_utterance>\n{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    )
    words = make_tokenizer(template, extra, TEXT["vocab_size"])
    tower = sizes.for_tower()
    config = _config(
        "SmolVLMConfig",
        vision_config=tower,
        text_config=transformers.LlamaConfig(**sizes.for_text()).to_dict(),
        scale_factor=2,
        image_token_id=_id(words, "<image>"),
        pad_token_id=3,
    )
    side = tower["image_size"]
    images = transformers.SmolVLMImageProcessorPil(
        size={"longest_edge": 2 * side},
        max_image_size={"longest_edge": side},
        do_image_splitting=True,
    )
    return transformers.SmolVLMForConditionalGeneration(config), words, images


def video_llava(sizes: Sizes) -> Parts:
    """Video-LLaVA: a CLIP tower for pictures, another for videos, and Llama."""
    named = {"image_token": "<image>", "video_token": "<video>"}
    words = make_tokenizer(_VICUNA, ("<image>", "<video>"), TEXT["vocab_size"], **named)
    tower = _clip(sizes)
    tokens = (tower.image_size // tower.patch_size) ** 2
    config = _config(
        "VideoLlavaConfig",
        vision_config=tower,
        text_config=transformers.LlamaConfig(**sizes.for_text()),
        image_token_id=_id(words, "<image>"),
        video_token_id=_id(words, "<video>"),
        image_seq_length=tokens,
        video_seq_length=8 * (tokens + 1),
    )
    images = _clip_images(transformers.VideoLlavaImageProcessor, tower)
    return transformers.VideoLlavaForConditionalGeneration(config), words, images


RANDOM_FAMILIES: Mapping[str, Callable[[Sizes], Parts]] = {
    "llava": llava,
    "llava_siglip_qwen2": llava_siglip_qwen2,
    "llava_mistral": llava_mistral,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "video_llava": video_llava,
}


def build_random(name: str, sizes: Sizes = Sizes(), seed: int = 0) -> Parts:
    """Model, tokenizer and image processor of a family with random weights.

    Args:
        name: A name of :data:`RANDOM_FAMILIES`.
        sizes: Overrides of the tiny sizes.
        seed: Of the weights.

    Raises:
        KeyError: There is no such family.
    """
    torch.manual_seed(seed)
    model, words, images = RANDOM_FAMILIES[name](sizes)
    return model.eval(), words, images


def save_random(name: str, folder: str | Path, sizes: Sizes = Sizes(), seed: int = 0) -> Path:
    """Write such a checkpoint to a folder, as the library saves it."""
    folder = Path(folder)
    for part in build_random(name, sizes, seed):
        part.save_pretrained(folder)
    return folder
