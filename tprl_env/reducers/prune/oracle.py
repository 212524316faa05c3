"""Question oracle: an upper reference from the labels of the built-in scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from tprl_env.reducers.interfaces import Knowledge, PruneInputs, RankingPruner, given
from tprl_env.reducers.prune.random import seeded_noise


@dataclass(frozen=True)
class OraclePruner(RankingPruner):
    """Keep the tokens that the question is about, then random ones: an upper reference.

    The relevance comes from the generator of the built-in scenes; real data has none. It knows
    the question, not the answer.

    Attributes:
        seed: Orders tokens of equal relevance, per sample.
    """

    name: ClassVar[str] = "oracle"
    knowledge: ClassVar[Knowledge] = "oracle"
    needs: ClassVar[tuple[str, ...]] = ("relevance",)
    seed: int = 0

    def saliency(self, inputs: PruneInputs) -> Tensor:
        """Dense rank of the relevance plus noise below one rank."""
        rank = given(inputs.relevance).unique(return_inverse=True)[1]
        return rank + seeded_noise(self.seed, inputs.sample, inputs.num_tokens)
