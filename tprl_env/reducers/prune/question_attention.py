"""The LVLM's own attention from the question's tokens to the visual tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tprl_env.reducers.interfaces import Knowledge, PruneInputs, RankingPruner, given


@dataclass(frozen=True)
class QuestionAttentionPruner(RankingPruner):
    """Keep the tokens that the LLM attends to most: maximum over layers, heads and question tokens.

    COSTS A FULL PASS OF THE LLM OVER ALL TOKENS, so it saves nothing at inference; it is the
    recommended demonstrator and a reference. FastV uses the last token's mean
    attention of one early layer instead, which loses the signal on crowded scenes.
    """

    name: ClassVar[str] = "question_attention"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("question_attention",)

    def saliency(self, inputs: PruneInputs) -> Tensor:
        """The stored ``question_attention`` channel."""
        return given(inputs.question_attention)
