"""A tiny LVLM of numpy arithmetic: deterministic, instant, with every method of the protocol."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from tprl_env.data.sample import Sample


@dataclass
class FakeLVLM:
    """Tokens are projected picture statistics; one token per 4 x 4 cell."""

    name: str = "fake"
    fingerprint: str = "fake-1"
    model_type: str = "fake"
    token_width: int = 8
    query_width: int = 6
    dtype: str = "torch.float32"
    image_backend: str = "pil"
    max_positions: int = 1 << 20
    delay: float = 0.0
    poison: str = ""  # "tokens", "tower", "query" or "score": give a NaN there
    calls: dict[str, int] = field(default_factory=dict)

    def _count(self, name: str, amount: int) -> None:
        self.calls[name] = self.calls.get(name, 0) + amount

    def encode_images(self, images: Sequence[np.ndarray]) -> list[Any]:
        self._count("images", len(images))
        time.sleep(self.delay)
        return [self._visual(image) for image in images]

    def _visual(self, image: np.ndarray) -> Any:
        rows, cols = image.shape[0] // 4, image.shape[1] // 4
        cells = image[: rows * 4, : cols * 4].reshape(rows, 4, cols, 4, 3).transpose(0, 2, 1, 3, 4)
        flat = cells.reshape(rows * cols, -1).astype(np.float32) / 255
        rng = np.random.default_rng(7)
        tokens = np.tanh(flat @ rng.normal(size=(48, self.token_width)).astype(np.float32))
        tower = (flat @ rng.normal(size=(48, 5))).astype(np.float32)
        if self.poison == "tokens":
            tokens[0, 0] = np.nan
        if self.poison == "tower":
            tower[0, 0] = 1e9  # infinite in float16
        attention = flat.mean(1) / flat.mean(1).sum()
        return SimpleNamespace(
            tokens=tokens, tower=tower, cls_attention=attention, grid=(rows, cols)
        )

    def prompt(self, question: str) -> Any:
        words = [int(hashlib.md5(w.encode()).hexdigest()[:4], 16) for w in question.split()]
        return SimpleNamespace(
            ids=(1, 2, *words, 3), visual_at=(1,), question_span=(2, 2 + len(words)), text=question
        )

    def answer_ids(self, prompt: Any, answer: str) -> tuple[int, ...]:
        return (*(ord(c) for c in answer), 0)

    def question_embeddings(self, prompt: Any) -> np.ndarray:
        start, stop = prompt.question_span
        rows = [
            np.random.default_rng(i).normal(size=self.query_width) for i in prompt.ids[start:stop]
        ]
        result = np.array(rows, dtype=np.float32)
        if self.poison == "query":
            result[0, 0] = np.nan
        return result

    def score(self, prompts, answers, tokens, keep=None, positions="original") -> Any:
        self._count("scores", len(prompts))
        mean = np.array([np.abs(np.asarray(t, np.float32)).mean() for t in tokens], np.float32)
        likelihood = mean / (1 + mean)
        if self.poison == "score":
            likelihood[-1] = np.nan
        exact = np.array([len(a[0]) % 2 for a in answers], np.float32)
        return SimpleNamespace(exact=exact, likelihood=likelihood)

    def generate(self, prompts, tokens, keep=None, max_new_tokens=20, positions="original"):
        return [f"said {len(p.ids)}" for p in prompts]

    def saliency(self, prompts, tokens, rule) -> list[np.ndarray]:
        pairs = zip(prompts, tokens, strict=True)
        return [np.asarray(t, np.float32)[:, 1] + rule.layer + len(p.ids) for p, t in pairs]

    def question_attention(self, prompts, tokens) -> list[np.ndarray]:
        pairs = zip(prompts, tokens, strict=True)
        return [np.asarray(t, np.float32)[:, 0] + len(p.ids) for p, t in pairs]


def make_samples(images: int = 7, questions: int = 3, vary: bool = True) -> list[Sample]:
    """Pictures of 8 x 8 to 8 x 20 pixels with questions of different lengths."""
    samples = []
    for i in range(images):
        width = 8 + 4 * (i % 4) if vary else 12
        picture = np.random.default_rng(i).integers(256, size=(8, width, 3), dtype=np.uint8)
        for j in range(questions):
            samples.append(
                Sample(
                    id=f"s{i}-{j}",
                    image=picture,
                    question="what is" + " this" * (j + 1),
                    answers=("cat", "kitten")[: 1 + j % 2],
                    image_id=f"i{i}",
                    question_type=("a", "b")[j % 2],
                    relevance=np.ones(2 * (width // 4), np.float32) * j if j else None,
                )
            )
    return samples
