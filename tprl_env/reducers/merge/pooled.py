"""Pooling: the mean of each square of neighbouring tokens, a control of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tprl_env.checks import check_integer
from tprl_env.reducers.interfaces import Knowledge, Merged, Merger, Positions, PruneInputs, given


@dataclass(frozen=True)
class Pooled(Merger):
    """Mean of the projected tokens in squares of side ``window``; those at the border may be cut.

    A square stands for the place at its middle (the upper left one of four). The number of squares
    is what it is: the budget is met as closely as possible.

    Attributes:
        window: Side of a square; 2 is the usual control row and ignores the budget. None takes the
            side whose count is nearest to the budget, fewer tokens where two are equally near.
    """

    name: ClassVar[str] = "pooled"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("tokens", "grid")
    positions: ClassVar[Positions] = "contiguous"
    window: int | None = None

    def __post_init__(self) -> None:
        """Refuse a window without side."""
        if self.window is not None:
            check_integer("window", self.window, 1)

    @property
    def exact(self) -> bool:
        """Squares do not come in every number."""
        return False

    def merged(self, inputs: PruneInputs, budget: int) -> Merged:
        """Means in raster order."""
        tokens, (height, width) = given(inputs.tokens), given(inputs.grid)
        if height * width != len(tokens):
            raise ValueError(
                f"merger 'pooled' needs a full grid, got {height}x{width} for {len(tokens)} tokens "
                f"of sample {inputs.sample}"
            )
        if inputs.coords is not None and int(inputs.coords[:, :2].max()) > 0:
            raise ValueError(
                f"merger 'pooled' averages squares of one full grid, but the tokens of sample "
                f"{inputs.sample} lie in tiles; take 'tome', or an LVLM of one grid such as "
                f"qwen2_5_vl"
            )
        side = self.window or _nearest_side(height, width, budget)
        columns = -(-width // side)
        place = torch.arange(len(tokens), device=tokens.device)
        row, column = place // width, place % width
        square = row // side * columns + column // side
        count = int(square[-1]) + 1
        sums = tokens.new_zeros(count, tokens.shape[1]).index_add_(0, square, tokens)
        sizes = square.bincount(minlength=count)[:, None].to(tokens.dtype)
        number = torch.arange(count, device=tokens.device)
        top, left = number // columns * side, number % columns * side
        middle_row = top + ((height - top).clamp(max=side) - 1) // 2
        middle_column = left + ((width - left).clamp(max=side) - 1) // 2
        return Merged(sums / sizes, middle_row * width + middle_column)


def _nearest_side(height: int, width: int, budget: int) -> int:
    """Side of the squares whose number is nearest to the budget."""
    counts = {s: -(-height // s) * -(-width // s) for s in range(1, max(height, width) + 1)}
    return min(counts, key=lambda side: (abs(counts[side] - budget), -side))
