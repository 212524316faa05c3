"""Tokenizer, processor and constructed initial weights of the tiny LLaVA: stock classes only.

Two ideas make it trainable in minutes on one core. The vision tower starts without attention
between patches (`Recipe.attend` empty) or with attention inside a cell (heads 0-3 each read one
quadrant of the own cell). The LLM starts from orthogonal word directions in which a cell name is
its row plus its column, and its first heads match rows, columns and colours between words and
image features in the slow rotary pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tprl_env.data.scenes import CELL_NAMES, COLOR_NAMES, COLUMNS, GRID, ROWS, SIZE, TOKENS

PATCH = 8
SIDE = SIZE // PATCH  # visual tokens of one side
WIDTH = 128
HEADS = 4
HEAD_WIDTH = WIDTH // HEADS
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, IMAGE = 0, 1, 2, 4
DIGITS = tuple("0123456789")
WORDS = tuple(
    "USER: ASSISTANT: what digit is ? color the there a at in of row column and larger read "
    "yes no .".split()
)
CHAT_TEMPLATE = (
    "{{ bos_token }} {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over blanks; pads on the left."""
    words = (*SPECIAL, *WORDS, *DIGITS, *COLOR_NAMES, *ROWS[1:], *COLUMNS, *CELL_NAMES)
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The LLaVA processor for 96x96 images and 144 image placeholders."""
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE},
        do_center_crop=False,
        do_resize=True,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def word_ids(tokenizer: PreTrainedTokenizerFast, words: Sequence[str]) -> Tensor:
    """Token ids of single words, ``(len(words),)``."""
    vocabulary = tokenizer.get_vocab()
    return torch.tensor([vocabulary[word] for word in words])


def to_pixels(images: npt.NDArray[np.uint8]) -> Tensor:
    """What the processor makes of 96x96 images: ``(B, 96, 96, 3)`` to ``(B, 3, 96, 96)``."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float()
    shape = (1, 3, 1, 1)
    return (pixels / 255 - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape)


def vision_parts(model: LlavaForConditionalGeneration) -> Any:
    """The module with ``embeddings``, ``encoder`` and ``post_layernorm``, wherever it sits."""
    tower = model.model.vision_tower
    return tower if hasattr(tower, "embeddings") else tower.vision_model


def tower_features(
    model: LlavaForConditionalGeneration, pixels: Tensor, attend: Sequence[int]
) -> Tensor:
    """``hidden_states[-2]`` of the tower, ``(B, 145, WIDTH)``, skipping dead attention branches.

    Args:
        model: The model; every layer outside ``attend`` has an all-zero ``out_proj``.
        pixels: ``(B, 3, 96, 96)``.
        attend: Layers whose attention is alive.
    """
    tower = vision_parts(model)
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for i, layer in enumerate(tower.encoder.layers[:-1]):
        if i in attend:
            hidden = hidden + layer.self_attn(layer.layer_norm1(hidden), attention_mask=None)[0]
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
    return hidden


def by_cell(tokens: Tensor) -> Tensor:
    """Group visual tokens by cell: ``(B, 144, D)`` to ``(B, 36, 4, D)``."""
    grid = tokens.reshape(len(tokens), GRID, 2, GRID, 2, -1)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(len(tokens), GRID * GRID, 4, -1)


