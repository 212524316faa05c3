"""How much each token has to do with the question, for CDPruner and TRIM."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from tprl_env.reducers.interfaces import PruneInputs, given

Relevance = Literal["clip", "query"]

NEEDS: dict[str, tuple[str, ...]] = {
    "clip": ("clip_image", "clip_text"),
    "query": ("tokens", "query_tokens"),
}


def query_cosine(inputs: PruneInputs) -> Tensor:
    """Mean cosine of each projected token with the question's token embeddings, (n,).

    Raises:
        ValueError: Their widths differ.
    """
    tokens, query = given(inputs.tokens), given(inputs.query_tokens)
    if tokens.shape[1] != query.shape[1]:
        raise ValueError(
            f"relevance='query' compares tokens with question embeddings, but they are "
            f"{tokens.shape[1]} and {query.shape[1]} wide; use a store of a real LVLM"
        )
    return (F.normalize(tokens, dim=1) @ F.normalize(query, dim=1).T).mean(1)
