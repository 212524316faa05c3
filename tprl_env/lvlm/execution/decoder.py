"""Running a Llama-like language model on assembled embeddings.

The library's own layers are called one after the other. Right-padded sequences need no mask: a
place sees only places before it, and padding comes last. This matters with gapped positions,
because the library's mask builder reads gaps without a mask as several packed sequences; it is
not asked here, and decoding (:func:`greedy`) always hands it an explicit mask.

Shapes: R sequences, L places, A places whose result is wanted, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import rotate_half

from tprl_env.checks import NotFiniteError

TEXT_MODELS = (
    *("llama", "mistral", "qwen2", "qwen3"),
    *("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"),
)
"""Language models with this layer: pre-norm attention with rotary halves, then pre-norm MLP.

Queries and keys may be normed per head. Where there are three rotary axes, the library's own
rotary embedding folds them.
"""


_LOGIT_ELEMENTS = 1 << 26

_HEAD_ELEMENTS = 1 << 24
"""Weights of the output embedding that are in float32 at a time: 64 MB."""

NOT_FINITE = (
    "the language model's logits are not finite: visual tokens, weights or config.json are "
    "damaged, or the number type is too small (dtype='float32' has the largest range)"
)


class _GivenKeys:
    """Replaces a cache: gives the last layer the keys and values of all places."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self._keys, self._values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        return self._keys, self._values


def states_at(text: Any, hidden: Tensor, positions: Tensor, places: Tensor) -> Tensor:
    """Normed final states (R, A, D) at ``places`` (R, A), right-padded sequences."""
    rotary = angles(text, hidden, positions)
    for layer in text.layers[:-1]:
        hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
    return last_layer_at(text, hidden, rotary, places)


