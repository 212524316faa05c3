"""Laying out pruned prompts, and the arguments that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lvlm_fixtures import NUM_TOKENS, pictures, save_llava

from tprl_env.lvlm import load_lvlm
from tprl_env.lvlm.execution.sequence import layout
from tprl_env.lvlm.protocol import Prompt

torch.set_num_threads(1)


def test_layout_in_numbers():
    prompt = Prompt((1, 5, 4, 7, 8), (2,), (3, 4))
    keep = [np.array([False, True, False, True]), np.array([False, False, True, False])]
    gaps = layout([prompt] * 2, [(9,), ()], [4, 4], keep, "original")
    assert gaps.ids.tolist() == [[1, 5, 0, 0, 7, 8, 9], [1, 5, 0, 7, 8, 0, 0]]
    assert gaps.positions.tolist() == [[0, 1, 3, 5, 6, 7, 8], [0, 1, 4, 6, 7, 0, 0]]
    assert gaps.visual_at.tolist() == [2, 3, 9]
    assert gaps.padded_tokens == 2
    closed = layout([prompt] * 2, [(9,), ()], [4, 4], keep, "contiguous", left=True)
    assert closed.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4]]
    assert closed.valid().tolist() == [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]


def test_bad_rows_are_refused(tmp_path):
    word_lvlm = load_lvlm(save_llava(tmp_path), device="cpu")
    prompts = [word_lvlm.prompt("what digit is at c1 ?")] * 2
    tokens = [visual.tokens for visual in word_lvlm.encode_images(pictures(2))]
    keep = [np.ones(NUM_TOKENS, bool)] * 2
    answers = [[word_lvlm.answer_ids(p, "7")] for p in prompts]
    with pytest.raises(ValueError, match="tokens has 1 rows, expected 2"):
        word_lvlm.score(prompts, answers, tokens[:1], keep)
    with pytest.raises(ValueError, match=r"keep of row 1 must be bool of shape \(16,\)"):
        word_lvlm.score(prompts, answers, tokens, [keep[0], keep[1][:5]])
    with pytest.raises(ValueError, match="row 1 has an empty answer"):
        word_lvlm.score(prompts, [answers[0], []], tokens, keep)
    with pytest.raises(ValueError, match="'original' or 'contiguous', got 'packed'"):
        word_lvlm.score(prompts, answers, tokens, keep, "packed")
    with pytest.raises(ValueError, match=r"must be \(n, 48\), got \(16, 5\)"):
        word_lvlm.score(prompts, answers, [t[:, :5] for t in tokens], keep)
    assert word_lvlm.score([], [], []).exact.shape == (0,)
    assert word_lvlm.generate([], []) == []
