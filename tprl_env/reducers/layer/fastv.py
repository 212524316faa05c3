"""FastV: one cut by the last token's attention in the layer below."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tprl_env.reducers.layer.schedule import at_depth, one_cut
from tprl_env.reducers.layer_pruner import LayerView, RankingLayerPruner, Stage, Wants, mean_rows


@dataclass(frozen=True)
class FastV(RankingLayerPruner):
    """Rank by the attention that the prompt's last token pays in layer K - 1, mean over heads.

    One row is computed from queries and keys; the authors' code runs layer K - 1 with the full
    attention matrix for the same numbers. Positions keep their gaps, and later layers' caches are
    shorter.

    Attributes:
        layer: K, the cut is before this layer.
        ratio: R, share of the visual tokens to drop where no average is asked for.
        depth: Depth of the model that ``layer`` belongs to; ``None`` takes it literally.
    """

    layer: int = 2
    ratio: float = 0.5
    depth: int | None = 32

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = (
        "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for "
        "Large Vision-Language Models, ECCV 2024"
    )
    larger_model: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse a ratio that is none.

        Raises:
            ValueError: ``ratio`` is not in [0, 1).
        """
        if not 0 <= self.ratio < 1:
            raise ValueError(f"ratio must be in [0, 1), the share to drop, got {self.ratio}")

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """One cut; K = 2 of 32 at average 192, 128, 64 of 576 leaves 166.4, 98.1, 29.9 tokens."""
        (layer,) = at_depth([self.layer], self.depth, num_layers, first=1)
        if average is None:
            return (Stage(layer, round(num_tokens * (1 - self.ratio))),)
        return one_cut(self.name, num_tokens, num_layers, layer, average)

    def wants(self, stage: int) -> Wants:
        """The last token's row in the layer below."""
        return Wants("last", "previous")

    def saliency(self, view: LayerView) -> Tensor:
        """Mean over heads."""
        return mean_rows(view)
