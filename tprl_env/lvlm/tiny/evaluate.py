"""How well a trained checkpoint answers: all tokens, the question's oracle, simple pruners.

An answer counts when every word, teacher-forced, is the most likely one, which is what greedy
decoding would produce. Kept tokens keep their original positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from tprl_env.data.sample import Sample
from tprl_env.data.scenes import QUESTION_TYPES, TOKENS, Question, load_scenes
from tprl_env.lvlm.loading.weights import load_model
from tprl_env.lvlm.tiny.language import encode_quiz, grade, read_quiz
from tprl_env.lvlm.tiny.model import (
    HEAD_WIDTH,
    HEADS,
    build_tokenizer,
    by_cell,
    to_pixels,
    tower_features,
    vision_parts,
)

BUDGETS = (72, 48, 29, 14, 7, 4)
_BATCH = 64


class Exam:
    """A checkpoint, samples of built-in scenes, and what every pruner needs to know of them.

    Args:
        model: Trained model in float32.
        samples: Samples of `load_scenes`.
        seed: Seed of random pruning and of ties between equally relevant tokens.
    """

    def __init__(
        self, model: LlavaForConditionalGeneration, samples: Sequence[Sample], seed: int = 0
    ) -> None:
        """Encode every image once."""
        names = list(dict.fromkeys(sample.image_id for sample in samples))
        images = {sample.image_id: sample.image for sample in samples}
        self.model, self.samples = model, samples
        self.image = torch.tensor([names.index(sample.image_id) for sample in samples])
        self.question_types = np.array([sample.question_type for sample in samples])
        vocabulary = build_tokenizer().get_vocab()
        self.user = vocabulary["USER:"]
        asked = [[Question(s.question_type, s.question, s.answers[0], ())] for s in samples]
        self.quiz = encode_quiz(asked, vocabulary)
        self.relevance = torch.from_numpy(np.stack([_relevance(s) for s in samples]))
        self.noise = torch.rand(len(samples), TOKENS, generator=torch.Generator().manual_seed(seed))
        tokens, saliency = [], []
        with torch.no_grad():
            for start in range(0, len(names), _BATCH):
                pixels = to_pixels(np.stack([images[n] for n in names[start : start + _BATCH]]))
                hidden = tower_features(model, pixels, range(len(_layers(model))))
                tokens.append(model.model.multi_modal_projector(hidden[:, 1:]))
                saliency.append(cls_saliency(model, hidden))
        self.tokens, self.saliency = torch.cat(tokens), torch.cat(saliency)

    def right(self, keep: Tensor | None = None) -> np.ndarray:
        """Which answers are right, ``(S,)`` bool, with token indices ``keep`` ``(S, K)`` alone."""
        if keep is None:
            keep = torch.arange(TOKENS).expand(len(self.samples), -1)
        found = []
        with torch.no_grad():
            for start in range(0, len(self.samples), _BATCH):
                rows = slice(start, start + _BATCH)
                tokens, ids = self.tokens[self.image[rows]], self.quiz.ids[rows]
                hidden = read_quiz(self.model, tokens, keep[rows], ids, self.user)
                found.append(grade(self.model, hidden, self.quiz.labels[rows])[1][:, 0])
        return np.concatenate(found)

    def accuracy(self, keep: Tensor | None = None) -> dict[str, float]:
        """Accuracy over all samples (``"all"``) and per question question_type."""
        right = self.right(keep)
        parts = {
            question_type: right[self.question_types == question_type]
            for question_type in QUESTION_TYPES
            if question_type in self.question_types
        }
        means = {
            question_type: round(float(part.mean()), 4) for question_type, part in parts.items()
        }
        return {"all": round(float(right.mean()), 4), **means}

    def oracle(self, budget: int) -> Tensor:
        """The most relevant tokens for the question, blind to its answer; ties at random."""
        return top(self.relevance + self.noise, budget)

    def oracle_spread(self, budget: int) -> Tensor:
        """The same oracle, but ties go to cells that have fewer tokens so far."""
        rank = by_cell(self.noise[..., None])[..., 0].argsort(-1).argsort(-1).float()  # (S, 36, 4)
        spread = rank.view(-1, 6, 6, 2, 2).transpose(2, 3).reshape(-1, TOKENS)
        return top(self.relevance - spread + 0.5 * self.noise, budget)

    def random(self, budget: int) -> Tensor:
        """Random tokens."""
        return top(self.noise, budget)

    def cls(self, budget: int) -> Tensor:
        """The tokens that the tower's CLS attends to most."""
        return top(self.saliency, budget)[self.image]

    def divprune(self, budget: int) -> Tensor:
        """Max-min diversity of projected tokens under cosine distance (DivPrune)."""
        return diverse(self.tokens, budget)[self.image]


