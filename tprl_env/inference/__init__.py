"""The finished product: a trained or published reducer in front of an LVLM.

:class:`PrunedLVLM` answers questions about pictures; :class:`TokenPruner` shortens the inputs of a
plain transformers model.
"""

from tprl_env.inference.pruned_lvlm import PrunedAnswer, PrunedLVLM
from tprl_env.inference.token_pruner import TokenPruner

__all__ = ["PrunedAnswer", "PrunedLVLM", "TokenPruner"]
