"""Implementations of the scorer: cached, by an LVLM in this process, in Ray actors.

Ray is imported by ``actor``, ``pool`` and ``routing`` only, torch by ``lvlm_scorer`` only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tprl_env.env.scorer import Scorer, ScorerStats, ScoringError
from tprl_env.scoring.cache import CachedScorer

if TYPE_CHECKING:
    from tprl_env.data.features import FeatureStore
    from tprl_env.lvlm.protocol import LVLM

__all__ = ["CachedScorer", "Scorer", "ScorerStats", "ScoringError", "local_scorer"]


def local_scorer(lvlm: LVLM, store: FeatureStore) -> Scorer:
    """Exact-match scorer of a store in this process, with its cache."""
    from tprl_env.scoring.lvlm_scorer import LVLMScorer

    return CachedScorer(LVLMScorer(lvlm, store, score_kind="exact"), store, "exact")