def _relevance(sample: Sample) -> np.ndarray:
    if sample.relevance is None:
        raise ValueError(f"sample {sample.id!r} has no relevance; use samples of load_scenes")
    return sample.relevance


def _layers(model: LlavaForConditionalGeneration) -> Any:
    return vision_parts(model).encoder.layers


def cls_saliency(model: LlavaForConditionalGeneration, hidden: Tensor) -> Tensor:
    """Attention of CLS to every patch in the last tower layer, heads averaged, ``(B, 144)``."""
    layer, n = _layers(model)[-1], len(hidden)
    normed = layer.layer_norm1(hidden)
    query = layer.self_attn.q_proj(normed[:, 0]).view(n, HEADS, HEAD_WIDTH)
    keys = layer.self_attn.k_proj(normed).view(n, -1, HEADS, HEAD_WIDTH)
    scores = torch.einsum("bhd,bnhd->bhn", query, keys) * HEAD_WIDTH**-0.5
    return scores.softmax(-1).mean(1)[:, 1:]


def top(scores: Tensor, budget: int) -> Tensor:
    """Indices of the ``budget`` largest scores per row, ascending."""
    return scores.topk(budget, 1).indices.sort(1).values


def diverse(tokens: Tensor, budget: int) -> Tensor:
    """Farthest-first selection per row: ``(B, N, D)`` to ascending indices ``(B, budget)``."""
    unit = F.normalize(tokens, dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    row = torch.arange(len(tokens))
    chosen = distance.sum(-1).argmax(-1, keepdim=True)
    nearest = distance[row, chosen[:, 0]]
    while chosen.shape[1] < budget:
        pick = nearest.scatter(1, chosen, -1.0).argmax(1)
        chosen = torch.cat([chosen, pick[:, None]], 1)
        nearest = torch.minimum(nearest, distance[row, pick])
    return chosen.sort(1).values


def evaluate_folder(
    folder: str | Path,
    task: str,
    split: str = "test",
    scenes: int = 200,
    budgets: Sequence[int] = BUDGETS,
    pruners: Sequence[str] = ("oracle", "oracle_spread", "divprune", "cls", "random"),
) -> dict[str, Any]:
    """Measure a checkpoint on scenes of one split, six questions each.

    Args:
        folder: Checkpoint folder.
        task: Task of the scenes.
        split: Split of the scenes.
        scenes: Number of scenes.
        budgets: Numbers of kept tokens.
        pruners: Names of `Exam` methods.

    Returns:
        ``split``, ``questions``, ``full`` (accuracy per question type) and, per pruner and budget,
        the accuracy per question type.

    Raises:
        ValueError: Unknown pruner, task or split.
    """
    known = ("oracle", "oracle_spread", "divprune", "cls", "random")
    if set(pruners) - set(known):
        raise ValueError(f"pruners must be among {', '.join(known)}, got {tuple(pruners)}")
    model = load_model(
        LlavaForConditionalGeneration, str(folder), checkpoint=str(folder), dtype=torch.float32
    ).eval()
    exam = Exam(model, load_scenes(task, split, scenes))
    found: dict[str, Any] = {
        "split": split,
        "questions": len(exam.samples),
        "full": exam.accuracy(),
    }
    for name in pruners:
        select: Callable[[int], Tensor] = getattr(exam, name)
        found[name] = {str(budget): exam.accuracy(select(budget)) for budget in budgets}
    return found
