"""Telling one loaded model from another, wherever it was loaded from and in whatever type."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch

_VALUES = 32


@torch.no_grad()
def model_signature(model: Any) -> str:
    """sha256 over names, shapes and 32 evenly spaced values of each weight.

    The values are rounded to bfloat16, so that a checkpoint gives the same in float32, float16
    and bfloat16. Weights that were quantised, fine-tuned or wrapped give another.

    Args:
        model: A model of the library.

    Raises:
        ValueError: A weight is not in memory (offloaded to disk).
    """
    digest = hashlib.sha256(str(getattr(model.config, "model_type", "")).encode())
    for name, weight in sorted(model.named_parameters()):
        if weight.device.type == "meta":
            raise ValueError(
                f"{name} is not in memory, so it cannot be told whether this is the LVLM that the "
                f"policy was trained on; load the model without offloading to disk, or pass "
                f"allow_other_lvlm=True"
            )
        digest.update(f"{name}{tuple(weight.shape)}\n".encode())
        flat = weight.detach().reshape(-1)
        places = np.linspace(0, max(len(flat) - 1, 0), min(_VALUES, len(flat))).astype(np.int64)
        some = flat[torch.from_numpy(places).to(flat.device)].to(torch.bfloat16)
        digest.update(some.view(torch.int16).cpu().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
