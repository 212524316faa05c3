"""The shipped checkpoints: teacher forcing says what greedy decoding does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tprl_env.data.scenes import TASKS, load_scenes
from tprl_env.lvlm import load_lvlm

torch.set_num_threads(1)


@pytest.mark.parametrize("task", sorted(TASKS))
def test_shipped_model_exact_is_greedy_generation(task):
    lvlm = load_lvlm(f"builtin:{task}", device="cpu")
    rng = np.random.default_rng(0)
    samples = load_scenes(task, "test", 34)[:200]  # all six question types
    images = {sample.image_id: sample.image for sample in samples}
    encoded = lvlm.encode_images(list(images.values()))
    visual = {name: v.tokens for name, v in zip(images, encoded, strict=True)}
    prompts = [lvlm.prompt(sample.question) for sample in samples]
    tokens = [visual[sample.image_id] for sample in samples]
    keep = [rng.random(len(t)) < rng.random() for t in tokens]
    written = lvlm.generate_ids(prompts, tokens, keep, 8)
    answers = [[[*ids, lvlm._eos_ids[0]]] for ids in written]
    scored = lvlm.score(prompts, answers, tokens, keep)
    assert scored.exact.tolist() == [float(len(ids) < 8) for ids in written]
    shifted = answers[6:] + answers[:6]  # mostly of the same question type
    again = lvlm.score(prompts, shifted, tokens, keep)
    assert again.exact.tolist() == [
        float(a == b and len(ids) < 8) for a, b, ids in zip(answers, shifted, written, strict=True)
    ]
    assert 0 < again.exact.sum() < 200
