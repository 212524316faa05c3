"""The demonstrator: the largest attention that any question token pays a visual token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.lvlm.execution.attention import QuestionProbe
from tprl_env.lvlm.execution.language import LanguageModel
from tprl_env.lvlm.execution.layerwise import advance
from tprl_env.lvlm.execution.sequence import check_context, check_rows, layout
from tprl_env.lvlm.protocol import Prompt

_ATTENTION_ELEMENTS = 1 << 26


def question_map(
    language: LanguageModel, prompts: Sequence[Prompt], tokens: Sequence[Any]
) -> list[npt.NDArray[np.float32]]:
    """Per row (n,) float32 in [0, 1]; see ``LVLM.question_attention``.

    Raises:
        ValueError: The template puts the question before the image, where it cannot see it.
    """
    check_rows(prompts, tokens, None, placed=language.placed)
    if any(p.question_span[0] < p.behind_images for p in prompts):
        raise ValueError(
            "question_attention needs the image before the question, but this checkpoint's "
            "template puts the question first"
        )
    found: list[npt.NDArray[np.float32]] = []
    visual = language.visual(tokens)
    start = 0
    while start < len(prompts):
        stop = start + _rows_per_probe(language, prompts[start], len(visual[start]))
        found += _probe(language, prompts[start:stop], visual[start:stop])
        start = stop
    return found


def _rows_per_probe(language: LanguageModel, prompt: Prompt, count: int) -> int:
    """Rows whose (heads, question, places) attention stays within a quarter gigabyte."""
    heads = language.text.config.num_attention_heads
    places = len(prompt.ids) + count
    question = prompt.question_span[1] - prompt.question_span[0]
    return max(1, min(32, _ATTENTION_ELEMENTS // (heads * question * places)))


def _probe(
    language: LanguageModel, prompts: Sequence[Prompt], visual: Sequence[Tensor]
) -> list[npt.NDArray[np.float32]]:
    device = language.device
    counts = np.array([len(t) for t in visual])
    plan = layout(prompts, [()] * len(prompts), counts.tolist(), None, "original")
    check_context(plan, language.max_positions)
    runs = np.array([len(p.visual_at) for p in prompts])
    spans = np.array([p.question_span for p in prompts]) + (counts - runs)[:, None]
    rows = spans[:, :1] + np.arange((spans[:, 1] - spans[:, 0]).max())
    valid = rows < spans[:, 1:]
    columns = np.zeros((len(prompts), int(counts.max())), np.int64)
    for row, image in enumerate(plan.image()):
        columns[row, : counts[row]] = np.flatnonzero(image >= 0)
    probe = QuestionProbe(
        torch.from_numpy(np.minimum(rows, spans[:, 1:] - 1)).to(device),
        torch.from_numpy(valid).to(device),
        torch.from_numpy(columns).to(device),
    )
    stream = language.stream(plan, visual, share=False)
    advance(language.text, stream, range(language.num_layers), probe=probe)
    largest = probe.largest.cpu().numpy()
    return [largest[i, :count] for i, count in enumerate(counts)]
