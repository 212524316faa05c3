"""What a method may ask of the vision tower and the projector, for one picture.

The LVLM computes it on request, so stores need not hold it.

Shapes: n visual tokens, L places of the tower (n, and one more in front where it has CLS), H
heads, d head width, Dv tower width, D token width, t places that are left inside the tower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockView:
    """Queries, keys and values of one tower block for one picture.

    Attributes:
        query: float32 (H, L, d), not yet scaled.
        key: float32 (H, L, d).
        value: float32 (H, L, d).
        cls: Whether place 0 is the CLS token.
        bias: float32 (L,) added to the logits of each key, or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    cls: bool
    bias: Tensor | None = None

    def attention(self) -> Tensor:
        """Attention matrices, (H, L, L)."""
        return self._softmax(self.query)

    def cls_attention(self) -> Tensor:
        """Attention of CLS to the patches per head, (H, n).

        Raises:
            ValueError: The tower has no CLS token.
        """
        if not self.cls:
            raise ValueError(
                "the vision tower has no CLS token; the authors of VisPruner name the attention "
                "that each patch receives on average as the substitute (patch_attention)"
            )
        return self._softmax(self.query[:, :1])[:, 0, 1:]

    def patch_attention(self) -> Tensor:
        """Attention that each patch receives, mean over heads and all rows, (n,)."""
        return self.attention().mean((0, 1))[int(self.cls) :]

    def mean_keys(self) -> Tensor:
        """Keys of the patches, mean over heads, (n, d)."""
        return self.key.mean(0)[int(self.cls) :]

    def full_width(self, name: str) -> Tensor:
        """``query``, ``key`` or ``value`` with the heads side by side, (L, H d)."""
        heads: Tensor = getattr(self, name)
        return heads.transpose(0, 1).flatten(1)

    def _softmax(self, rows: Tensor) -> Tensor:
        logits = rows @ self.key.transpose(1, 2) * self.query.shape[-1] ** -0.5
        if self.bias is not None:
            logits = logits + self.bias
        return torch.softmax(logits, -1)


Step = Callable[[int, BlockView, Tensor], tuple[Tensor, Tensor | None]]
"""Called between a block's attention and its MLP with (block, its view, states (t, Dv)); returns
the states that go on, (t', Dv), and what to add to the logits of their keys from the next block
on, (t',) or None."""


class VisionSignals(Protocol):
    """The tower and the projector on one picture.

    Attributes:
        cls: Whether the tower has a CLS token.
        blocks: Number of blocks of the tower.
        last_block: Block that makes the features that the LLM gets (22 of 24 in LLaVA-1.5).
        cls_block: Block whose CLS attention methods read (22 of 24 in LLaVA-1.5).
    """

    cls: bool
    blocks: int
    last_block: int
    cls_block: int

    def features(self) -> Tensor:
        """(L, Dv) float32, features before the projector; CLS first where there is one."""
        ...

    def block(self, number: int) -> BlockView:
        """Queries, keys and values of block ``number``; negative numbers count from the end."""
        ...

    def project(self, features: Tensor) -> Tensor:
        """(m, D) tokens for (m, Dv) features."""
        ...

    def run(self, step: Step) -> Tensor:
        """Features (t, Dv) after ``last_block``, with ``step`` inside every block up to it."""
        ...
