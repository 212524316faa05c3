"""Random subsets: the floor of every comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tprl_env.reducers.interfaces import Knowledge, PruneInputs, RankingPruner


@dataclass(frozen=True)
class RandomPruner(RankingPruner):
    """Keep a uniformly random subset; masks of one sample are nested over budgets.

    Attributes:
        seed: With the sample's number decides the subset: the same everywhere and every time.
    """

    name: ClassVar[str] = "random"
    knowledge: ClassVar[Knowledge] = "random"
    seed: int = 0

    def saliency(self, inputs: PruneInputs) -> Tensor:
        """Seeded noise."""
        return seeded_noise(self.seed, inputs.sample, inputs.num_tokens)


def seeded_noise(seed: int, sample: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1) that depend on seed and sample only, float64 (count,)."""
    return torch.from_numpy(np.random.default_rng([seed, sample]).random(count))
