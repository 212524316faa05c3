"""Floating-point operations of a comparison: two per multiply and add, one question's prefill.

The language model by the closed form of `tprl_env.lvlm.flops`, at the number of places that enter
each decoder layer, text included, without the output layer; the vision tower runs for every row
alike and is left out. Reducers: matrix products as torch's counter sees them.

Shapes: B questions, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from tprl_env.lvlm.flops import LANGUAGE_MODELS, LanguageSizes, language_flops


def mean_flops(config: Any, lengths: npt.NDArray[np.int64]) -> float | None:
    """Of the decoder layers, mean over questions; ``None`` where there is no closed form for them.

    Args:
        config: The text model's configuration.
        lengths: (B, L) places that enter each layer.
    """
    if config.model_type not in LANGUAGE_MODELS:
        return None
    sizes = LanguageSizes.from_config(config)
    rows, counts = np.unique(lengths, axis=0, return_counts=True)
    found = [language_flops(sizes, row) for row in rows.tolist()]
    return float(np.average(found, weights=counts))


def counted_flops(call: Callable[[], object]) -> int:
    """Matrix products of a call."""
    fused = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    mapping = {} if fused is None else {fused: _fused_attention}
    with torch.inference_mode(), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        call()
    return int(counter.get_total_flops())


def _fused_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))
