"""The finished product: a trained or published reducer in front of an LVLM.

:class:`PrunedLVLM` answers questions about pictures; :class:`TokenPruner` shortens the inputs of a
plain transformers model.
"""

from tprl_env.inference.answers import PrunedAnswer, PrunedScore
from tprl_env.inference.pruned_lvlm import PrunedLVLM
from tprl_env.inference.token_pruner import TokenPruner

__all__ = ["PrunedAnswer", "PrunedLVLM", "PrunedScore", "TokenPruner"]
