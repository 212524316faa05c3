"""Question oracle: an upper reference from the labels of the built-in scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from tprl_env.checks import check_choice
from tprl_env.reducers.interfaces import Knowledge, PruneInputs, RankingPruner, given
from tprl_env.reducers.prune.random import seeded_noise

Ties = Literal["random", "spread"]
_CELL = 2  # the built-in scenes draw one object on 2 x 2 tokens


@dataclass(frozen=True)
class OraclePruner(RankingPruner):
    """Keep the tokens that the question is about, then others: an upper reference.

    The relevance comes from the generator of the built-in scenes; real data has none. It knows
    the question, not the answer.

    Attributes:
        ties: Among tokens of equal relevance, "random" ones, or ("spread") those of the cells of
            2 x 2 tokens that have fewer tokens so far.
        seed: Orders the tokens that are equal after that, per sample.
    """

    name: ClassVar[str] = "oracle"
    knowledge: ClassVar[Knowledge] = "oracle"
    needs: ClassVar[tuple[str, ...]] = ("relevance",)
    ties: Ties = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse an unknown order of ties."""
        check_choice("ties", self.ties, get_args(Ties))

    def saliency(self, inputs: PruneInputs) -> Tensor:
        """Dense rank of the relevance plus an order of ties below one rank."""
        rank = given(inputs.relevance).unique(return_inverse=True)[1]
        noise = seeded_noise(self.seed, inputs.sample, inputs.num_tokens)
        if self.ties == "random":
            return rank + noise
        cell = _cells(inputs)
        rivals = (cell == cell[:, None]) & (rank == rank[:, None])
        earlier = (rivals & (noise > noise[:, None])).sum(1)  # of the same cell, 0 to 3
        return rank + (noise - earlier) / _CELL**2


def _cells(inputs: PruneInputs) -> Tensor:
    """Number of every token's cell, int64 (n,)."""
    if inputs.coords is not None:  # cells of each tile
        tile, row, column = inputs.coords.T
        side = int(inputs.coords[:, 1:].max()) + 1
        return (tile * side + row // _CELL) * side + column // _CELL
    height, width = inputs.grid or (0, 0)
    if height * width != inputs.num_tokens:
        raise ValueError(
            f"ties='spread' needs a full grid, got {height}x{width} for {inputs.num_tokens} tokens "
            f"of sample {inputs.sample}; use ties='random'"
        )
    place = torch.arange(height * width)
    return place // width // _CELL * width + place % width // _CELL
