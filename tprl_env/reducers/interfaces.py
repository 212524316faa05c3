"""The interface of a pruner: visual tokens and a question in, a keep-mask out.

Shapes: n visual tokens of one image, D token width, Dv tower width, d code width, Q question
tokens, d_q query width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from tprl_env.data.features.source import TokenSource
from tprl_env.reducers.selection import top_k_mask

Knowledge = Literal["policy", "heuristic", "oracle", "random"]


@dataclass
class PruneInputs:
    """Everything a pruner may look at for one sample; what is missing is None.

    Attributes:
        tokens: float32 (n, D), visual tokens as the LLM gets them.
        tower: float32 (n, Dv), features of the vision tower before the projector.
        cls_attention: float32 (n,), attention of the tower's [CLS] token.
        grid: Rows and columns of the tokens.
        query: float32 (d_q,), mean of the question's token embeddings.
        query_tokens: float32 (Q, d_q), the question's token embeddings.
        codes: float32 (n, d), autoencoder output.
        relevance: float32 (n,), what the built-in scenes know about the question.
        question_attention: float32 (n,), the LVLM's own attention from the question.
        sample: The sample's number in its store; seeds the random pruner.
    """

    tokens: Tensor | None = None
    tower: Tensor | None = None
    cls_attention: Tensor | None = None
    grid: tuple[int, int] | None = None
    query: Tensor | None = None
    query_tokens: Tensor | None = None
    codes: Tensor | None = None
    relevance: Tensor | None = None
    question_attention: Tensor | None = None
    sample: int = 0

    @property
    def num_tokens(self) -> int:
        """Number of visual tokens n.

        Raises:
            ValueError: When no per-token field and no grid is given.
        """
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None:
                return len(value)
        if self.grid is not None:
            return self.grid[0] * self.grid[1]
        raise ValueError(f"PruneInputs needs one of {', '.join(_PER_TOKEN)} or grid, got none")


_PER_TOKEN = ("tokens", "codes", "tower", "cls_attention", "relevance", "question_attention")


def prune_inputs(
    source: TokenSource, sample: int, needs: Sequence[str] | None = None
) -> PruneInputs:
    """Read one sample for a pruner.

    Args:
        source: The store.
        sample: Its row.
        needs: Fields to read (a pruner's ``needs``); None reads everything the store holds.
    """

    def wanted(name: str) -> bool:
        return needs is None or name in needs

    row = np.array([sample])
    inputs = PruneInputs(sample=int(sample), grid=source.grid(sample))
    for name in ("tokens", "tower", "cls_attention", "relevance"):
        if wanted(name):
            setattr(inputs, name, _tensor(getattr(source, name)(sample)))
    if wanted("query"):
        inputs.query = _tensor(source.query(row)[0])
    if wanted("query_tokens"):
        embeddings, exists = source.query_tokens(row)
        inputs.query_tokens = _tensor(embeddings[0][exists[0]])
    if source.has_channel("codes") and (wanted("codes") or inputs.tokens is None):
        inputs.codes = _tensor(source.codes(row)[0][source.exists(row)[0]])
    if wanted("question_attention") and source.has_channel("question_attention"):
        inputs.question_attention = _tensor(source.channel("question_attention", sample))
    return inputs


class Pruner(ABC):
    """Chooses the visual tokens that reach the LLM.

    Subclasses are frozen dataclasses whose fields are the method's hyper-parameters.

    Attributes:
        name: Key in ``PRUNERS``.
        knowledge: What the method may know: "random" nothing, "heuristic" the published signals,
            "policy" what it learned, "oracle" what no method can know.
        needs: Fields of :class:`PruneInputs` that must not be None.
    """

    name: ClassVar[str]
    knowledge: ClassVar[Knowledge]
    needs: ClassVar[tuple[str, ...]] = ()

    @property
    def exact(self) -> bool:
        """Whether exactly ``budget`` tokens are kept; a threshold does so on average only."""
        return True

    @abstractmethod
    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep-mask of one image.

        Args:
            inputs: The image; not modified.
            budget: Tokens to keep, 1 to n.

        Returns:
            bool (n,), True = kept, in the original order.

        Raises:
            ValueError: On a budget out of range or inputs that lack a field in ``needs``.
        """

    def prune_batch(self, inputs: Sequence[PruneInputs], budget: int) -> list[Tensor]:
        """Masks of several images, one after the other unless a subclass does better."""
        return [self.prune(one, budget) for one in inputs]

    def check(self, inputs: PruneInputs, budget: int) -> None:
        """Refuse inputs that lack a field or a budget that cannot be kept exactly."""
        missing = [need for need in self.needs if getattr(inputs, need) is None]
        if missing:
            raise ValueError(
                f"pruner {self.name!r} needs {', '.join(missing)}, which sample {inputs.sample} "
                "lacks; encode the store with them"
            )
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
            raise ValueError(f"budget must be a whole number of tokens, got {budget!r}")
        if not 1 <= budget <= inputs.num_tokens:
            raise ValueError(
                f"budget must lie in [1, {inputs.num_tokens}], the tokens of sample "
                f"{inputs.sample}, got {budget}"
            )


class RankingPruner(Pruner):
    """A pruner that gives every token a saliency and keeps the largest."""

    @abstractmethod
    def saliency(self, inputs: PruneInputs) -> Tensor:
        """Value per token, (n,); larger is kept first."""

    def prune(self, inputs: PruneInputs, budget: int) -> Tensor:
        """Keep the ``budget`` most salient tokens, ties by lowest index."""
        self.check(inputs, budget)
        saliency = self.saliency(inputs)
        if saliency.shape != (inputs.num_tokens,) or bool(saliency.isnan().any()):
            raise ValueError(
                f"pruner {self.name!r} must rank {inputs.num_tokens} tokens of sample "
                f"{inputs.sample} by numbers, got shape {tuple(saliency.shape)} with "
                f"{int(saliency.isnan().sum())} NaN"
            )
        return keep_top(saliency, budget)


def keep_top(values: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of (n,) values, ties by lowest index."""
    everything = torch.ones(1, len(values), dtype=torch.bool, device=values.device)
    counts = torch.tensor([count], device=values.device)
    return top_k_mask(values[None], everything, counts)[0]


def given(value: Tensor | None) -> Tensor:
    """A field that ``check`` found present, for the type checker."""
    if value is None:
        raise ValueError("a field of PruneInputs is missing; call Pruner.check first")
    return value


def _tensor(array: Any) -> Tensor | None:
    """Stored array as float32; a copy, because stores hand out read-only memory."""
    return None if array is None else torch.from_numpy(np.array(array, dtype=np.float32))
