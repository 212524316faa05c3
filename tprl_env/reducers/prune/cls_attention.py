"""FasterVLM: attention of the vision tower's [CLS] token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tprl_env.reducers.interfaces import Knowledge, Positions, PruneInputs, RankingPruner, given


@dataclass(frozen=True)
class ClsAttentionPruner(RankingPruner):
    """Keep the tokens that [CLS] attends to most, averaged over heads (FasterVLM, 2412.01818).

    The attention is that of the layer whose output the LVLM uses (the last but one in LLaVA).
    """

    name: ClassVar[str] = "cls_attention"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("cls_attention",)
    paper: ClassVar[str] = (
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM "
        "Inference Faster (FasterVLM), 2024, arXiv 2412.01818"
    )
    positions: ClassVar[Positions] = "contiguous"

    def saliency(self, inputs: PruneInputs) -> Tensor:
        """The stored [CLS] attention."""
        return given(inputs.cls_attention)
