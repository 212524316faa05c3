"""The pictures that a budget is about: all of a prompt, or one alone.

Shapes: n visual tokens of these pictures, D token width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.data.features.placement import Placement
from tprl_env.inference.reducing import joined
from tprl_env.reducers.interfaces import Merged

if TYPE_CHECKING:
    from tprl_env.lvlm.processed.assembling import Left
    from tprl_env.lvlm.processed.reading import ReadPrompt


@dataclass(frozen=True, eq=False)
class Job:
    """Pictures ``first`` to ``last`` of a prompt, reduced together."""

    prompt: ReadPrompt
    question: Tensor | None
    first: int
    last: int

    @property
    def begin(self) -> int:
        """Place of its first token among the prompt's."""
        return sum(self.prompt.pictures.counts[: self.first])

    @property
    def tokens(self) -> Tensor:
        """(n, D)."""
        count = sum(self.prompt.pictures.counts[self.first : self.last])
        return self.prompt.tokens[self.begin : self.begin + count]

    @property
    def placement(self) -> Placement:
        """Where they lie."""
        return joined(self.prompt.pictures.placements[self.first : self.last])

    def left(self, places: npt.NDArray[np.int64], tokens: Tensor | None) -> Left:
        """What is left of them among the prompt's tokens, those that always stay included."""
        from tprl_env.lvlm.processed.assembling import Left
        from tprl_env.lvlm.stored import beside_fixed

        droppable = self.placement.droppable
        shown = np.flatnonzero(droppable)
        if tokens is None:
            stays = ~droppable
            stays[shown[places]] = True
            every = np.flatnonzero(stays)
            return Left(every + self.begin, self.tokens[torch.from_numpy(every)])
        merged = Merged(tokens.to(self.tokens), torch.from_numpy(places))
        mixed, every = beside_fixed(merged, self.tokens, self.placement)
        return Left(every + self.begin, mixed)


def picture_groups(pictures: int, per_picture: bool) -> list[tuple[int, int]]:
    """First picture and the one behind the last of what a budget is about."""
    if not pictures:
        return []
    return [(one, one + 1) for one in range(pictures)] if per_picture else [(0, pictures)]


def together(parts: Sequence[Left], prompt: ReadPrompt) -> Left:
    """What is left of all pictures of a prompt."""
    from tprl_env.lvlm.processed.assembling import Left

    if not parts:
        return Left(np.zeros(0, np.int64), prompt.tokens[:0])
    return Left(np.concatenate([p.places for p in parts]), torch.cat([p.tokens for p in parts]))
