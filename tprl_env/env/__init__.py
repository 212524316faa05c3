"""The decision process: rules, rewards, episodes, the Gymnasium classes, what they ask a scorer.

Numpy and Gymnasium only.
"""

from tprl_env.env.scorer import Scorer, ScorerStats, ScoringError
from tprl_env.env.single import TokenPruningEnv
from tprl_env.env.vector import TokenPruningVectorEnv

__all__ = [
    "Scorer",
    "ScorerStats",
    "ScoringError",
    "TokenPruningEnv",
    "TokenPruningVectorEnv",
]