def angles(text: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (R or 1, L, d) of positions, on their device.

    A model over several GPUs has its rotary embedding on one of them, hence one place of the
    states, which give the number type only, is sent there and not all.
    """
    cos, sin = text.rotary_emb(hidden[:1, :1].to(positions.device), position_ids=positions)
    return cos.to(positions.device), sin.to(positions.device)


def last_layer_at(
    text: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], places: Tensor
) -> Tensor:
    """Normed final states (R, A, D) at ``places`` from what enters the last layer, (R, L, D).

    Only the wanted places get queries and an MLP, which saves a fifth of the built-in model's
    work.
    """
    last = text.layers[-1]
    attention = last.self_attn
    hidden = hidden.to(device_of(last))
    places = places.to(hidden.device)
    cos, sin = (one.to(hidden.device) for one in rotary)
    normed = last.input_layernorm(hidden)
    keys = turned(project(attention.k_proj, attention, normed), cos, sin)
    values = project(attention.v_proj, attention, normed)
    visible = torch.arange(hidden.shape[1], device=hidden.device) <= places[..., None]
    wanted = last(
        rows_at(hidden, places),
        attention_mask=visible[:, None],
        position_embeddings=(rows_at(cos, places), rows_at(sin, places)),
        past_key_values=_GivenKeys(keys, values),
        use_cache=True,
    )
    normed_states: Tensor = text.norm(wanted)
    return normed_states


def device_of(layer: Any) -> torch.device:
    """Where a decoder layer's weights are; layers of one model may be on several GPUs."""
    device: torch.device = layer.self_attn.k_proj.weight.device
    return device


def project(projection: Any, attention: Any, normed: Tensor) -> Tensor:
    """Queries, keys or values (R, heads, L, d) of normed states, before the rotary turn."""
    heads = projection(normed).view(*normed.shape[:2], -1, attention.head_dim)
    for name in ("q", "k"):  # qwen3 norms each head of queries and keys
        norm = getattr(attention, f"{name}_norm", None)
        if norm is not None and projection is getattr(attention, f"{name}_proj"):
            heads = norm(heads)
    found: Tensor = heads.transpose(1, 2)
    return found


def turned(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(R, heads, L, d) queries or keys, turned by the rotary angles of their positions."""
    return vectors * cos[:, None] + rotate_half(vectors) * sin[:, None]


def rows_at(values: Tensor, places: Tensor) -> Tensor:
    """Gather (R, A, width) from (R or 1, L, width); whole rows, faster than a gather by entry."""
    rows, width = values.shape[0], values.shape[-1]
    places = places.to(values.device)
    first = torch.arange(rows, device=values.device)[:, None] * values.shape[1]
    flat = (places + first).flatten()
    return values.reshape(-1, width).index_select(0, flat).view(*places.shape, width)


def logits(states: Tensor, head: Tensor) -> Tensor:
    """(M, V) float32 logits; logits in bfloat16 would tie and flip the arg-max.

    A head that is not float32 is widened a chunk of words at a time: a float32 copy of the whole
    would take 2.5 GB beside the weights where the vocabulary has 150 000 words.

    Args:
        states: (M, D) final states.
        head: (V, D) output embedding in the model's type.
    """
    states = states.to(head.device, torch.float32)
    if head.dtype == torch.float32:
        return states @ head.T
    found = states.new_empty(len(states), len(head))
    step = max(1, _HEAD_ELEMENTS // head.shape[1])
    for start in range(0, len(head), step):
        found[:, start : start + step] = states @ head[start : start + step].float().T
    return found


def judge(states: Tensor, head: Tensor, wanted: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each wanted token is the arg-max at its place, and its log-probability.

    Any end token stands for all of them, as in :func:`greedy`: their probabilities are added.

    Args:
        states: (M, D) final states.
        head: (V, D) output embedding.
        wanted: (M,) ids.
        ends: (E,) ids of the end tokens.

    Returns:
        bool (M,) and float32 (M,), which is NaN or infinite where the logits are.
    """
    hits, log_p = [], []
    wanted, ends = wanted.to(head.device), ends.to(head.device)
    step = max(1, _LOGIT_ELEMENTS // len(head))
    for state, target in zip(states.split(step), wanted.split(step), strict=True):
        rated = logits(state, head)
        best, total = rated.argmax(-1), rated.logsumexp(-1)
        ending = torch.isin(target, ends)
        hits.append((best == target) | (torch.isin(best, ends) & ending))
        alone = rated.gather(1, target[:, None])[:, 0] - total
        if len(ends) > 1:
            alone = torch.where(ending, rated[:, ends].logsumexp(-1) - total, alone)
        log_p.append(alone)
    return torch.cat(hits), torch.cat(log_p)


def greedy(
    text: Any,
    head: Tensor,
    hidden: Tensor,
    positions: Tensor,
    valid: Tensor,
    eos_ids: Collection[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Plain greedy decoding: no sampling, no penalty, no other processor.

    Args:
        text: The language model.
        head: (V, D) output embedding.
        hidden: (R, L, D) LEFT-padded input embeddings.
        positions: (R, L) rotary positions; the next token continues from the last one.
        valid: (R, L) 1 where not padding.
        eos_ids: Any of them ends a sequence.
        max_new_tokens: Longest answer.

    Returns:
        Per sequence the generated ids without the end token.

    Raises:
        NotFiniteError: A logit is NaN or infinite.
    """
    cache = DynamicCache(config=text.config)
    written: list[list[int]] = [[] for _ in range(hidden.shape[0])]
    running = [True] * hidden.shape[0]
    for _ in range(max_new_tokens):
        states = text(
            inputs_embeds=hidden,
            attention_mask=valid,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        best, chosen = logits(states, head).max(-1)
        if not best.isfinite().all():
            raise NotFiniteError(NOT_FINITE, (~best.isfinite()).nonzero()[:, 0].tolist())
        for row, token in enumerate(chosen.tolist()):
            if running[row] and token in eos_ids:
                running[row] = False
            elif running[row]:
                written[row].append(token)
        if not any(running):
            break
        hidden = text.embed_tokens(chosen[:, None])
        positions = positions[:, -1:] + 1
        valid = torch.cat([valid, valid.new_ones(len(valid), 1)], 1)
    return written
