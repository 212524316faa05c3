"""A slow reference for tokens that leave between layers: nothing leaves, masks hide it.

One sequence at full length; every layer gets a four-dimensional mask that hides the visual tokens
that are gone, the library's eager attention, and rotary positions that either keep the gaps or
count what is left. It shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}


def random_model(kind: str, implementation: str, layers: int = 5):
    """A tiny random causal language model; the same weights for every implementation."""
    config, model, extra = KINDS[kind]
    torch.manual_seed(0)
    built = model(
        config(
            vocab_size=40,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,
            **extra,
        )
    )
    with torch.no_grad():
        for name, weight in built.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.2)
    built.set_attn_implementation(implementation)
    return built.eval().requires_grad_(False)


class FullLength:
    """One sequence; ``image`` (S,) is the place in the image of each visual token, else -1."""

    def __init__(self, model, image: Tensor, contiguous: bool):
        self.text, self.model, self.contiguous = model.model, model, contiguous
        self.image = image

    def logits(self, embeds: Tensor, choose: Callable[[int, Tensor, dict], Tensor]) -> Tensor:
        """(S, V) logits. ``choose(layer, alive, weights)`` -> bool (S,), what enters the layer.

        ``weights["own"]`` is the (H, S, S) attention that the layer would pay without a cut,
        ``weights["previous"]`` the one that the layer below paid.
        """
        size = embeds.shape[0]
        hidden = embeds[None]
        alive = torch.ones(size, dtype=torch.bool)
        weights: dict = {"previous": None}
        for number, layer in enumerate(self.text.layers):
            weights["own"] = self._attend(layer, hidden, alive)[1][0]
            alive = choose(number, alive, weights)
            weights["previous"] = self._attend(layer, hidden, alive)[1][0]
            mask, rotary = self._given(hidden, alive)
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        return self.model.lm_head(self.text.norm(hidden))[0]

    def _attend(self, layer, hidden, alive):
        mask, rotary = self._given(hidden, alive)
        normed = layer.input_layernorm(hidden)
        return layer.self_attn(normed, attention_mask=mask, position_embeddings=rotary)

    def _given(self, hidden, alive):
        size = len(alive)
        visible = torch.ones(size, size, dtype=torch.bool).tril() & alive[None]
        visible |= torch.eye(size, dtype=torch.bool)
        mask = torch.zeros(size, size).masked_fill(~visible, torch.finfo(torch.float32).min)
        place = torch.arange(size)
        if self.contiguous:
            place = (alive.long().cumsum(0) - 1).clamp(min=0)
        return mask[None, None], self.text.rotary_emb(hidden, position_ids=place[None])
