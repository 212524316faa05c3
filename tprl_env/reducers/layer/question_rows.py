"""Our own rule: the question's words looked up in a layer's own queries and keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from tprl_env.checks import check_choice, check_integer
from tprl_env.reducers.layer.schedule import at_depth, one_cut
from tprl_env.reducers.layer_pruner import (
    LayerView,
    RankingLayerPruner,
    Rows,
    Source,
    Stage,
    Wants,
    attention,
)

ROWS = ("question", "last")
HEADS = ("max", "mean")
SOURCES = ("own", "previous")


@dataclass(frozen=True)
class QuestionRows(RankingLayerPruner):
    """Keep what any word of the question looks for, in any head, before the layer runs.

    The saliency of a token is the largest attention that a row pays it: maximum over the rows and
    over the heads. It needs no full pass and no attention matrix: one key projection more, and the
    rows of some words. With ``layer=0`` it prunes before the language model.

    Attributes:
        layer: The cut is before this layer, taken literally.
        rows: "question", the words of the question, or "last", the prompt's last token.
        heads: "max" or "mean" over heads.
        source: "own", the layer's queries and keys on the states that enter it, or "previous",
            those of the layer below.
    """

    layer: int = 1
    rows: Literal["question", "last"] = "question"
    heads: Literal["max", "mean"] = "max"
    source: Literal["own", "previous"] = "own"

    name: ClassVar[str] = "question_rows"

    def __post_init__(self) -> None:
        """Refuse unknown choices.

        Raises:
            ValueError: A field has another value, or layer 0 has no layer below.
        """
        check_integer("layer", self.layer, 0)
        check_choice("rows", self.rows, ROWS)
        check_choice("heads", self.heads, HEADS)
        check_choice("source", self.source, SOURCES)
        if self.source == "previous" and self.layer == 0:
            raise ValueError("layer 0 has no layer below; take source='own' or layer 1 or later")

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """One cut; without an average a tenth of the tokens stays."""
        (layer,) = at_depth([self.layer], None, num_layers)
        if average is None:
            return (Stage(layer, max(1, round(num_tokens / 10))),)
        return one_cut(self.name, num_tokens, num_layers, layer, average)

    def wants(self, stage: int) -> Wants:
        """The rows."""
        rows: Rows = self.rows
        source: Source = self.source
        return Wants(rows, source)

    def saliency(self, view: LayerView) -> Tensor:
        """Maximum over rows, then maximum or mean over heads."""
        rows = attention(view).amax(2)
        return rows.amax(1) if self.heads == "max" else rows.mean(1)
