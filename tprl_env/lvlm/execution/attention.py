"""Attention rows without the eager implementation.

The tower and the language model run on PyTorch's fused attention. A wrapper around it, registered
under its own name through the library's official extension point, hands queries and keys to a
probe while one is active; outputs are those of the fused attention in any case. Nothing is
patched, and the full (L, L) attention matrices never exist.

Shapes: B rows, H heads, L places, R probed query rows, C probed key columns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "tprl_probe"

Probe = Callable[[nn.Module, Tensor, Tensor, float], None]
"""Called with (attention module, query (B, H, L, d), key (B, H_kv, L, d), scaling)."""

_ACTIVE: ContextVar[Probe | None] = ContextVar("tprl_attention_probe", default=None)


def _probed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    probe = _ACTIVE.get()
    if probe is not None:
        scaling = kwargs.get("scaling")
        probe(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
    output: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **kwargs
    )
    return output


AttentionInterface.register(IMPLEMENTATION, _probed_sdpa)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextlib.contextmanager
def probing(probe: Probe) -> Iterator[None]:
    """Let ``probe`` see every attention call of this thread inside the block."""
    token = _ACTIVE.set(probe)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


class ClsProbe:
    """Head-mean attention of the CLS token (place 0) to the patches, in one tower layer.

    Attributes:
        rows: (B, patches) float32 after the pass, ``None`` before.
    """

    def __init__(self, module: nn.Module | None) -> None:
        """Watch the attention module ``module``; ``None`` watches nothing."""
        self._module = module
        self.rows: Tensor | None = None

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        """Compute the CLS row of the watched module."""
        if module is self._module:
            logits = (query[:, :, :1].float() @ key.transpose(-1, -2).float()) * scaling
            self.rows = logits.softmax(-1)[:, :, 0, 1:].mean(1)


class QuestionProbe:
    """Running maximum over layers, heads and question rows of the attention to visual columns.

    One layer's rows exist at a time: (B, H, R, L) float32.

    Attributes:
        largest: (B, C) float32, zero before the first layer.
    """

    def __init__(self, rows: Tensor, row_valid: Tensor, columns: Tensor) -> None:
        """Choose what to look at.

        Args:
            rows: (B, R) int64 places of the question tokens, any place where not valid.
            row_valid: (B, R) bool.
            columns: (B, C) int64 places of the visual tokens, any place where there is none.
        """
        self._rows, self._row_valid, self._columns = rows, row_valid, columns
        self.largest = torch.zeros(columns.shape, device=columns.device)

    def __call__(self, module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> None:
        """Fold one decoder layer into the running maximum (causal rows, right padding)."""
        batch, heads, length, width = query.shape
        count = self._rows.shape[1]
        rows, valid = self._rows.to(query.device), self._row_valid.to(query.device)
        index = rows[:, None, :, None].expand(batch, heads, count, width)
        chosen = query.gather(2, index).float()
        keys = key.repeat_interleave(heads // key.shape[1], 1).float()
        logits = (chosen @ keys.transpose(-1, -2)) * scaling
        place = torch.arange(length, device=query.device)
        later = place[None, None, :] > rows[:, :, None]
        weights = logits.masked_fill(later[:, None], -torch.inf).softmax(-1)
        weights = weights * valid[:, None, :, None]
        per_place = weights.amax((1, 2)).to(self.largest.device)
        self.largest = torch.maximum(self.largest, per_place.gather(1, self._columns))
