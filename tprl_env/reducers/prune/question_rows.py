"""What the question's words look up in one layer's own queries and keys, before the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tprl_env.reducers.interfaces import Knowledge, PruneInputs, RankingPruner, given


@dataclass(frozen=True)
class QuestionRowsPruner(RankingPruner):
    """Keep the tokens that any word of the question looks for in any head of layer 0.

    Layer 0's queries and keys of the raw embeddings are enough: one key projection, no pass of the
    language model. The store's channel may come from a later layer (`tprl encode --question-rows
    1`), which ranks better and costs the layers below it; that is a demonstrator, and inside the
    language model the rule is ``question_rows`` of `tprl_env.reducers.layer`.
    """

    name: ClassVar[str] = "question_rows"
    knowledge: ClassVar[Knowledge] = "heuristic"
    needs: ClassVar[tuple[str, ...]] = ("question_rows",)

    def saliency(self, inputs: PruneInputs) -> Tensor:
        """The stored ``question_rows`` channel."""
        return given(inputs.question_rows)
