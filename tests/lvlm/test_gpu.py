"""On a GPU: every family computes what it computes on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.tiny.families import RANDOM_FAMILIES, save_random

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PICTURES = [np.random.default_rng(s).integers(0, 255, (40, 70, 3), np.uint8) for s in (0, 1)]
TOLERANCE = {"float32": 1e-2, "bfloat16": 0.5}
"""Largest difference of log-likelihoods of three tokens; not yet measured on a GPU."""


def scored(lvlm: Any) -> tuple[Any, list[list[int]]]:
    """Log-likelihood and written ids of two pruned prompts in one batch."""
    visuals = lvlm.encode_images(PICTURES)
    prompts = [lvlm.prompt(q, [v]) for q, v in zip(("yes ?", "what color"), visuals, strict=True)]
    tokens = [v.tokens for v in visuals]
    keep = [np.arange(len(t)) % 2 == 0 for t in tokens]
    found = lvlm.score(prompts, [[(40, 41, 2)]] * 2, tokens, keep)
    return np.log(found.likelihood), lvlm.generate_ids(prompts, tokens, keep, 4)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", RANDOM_FAMILIES)
def test_the_gpu_computes_what_the_cpu_does(name: str, dtype: str, tmp_path: Path) -> None:
    folder = save_random(name, tmp_path)
    wanted, texts = scored(load_lvlm(folder, device="cpu"))
    lvlm = load_lvlm(folder, device="cuda", dtype=dtype)
    assert lvlm.device.type == "cuda"
    found, written = scored(lvlm)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE[dtype])
    if dtype == "float32":
        assert written == texts
