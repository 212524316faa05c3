"""TRIM: tokens by similarity to the question, and the mean of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

import torch
from torch import Tensor

from tprl_env.checks import check_choice
from tprl_env.reducers.interfaces import (
    Knowledge,
    Merged,
    Merger,
    Positions,
    PruneInputs,
    given,
    keep_top,
)
from tprl_env.reducers.outliers import outlier_count
from tprl_env.reducers.text_relevance import NEEDS, Relevance, query_cosine


@dataclass(frozen=True)
class Trim(Merger):
    """Keep what CLIP ties to the question, append the mean of the rest (TRIM).

    s = softmax(-(e t)) with CLIP's patch and text embeddings, not normalised: in CLIP the patches
    that are least similar are the relevant ones. The largest stay in raster order, and the mean
    of the other features, projected, is appended; it stands for the place of the largest s among
    them. Meant to be trained with; equal relevance keeps the first tokens.

    Attributes:
        relevance: "clip", the paper's, or "query", a SUBSTITUTE for LVLMs without CLIP's text
            tower: the mean cosine of the projected tokens with the question's embeddings (with its
            plain sign).
        adaptive: Keep the outliers of s, however many (the authors' default), instead of
            budget - 1 tokens; without an outlier only the mean is left.
    """

    name: ClassVar[str] = "trim"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("vision", "tokens")
    paper: ClassVar[str] = (
        "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal "
        "LLMs (TRIM), COLING 2025"
    )
    positions: ClassVar[Positions] = "contiguous"
    larger_model: ClassVar[bool] = True
    order = "method"
    relevance: Relevance = "clip"
    adaptive: bool = False

    def __post_init__(self) -> None:
        """Refuse an unknown relevance."""
        check_choice("relevance", self.relevance, get_args(Relevance))

    @property
    def exact(self) -> bool:
        """Whether the budget decides."""
        return not self.adaptive

    def required(self) -> tuple[str, ...]:
        """The tower, the projector and what the relevance reads."""
        return tuple(dict.fromkeys((*self.needs, *NEEDS[self.relevance])))

    def scores(self, inputs: PruneInputs) -> Tensor:
        """Softmax over the tokens, (n,)."""
        if self.relevance == "query":
            return query_cosine(inputs).softmax(0)
        return (-(given(inputs.clip_image) @ given(inputs.clip_text).T).mean(1)).softmax(0)

    def merged(self, inputs: PruneInputs, budget: int) -> Merged:
        """Kept tokens, then the mean of the others."""
        vision, tokens = given(inputs.vision), given(inputs.tokens)
        scores = self.scores(inputs)
        count = min(outlier_count(scores), len(tokens) - 1) if self.adaptive else budget - 1
        keep = keep_top(scores, count)
        features = vision.features()[int(vision.cls) :]
        mean = vision.project(features[~keep].mean(0, keepdim=True))
        last = scores.masked_fill(keep, -torch.inf).argmax()
        places = torch.cat([keep.nonzero()[:, 0], last[None]])
        return Merged(torch.cat([tokens[keep], mean.to(tokens)]), places)
