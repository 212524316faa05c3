"""What a pruned LVLM gives, and its rows on the way there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tprl_env.lvlm.protocol import Positions


@dataclass(frozen=True)
class PrunedAnswer:
    """An answer and the tokens it was given from.

    Attributes:
        text: What the LVLM generated.
        keep: Droppable tokens that reached the LLM, ``(n,)`` bool in the order of the sequence; of
            merged tokens the places that they stand for.
        grid: Rows and columns of the tokens; (1, n) where they are not one grid.
        lives: uint8 (n,), decoder layers that each place's token entered, 0 = dropped.
        average_tokens: Visual tokens per decoder layer, mean over the layers, those that show no
            place of the picture left out.
    """

    text: str
    keep: npt.NDArray[np.bool_]
    grid: tuple[int, int]
    lives: npt.NDArray[np.uint8]
    average_tokens: float


@dataclass(frozen=True)
class PrunedScore:
    """How well given answers fit what is left of a picture.

    Attributes:
        exact: 1.0 where greedy decoding gives one of the answers, else 0.0.
        likelihood: Probability of answering with any of them, end token included.
        lives: uint8 (n,), as in :class:`PrunedAnswer`.
        average_tokens: As in :class:`PrunedAnswer`.
    """

    exact: float
    likelihood: float
    lives: npt.NDArray[np.uint8]
    average_tokens: float


class Result(NamedTuple):
    """What happened to the droppable tokens of a row."""

    keep: npt.NDArray[np.bool_]
    lives: npt.NDArray[np.uint8]
    average: float

    @property
    def counted(self) -> tuple[npt.NDArray[np.uint8], float]:
        """Layers of each token, and the average."""
        return self.lives, self.average


class Left(NamedTuple):
    """Rows as the LVLM takes them, to generate or to score."""

    tokens: list[Any]
    keep: list[npt.NDArray[np.bool_]] | None
    positions: Positions | None
    inside: dict[str, Any]
    results: list[Result]


class Group(NamedTuple):
    """Rows with the same count of tokens; ``rows`` are their places in the batch."""

    rows: list[int]
    prompts: list[Any]
    visuals: list[Any]
    left: Left
