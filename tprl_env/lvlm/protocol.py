"""The interface of a large vision-language model (LVLM) to the rest of the package.

Shapes: B rows, n visual tokens of one image, D token width, Dv tower width, Q question tokens,
d_q query width (the width of the language model's input embeddings).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.data.features.placement import Pictured, Placement, raster
from tprl_env.data.features.source import Box
from tprl_env.reducers.layer_pruner import LayerPruner, RankingLayerPruner
from tprl_env.reducers.vision import VisionSignals

__all__ = [
    "LVLM",
    "Inside",
    "LVLMScores",
    "Placement",
    "Positions",
    "Prompt",
    "Visual",
    "raster",
]

Positions = Literal["original", "contiguous"]
"""Rotary positions of kept tokens: their place in the full prompt, or closed up without gaps."""


@dataclass(frozen=True)
class Visual:
    """One encoded image.

    Attributes:
        tokens: (n, D) visual tokens as the language model gets them, raster order. In families
            with DeepStack (n, D + levels * D): behind each token what is added to its state after
            the first decoder layers.
        tower: (n, Dv) the selected features of the vision tower before the projector; Dv is 0
            where a token has no feature of its own.
        cls_attention: (n,) float32, attention of the tower's CLS token to each patch, mean over
            heads, renormalisation left out (they sum to one minus CLS's attention to itself);
            ``None`` for towers without a CLS token.
        grid: (rows, columns) where the droppable tokens are one full grid, else (1, n).
        box: (top, left, bottom, right), the part of the picture that the grid covers, in its
            pixels; ``None`` for all of it.
        placement: Where the tokens stand; ``None`` for one grid at consecutive positions.
        placeholder: Text that stands for the image in a prompt, one placeholder token per run;
            empty for the placeholder alone.
    """

    tokens: Tensor
    tower: Tensor
    cls_attention: Tensor | None
    grid: tuple[int, int]
    box: Box | None = None
    placement: Placement | None = None
    placeholder: str = ""


@dataclass(frozen=True)
class Prompt:
    """A tokenised question.

    Attributes:
        ids: Token ids with ONE image placeholder per run of visual tokens.
        visual_at: Indices of the placeholders in ``ids``, ascending.
        question_span: (start, stop) in ``ids`` of the question's own text tokens; system text and
            template are outside.
        text: The rendered text, needed to tokenise an answer behind it; empty when the prompt
            was rebuilt from stored ids.
        placement: Where the visual tokens stand; ``None`` for one run at consecutive positions.
    """

    ids: tuple[int, ...]
    visual_at: tuple[int, ...]
    question_span: tuple[int, int]
    text: str = ""
    placement: Placement | None = None

    def __post_init__(self) -> None:
        """Refuse spans that cannot be.

        Raises:
            ValueError: A place lies outside ``ids`` or the span covers the image.
        """
        start, stop = self.question_span
        at = self.visual_at
        inside = all(0 <= place < len(self.ids) for place in at) and list(at) == sorted(set(at))
        if not inside or not 0 <= start < stop <= len(self.ids):
            raise ValueError(
                f"prompt of {len(self.ids)} ids has visual_at {at} and question_span "
                f"({start}, {stop}); both must lie inside it, in order, and the span must not be "
                f"empty"
            )
        covered = [place for place in at if start <= place < stop]
        if covered:
            raise ValueError(
                f"question_span ({start}, {stop}) covers the image placeholder at {covered[0]}"
            )
        if self.placement is not None and len(self.placement.runs) != len(at):
            raise ValueError(
                f"prompt has {len(at)} image placeholders for {len(self.placement.runs)} runs of "
                f"visual tokens; it needs one per run"
            )

    def droppable(self, count: int) -> npt.NDArray[np.bool_]:
        """Bool (count,): which of its visual tokens a budget is about; see ``Placement``."""
        return np.ones(count, bool) if self.placement is None else self.placement.droppable

    @property
    def behind_images(self) -> int:
        """First index behind the last placeholder; 0 in a prompt without pictures."""
        return self.visual_at[-1] + 1 if self.visual_at else 0


@dataclass(frozen=True)
class LVLMScores:
    """Scores of B rows from one teacher-forced pass.

    Attributes:
        exact: (B,) float32, 1.0 when greedy decoding would give one of the answers, else 0.0.
        likelihood: (B,) float32, probability of answering with any of the distinct answers.
        sequences: Sequences the language model ran (one per row and distinct answer).
        padded_tokens: Padding places among them.
        lives: With a reducer, per row uint8 (n,): the number of decoder layers that each visual
            token entered, 0 = dropped before the language model. Its sum over the number of layers
            is the row's average of visual tokens per layer. Tokens that show no place of the
            picture (see :attr:`Placement.droppable`) enter all layers and are no part of a
            reducer's budget.
    """

    exact: npt.NDArray[np.float32]
    likelihood: npt.NDArray[np.float32]
    sequences: int = 0
    padded_tokens: int = 0
    lives: list[npt.NDArray[np.uint8]] | None = None


class Inside(TypedDict, total=False):
    """What happens to visual tokens beyond a keep-mask; at most one of the three ways.

    Attributes:
        lives: Per row integers (n,): the number of decoder layers that each visual token lives
            through, 0 = dropped before the language model, L = kept. A keep-mask is the special
            case of 0 and L.
        reducer: A method that chooses between the layers, in the same pass.
        average: With ``reducer``, the wanted mean over all layers of the visual tokens that enter
            a layer; its own schedule without.
        places: For merged tokens, which replace the image's own: per row integers (m,), the place
            in the full image that each of the row's m ``tokens`` stands for. Sequences have them
            in the given order.
        sizes: With ``places``, visual tokens of the full image per row; text positions go on
            behind them unless positions are contiguous.
    """

    lives: Sequence[npt.NDArray[Any]] | None
    reducer: LayerPruner | None
    average: float | None
    places: Sequence[npt.NDArray[np.int64]] | None
    sizes: Sequence[int] | None


class LVLM(Protocol):
    """A frozen vision-language model that can answer from a part of its visual tokens."""

    name: str
    device: torch.device
    dtype: torch.dtype
    image_backend: str
    max_positions: int
    token_width: int
    query_width: int
    image_token_id: int
    num_layers: int

    @property
    def fingerprint(self) -> str:
        """Changes when the weights or the processing change."""
        ...

    @property
    def model(self) -> Any:
        """The library's own model."""
        ...

    def encode_images(self, images: Sequence[npt.NDArray[np.uint8]]) -> list[Visual]:
        """Encode (H, W, 3) uint8 RGB pictures."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """(m, D) visual tokens for (m, Dv) features of the tower."""
        ...

    def vision_signals(self, image: npt.NDArray[np.uint8]) -> VisionSignals:
        """What methods may ask of the tower and the projector for one picture, on request."""
        ...

    def prompt(self, question: str, visuals: Sequence[Pictured] | None = None) -> Prompt:
        """Tokenise a question inside the checkpoint's own template.

        ``visuals`` are the pictures that it asks about, in order; without them one picture of one
        run is meant.
        """
        ...

    def answer_ids(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        """Token ids of an answer behind ``prompt``, end token appended."""
        ...

    def question_embeddings(self, prompt: Prompt) -> Tensor:
        """(Q, d_q) float32 input embeddings of the question's text tokens; q is the mean."""
        ...

    def score(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[Sequence[Sequence[int]]],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        positions: Positions | None = None,
        **inside: Unpack[Inside],
    ) -> LVLMScores:
        """Score all rows in one batched pass; ``keep=None`` keeps all tokens.

        Positions are the reducer's own where there is one and none are given, else original.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        keep: Sequence[npt.NDArray[np.bool_]] | None = None,
        max_new_tokens: int = 20,
        positions: Positions | None = None,
        **inside: Unpack[Inside],
    ) -> list[str]:
        """Answer greedily from the kept tokens."""
        ...

    def reduce(
        self,
        prompts: Sequence[Prompt],
        tokens: Sequence[Any],
        reducer: LayerPruner,
        average: float | None = None,
        positions: Positions | None = None,
    ) -> list[npt.NDArray[np.uint8]]:
        """Per row the ``lives`` that a reducer chooses, running only the layers that it needs."""
        ...

    def saliency(
        self, prompts: Sequence[Prompt], tokens: Sequence[Any], rule: RankingLayerPruner
    ) -> list[npt.NDArray[np.float32]]:
        """Per row the values (n,) of a rule at its first cut, all tokens present before it.

        Tokens that show no place of the picture, which no budget is about, have zero.
        """
        ...

    def question_attention(
        self, prompts: Sequence[Prompt], tokens: Sequence[Any]
    ) -> list[npt.NDArray[np.float32]]:
        """Per visual token the largest attention any question token pays it, all tokens present."""
        ...
