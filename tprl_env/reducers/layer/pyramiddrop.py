"""PyramidDrop: several cuts by the last instruction token's attention in the layer itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tprl_env.reducers.layer.schedule import at_depth, meet_average, merged_stages
from tprl_env.reducers.layer_pruner import LayerView, RankingLayerPruner, Stage, Wants, mean_rows


@dataclass(frozen=True)
class PyramidDrop(RankingLayerPruner):
    """Rank by the row of the prompt's last token in the layer's own queries and keys, head mean.

    Every stage keeps the same share of what the one before kept; an average is met by changing
    that share, as the authors do. Positions are closed up after every stage.

    Attributes:
        layers: The cuts are before these layers.
        ratio: Share that each stage keeps of the one before where no average is asked for.
        depth: Depth of the model that ``layers`` belong to; ``None`` takes them literally.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    ratio: float = 0.5
    depth: int | None = 32

    name: ClassVar[str] = "pyramiddrop"
    paper: ClassVar[str] = (
        "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual "
        "Redundancy Reduction, 2025, arXiv 2410.17247"
    )
    positions: ClassVar[Literal["original", "contiguous"]] = "contiguous"
    larger_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a ratio that is none, and layers out of order.

        Raises:
            ValueError: ``ratio`` is not in (0, 1], or ``layers`` do not ascend.
        """
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio must be in (0, 1], the share to keep, got {self.ratio}")
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be one or more, ascending, got {self.layers}")

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """Counts int(N * share) of the full image; halving at 8, 16, 24 of 32: average 270."""
        layers = tuple(at_depth(self.layers, self.depth, num_layers))
        if average is None:
            counts = [int(num_tokens * share) for share in self._shares(self.ratio)]
            return merged_stages(layers, counts)
        return meet_average(self.name, layers, self._shares, num_tokens, num_layers, average)

    def _shares(self, ratio: float) -> Sequence[float]:
        return [ratio ** (i + 1) for i in range(len(self.layers))]

    def wants(self, stage: int) -> Wants:
        """The last token's row in the layer's own queries and keys."""
        return Wants("last", "own")

    def saliency(self, view: LayerView) -> Tensor:
        """Mean over heads."""
        return mean_rows(view)