def rotation(seed: int) -> Tensor:
    """A fixed orthogonal ``(WIDTH, WIDTH)`` matrix."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]


def word_basis() -> Tensor:
    """Orthogonal directions of words: 6 rows, 6 columns, 8 colours, 10 digits, then the rest."""
    return rotation(8)


def image_rotation() -> Tensor:
    """Maps word space to image space, so that words and image features start orthogonal."""
    return rotation(7)


def word_embeddings(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Constructed embeddings, ``(V, WIDTH)``: a cell name is its row plus its column."""
    basis, norm = word_basis(), 0.5 * WIDTH**0.5
    generator = torch.Generator().manual_seed(9)
    table = torch.randn(len(tokenizer), WIDTH - 30, generator=generator) @ basis[30:]
    table = norm * table / table.norm(dim=1, keepdim=True)
    cells = [(basis[i // GRID] + basis[6 + i % GRID]) * 0.5**0.5 for i in range(GRID * GRID)]
    named = {word: basis[i] for i, word in enumerate((*ROWS, *COLUMNS, *COLOR_NAMES, *DIGITS))}
    named.update(zip(CELL_NAMES, cells, strict=True))
    for word, direction in named.items():
        table[word_ids(tokenizer, [word])] = norm * direction
    return table


def build_config(vocabulary: int) -> LlavaConfig:
    """The architecture: 96x96 pixels, 144 visual tokens, CLIP and Llama of width 128."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return LlavaConfig(  # type: ignore[call-arg]
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=PAD,
        cls_attention_layer=-1,  # the CLS head is the tower's last layer (read by LlavaLVLM)
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, attend: Sequence[int] = (), seed: int = 0
) -> LlavaForConditionalGeneration:
    """The model with constructed initial weights, float32; the global random state is kept.

    Args:
        tokenizer: From `build_tokenizer`.
        attend: Tower layers that attend inside a cell; none for a tower of lone patches.
        seed: Seed of everything random in the initial weights.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(build_config(len(tokenizer)))
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                out = any(part in name for part in ("out_proj", "fc2", "o_proj", "down_proj"))
                nn.init.normal_(weight, std=(0.5 if out else 0.8) * weight.shape[1] ** -0.5)
        _construct_tower(model, attend)
        model.model.language_model.embed_tokens.weight.copy_(word_embeddings(tokenizer))
        for layer in model.model.language_model.layers[:3]:
            _match_words_with_image(layer.self_attn)
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            nn.init.orthogonal_(attention.v_proj.weight, 0.8)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
    return model


def _construct_tower(model: LlavaForConditionalGeneration, attend: Sequence[int]) -> None:
    """Factorised positions (row + column + quadrant), silent or cell-wise attention."""
    tower = vision_parts(model)
    patches, positions = tower.embeddings.patch_embedding, tower.embeddings.position_embedding
    nn.init.normal_(patches.weight, std=(3 * PATCH * PATCH) ** -0.5)
    basis = rotation(6)
    basis = torch.linalg.qr((basis - basis.mean(1, keepdim=True))[:16].T)[0].T  # zero-mean rows
    if attend:  # keep the picture out of the directions that the attention reads
        flat = patches.weight.flatten(1)
        patches.weight.copy_((flat - basis.T @ (basis @ flat)).view_as(patches.weight))
        rows, columns, quadrants = 6 * basis[:6], 6 * basis[6:12], 6 * basis[12:]
    else:
        rows, columns = torch.randn(6, WIDTH) * 0.4, torch.randn(6, WIDTH) * 0.4
        quadrants = torch.randn(4, WIDTH) * 0.6
    y, x = torch.arange(TOKENS) // SIDE, torch.arange(TOKENS) % SIDE
    positions.weight[1:] = rows[y // 2] + columns[x // 2] + quadrants[y % 2 * 2 + x % 2]
    positions.weight[0] = 0
    for i, layer in enumerate(tower.encoder.layers[:-1]):
        attention = layer.self_attn
        if i not in attend:
            attention.out_proj.weight.zero_()
            attention.out_proj.bias.zero_()
            continue
        for head in range(HEADS):
            at = head * HEAD_WIDTH
            attention.q_proj.weight[at : at + HEAD_WIDTH] *= 0.1
            attention.k_proj.weight[at : at + HEAD_WIDTH] *= 0.1
            attention.q_proj.weight[at : at + 12] = 2 * basis[:12]
            attention.k_proj.weight[at : at + 12] = 2 * basis[:12]
            attention.k_proj.weight[at + 12] = 2 * basis[12 + head]
            attention.q_proj.bias[at + 12] = 4


def _match_words_with_image(attention: Any, gain: float = 0.87) -> None:
    """Heads 0 and 1 ask the image for rows, columns and colours in the slow rotary pairs."""
    basis, turn = word_basis(), image_rotation()
    slow = [d for pair in range(15, 5, -1) for d in (pair, pair + HEAD_WIDTH // 2)]
    for head in (0, 1):
        at = head * HEAD_WIDTH
        attention.q_proj.weight[at : at + HEAD_WIDTH] *= 0.1
        attention.k_proj.weight[at : at + HEAD_WIDTH] *= 0.1
        for j, dim in enumerate(slow):
            attention.q_proj.weight[at + dim] = gain * basis[j]
            attention.k_proj.weight[at + dim] = gain * basis[j] @ turn.T
