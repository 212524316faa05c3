"""The interfaces of reducers: visual tokens and a question in, fewer tokens out.

A :class:`Pruner` returns a keep-mask, a :class:`Merger` new tokens and the place that each stands
for.

Shapes: n visual tokens of one image, m tokens after a merger, D token width, Dv tower width, d
code width, Q question tokens, d_q query width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.checks import quoted
from tprl_env.data.features.source import TokenSource
from tprl_env.reducers.selection import top_k_mask
from tprl_env.reducers.vision import VisionSignals

T = TypeVar("T")
Knowledge = Literal["policy", "heuristic", "oracle", "random"]
Positions = Literal["original", "contiguous"]
"""Positions of what is left: its place in the full prompt, or closed up without gaps."""


@dataclass
class PruneInputs:
    """Everything a pruner may look at for one sample; what is missing is None.

    Attributes:
        tokens: float32 (n, D), visual tokens as the LLM gets them.
        tower: float32 (n, Dv), features of the vision tower before the projector.
        cls_attention: float32 (n,), attention of the tower's [CLS] token.
        grid: Rows and columns of the tokens; (1, n) where they are not one grid.
        coords: int64 (n, 3), tile or frame, row and column in it; None where they are one grid.
        areas: float32 (n, 5), picture, top, left, bottom, right of each token as shares of its
            picture; None where they are one grid.
        query: float32 (d_q,), mean of the question's token embeddings.
        query_tokens: float32 (Q, d_q), the question's token embeddings.
        codes: float32 (n, d), autoencoder output.
        relevance: float32 (n,), what the built-in scenes know about the question.
        question_attention: float32 (n,), the LVLM's own attention from the question.
        question_rows: float32 (n,), what the question's words look up in one layer of the LVLM.
        vision: The vision tower and the projector on this picture, computed on request.
        clip_image: float32 (n, P), the patches in the space of CLIP's text tower.
        clip_text: float32 (M, P), the question's segments in that space.
        sample: The sample's number in its store; seeds the random pruner.
    """

    tokens: Tensor | None = None
    tower: Tensor | None = None
    cls_attention: Tensor | None = None
    grid: tuple[int, int] | None = None
    coords: Tensor | None = None
    areas: Tensor | None = None
    query: Tensor | None = None
    query_tokens: Tensor | None = None
    codes: Tensor | None = None
    relevance: Tensor | None = None
    question_attention: Tensor | None = None
    question_rows: Tensor | None = None
    vision: VisionSignals | None = None
    clip_image: Tensor | None = None
    clip_text: Tensor | None = None
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


_PER_TOKEN = (
    "tokens",
    "codes",
    "tower",
    "cls_attention",
    "relevance",
    "question_attention",
    "question_rows",
)


def prune_inputs(
    source: TokenSource,
    sample: int,
    needs: Sequence[str] | None = None,
    vision: Callable[[npt.NDArray[np.uint8]], VisionSignals] | None = None,
) -> PruneInputs:
    """Read one sample for a pruner.

    Args:
        source: The store.
        sample: Its row.
        needs: Fields to read (a pruner's ``needs``); None reads everything the store holds.
        vision: What makes :class:`VisionSignals` of a picture, an LVLM's ``vision_signals``.
    """

    def wanted(name: str) -> bool:
        return needs is None or name in needs

    row = np.array([sample])
    inputs = PruneInputs(sample=int(sample), grid=source.grid(sample))
    if not getattr(source, "one_grid", True):  # sources of one grid need not have these
        inputs.areas = torch.from_numpy(source.areas(sample))
        if inputs.grid is not None and inputs.grid[0] == 1:
            inputs.coords = torch.from_numpy(source.coords(sample))
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
    for name in ("question_attention", "question_rows"):
        if wanted(name) and source.has_channel(name):
            setattr(inputs, name, _tensor(source.channel(name, sample)))
    if vision is not None and wanted("vision"):
        inputs.vision = vision(source.picture(sample))
    return inputs


class Reducer(ABC):
    """A way to use fewer visual tokens.

    Subclasses are frozen dataclasses whose fields are the method's hyper-parameters.

    Attributes:
        name: Key in ``REDUCERS``.
        knowledge: What the method may know: "random" nothing, "heuristic" the published signals,
            "policy" what it learned, "oracle" what no method can know.
        needs: Fields of :class:`PruneInputs` that must not be None.
        paper: Title and arXiv id or venue; empty for our own.
        positions: What the authors' code does with the positions of the tokens that are left.
        larger_model: Whether the method would be expected to need a larger model than ours.
    """

    name: ClassVar[str]
    knowledge: ClassVar[Knowledge]
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    positions: ClassVar[Positions] = "original"
    larger_model: ClassVar[bool] = False

    @property
    def exact(self) -> bool:
        """Whether exactly ``budget`` tokens are left; an adaptive rule does so on average only."""
        return True

    @property
    def smallest(self) -> int:
        """Smallest budget that the method can meet."""
        return 1

    def required(self) -> tuple[str, ...]:
        """Fields of :class:`PruneInputs` that this instance reads: ``needs`` and its options'."""
        return self.needs

    def check(self, inputs: PruneInputs, budget: int) -> None:
        """Refuse inputs that lack a field or a budget that cannot be met."""
        missing = [need for need in self.required() if getattr(inputs, need) is None]
        if missing:
            raise ValueError(
                f"{self._kind} {self.name!r} needs {', '.join(missing)}, which sample "
                f"{inputs.sample} lacks; {cure_for(missing)}"
            )
        if isinstance(budget, bool) or not isinstance(budget, (int, np.integer)):
            raise ValueError(f"budget must be a whole number of tokens, got {budget!r}")
        if not self.smallest <= budget <= inputs.num_tokens:
            raise ValueError(
                f"budget must lie in [{self.smallest}, {inputs.num_tokens}], the tokens of sample "
                f"{inputs.sample}, got {budget}"
            )

    @property
    def _kind(self) -> str:
        return "reducer"


class Pruner(Reducer):
    """Chooses the visual tokens that reach the LLM."""

    @property
    def _kind(self) -> str:
        return "pruner"

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


@dataclass(frozen=True)
class Merged:
    """What a merger leaves of one image.

    Attributes:
        tokens: (m, D) tokens as the LLM gets them.
        places: int64 (m,), the place in the full image that each token stands for. Several tokens
            may stand for one place.
    """

    tokens: Tensor
    places: Tensor


class Merger(Reducer):
    """Makes new visual tokens, each of which stands for a place of the image.

    Subclasses write :meth:`merged`; :meth:`merge` checks what goes in and what comes out.

    Attributes:
        order: "raster" where the places come out sorted, "method" where the authors' code has
            another order, which the subclass documents.
    """

    order: ClassVar[Literal["raster", "method"]] = "raster"

    @property
    def _kind(self) -> str:
        return "merger"

    def merge(self, inputs: PruneInputs, budget: int) -> Merged:
        """Tokens of one image.

        Args:
            inputs: The image; not modified.
            budget: Tokens to leave, ``smallest`` to n, extra tokens such as a mean included.

        Raises:
            ValueError: On a budget out of range, inputs that lack a field in ``needs``, or a
                method that breaks the contract.
        """
        self.check(inputs, budget)
        result = self.merged(inputs, int(budget))
        self._check_result(inputs, budget, result)
        return result

    def merge_batch(self, inputs: Sequence[PruneInputs], budget: int) -> list[Merged]:
        """Several images, one after the other unless a subclass does better."""
        return [self.merge(one, budget) for one in inputs]

    @abstractmethod
    def merged(self, inputs: PruneInputs, budget: int) -> Merged:
        """The method itself, for inputs and a budget that have been checked."""

    def _check_result(self, inputs: PruneInputs, budget: int, result: Merged) -> None:
        tokens, places, n = result.tokens, result.places, inputs.num_tokens
        problem = ""
        if tokens.ndim != 2 or places.shape != (len(tokens),) or places.dtype != torch.int64:
            problem = f"tokens {tuple(tokens.shape)}, places {tuple(places.shape)} {places.dtype}"
        elif self.exact and len(tokens) != budget:
            problem = f"{len(tokens)} tokens for a budget of {budget}"
        elif not 1 <= len(tokens) <= n:
            problem = f"{len(tokens)} tokens"
        elif not bool(tokens.isfinite().all()):
            problem = f"{int((~tokens.isfinite()).sum())} values that are not finite"
        elif int(places.min()) < 0 or int(places.max()) >= n:
            problem = f"places from {int(places.min())} to {int(places.max())}"
        elif self.order == "raster" and bool((places.diff() < 0).any()):
            problem = "places out of order"
        if problem:
            raise ValueError(
                f"merger {self.name!r} must make finite (m, D) tokens with places in [0, {n}) for "
                f"sample {inputs.sample}, got {problem}"
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


def checked_mask(mask: Any, tokens: int, exactly: int | None, where: str) -> npt.NDArray[np.bool_]:
    """What a pruner gave, as an array: checked once, where masks leave the pruners.

    Args:
        mask: What it gave for one image.
        tokens: Visual tokens of the image.
        exactly: Tokens that must be kept; None where the pruner keeps so many on average only.
        where: Pruner and sample, for the message.

    Returns:
        bool (tokens,).

    Raises:
        ValueError: It is no bool tensor or array of that shape, or keeps another number.
    """
    if not isinstance(mask, (Tensor, np.ndarray)):
        raise ValueError(f"{where}: a mask must be a bool tensor ({tokens},), got {quoted(mask)}")
    array: npt.NDArray[Any] = np.asarray(mask.cpu() if isinstance(mask, Tensor) else mask)
    if array.dtype != np.bool_ or array.shape != (tokens,):
        raise ValueError(
            f"{where}: a mask must be bool ({tokens},), one entry per token of the sample, got "
            f"{array.dtype} {array.shape}"
        )
    kept = int(array.sum())
    if exactly is not None and kept != exactly:
        raise ValueError(
            f"{where}: it promises exactly {exactly} tokens (its `exact` is True) and keeps "
            f"{kept}; keep that many, or let `exact` be False"
        )
    return array


def keep_top(values: Tensor, count: int) -> Tensor:
    """Mask of the ``count`` largest of (n,) values, ties by lowest index."""
    everything = torch.ones(1, len(values), dtype=torch.bool, device=values.device)
    counts = torch.tensor([count], device=values.device)
    return top_k_mask(values[None], everything, counts)[0]


def given(value: T | None) -> T:
    """A field that ``check`` found present, for the type checker."""
    if value is None:
        raise ValueError("a field of PruneInputs is missing; call Pruner.check first")
    return value


_CURES = {
    "question_attention": "a store gets it by the same `tprl encode` again with "
    "--question-attention, a picture without a store has none",
    "question_rows": "a store gets it by the same `tprl encode` again with --question-rows, a "
    "picture without a store has none",
    "relevance": "only the built-in scenes know it (`tprl list datasets`)",
    "cls_attention": "vision towers without a CLS token, such as SigLIP, have none",
}


def cure_for(missing: Sequence[str]) -> str:
    """What to do about fields of `PruneInputs` that are missing."""
    if "clip_text" in missing:
        return (
            "LLaVA checkpoints lack CLIP's text tower; give the field relevance='query', which "
            "compares the tokens with the question's token embeddings instead"
        )
    if missing == ["vision"]:
        return "give prune_inputs vision=lvlm.vision_signals, and a source that holds pictures"
    cures = [_CURES[name] for name in missing if name in _CURES]
    return "; ".join([*cures, "or take another method"]) if cures else "take another method"


def _tensor(array: Any) -> Tensor | None:
    """Stored array as float32; a copy, because stores hand out read-only memory."""
    return None if array is None else torch.from_numpy(np.array(array, dtype=np.float32))
