"""Floating-point operations of a comparison: two per multiply and add, one question's prefill.

Language model: projections, the whole attention matrix and the gated MLP of every decoder layer at
the number of places that enter it, text included; norms, embeddings and the output layer are left
out, and so is the vision tower, which runs for every row alike. Reducers: matrix products as
torch's counter sees them.

Shapes: B questions, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def language_flops(config: Any, lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Of the decoder layers, (B,).

    Args:
        config: The text model's configuration.
        lengths: (B, L) places that enter each layer.
    """
    width, heads = int(config.hidden_size), int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or width // heads)
    queries, keys = heads * head, int(config.num_key_value_heads) * head
    n = lengths.astype(np.float64)
    adds = n * width * (2 * queries + 2 * keys) + 2 * n * n * queries
    found: npt.NDArray[np.float64] = 2 * (adds + 3 * n * width * config.intermediate_size).sum(1)
    return found


def counted_flops(call: Callable[[], object]) -> int:
    """Matrix products of a call."""
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    mapping = {} if fused is None else {fused: _fused_attention}
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
