"""The interface of a reducer that works inside the language model.

A :class:`LayerPruner` is a schedule (before which decoder layers visual tokens leave, and how many
stay) and a rule on what such a layer offers. It never runs the model: the execution of
`tprl_env.lvlm` stops before each layer of the schedule, hands over a :class:`LayerView`, and drops
what the :class:`Choice` does not keep.

Layers are counted from 0; "before layer k" means that layer k and all later ones do not see what
was dropped. Average tokens are the visual tokens that ENTER each layer, mean over all layers.

Shapes: B samples, M visual tokens still alive (the most of the batch), N visual tokens of the full
image, H query heads, R rows, W words of text, D token width, d head width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tprl_env.reducers.interfaces import Knowledge, Reducer
from tprl_env.reducers.selection import top_k_mask

Rows = Literal["last", "question", "text"]
"""Whose attention: the prompt's last token, the question's words, all text behind the image."""

Source = Literal["own", "previous"]
"""The layer's own queries and keys on the states that enter it, or those of the layer below."""


@dataclass(frozen=True)
class Stage:
    """Tokens leave before one layer.

    Attributes:
        layer: The layer that no longer sees them.
        keep: Visual tokens that enter it.
    """

    layer: int
    keep: int


@dataclass(frozen=True)
class Wants:
    """What a rule looks at before a layer; nothing else is computed for it.

    A rule that reads neither rows nor text is asked once for all questions about one image, as
    long as these share their layers.

    Attributes:
        rows: Attention rows, or ``None``.
        source: Where the rows come from. "own" costs the layer's key projection once more and the
            queries of the rows; "previous" costs the rows alone. Attention outputs and the fused
            kernels are untouched by either.
        hidden: The visual tokens' states.
        text: The states of the text behind the image.
        vectors: The layer's own queries and keys of the visual tokens.
    """

    rows: Rows | None = None
    source: Source = "own"
    hidden: bool = False
    text: bool = False
    vectors: bool = False


@dataclass
class LayerView:
    """What a rule sees of a batch before one layer; padding comes last in every row.

    Attributes:
        stage: Number of the stage in the schedule.
        layer: The layer.
        num_layers: Decoder layers of the model.
        keep: int64 (B,), tokens that the schedule wants to stay, at most those alive.
        plan: int64 (B, stages), what it wants to stay in every stage.
        average: The average that was asked for; ``None`` for the authors' own schedule.
        alive: bool (B, M), False at padding.
        places: int64 (B, M), the place in the full image of each token, in sequence order.
        full: int64 (B,), visual tokens of the full image, those that always stay left out.
        rows: float32 (B, H, R, M), softmax over ALL places that the row's query sees, columns of
            the visual tokens; zero at padding.
        row_valid: bool (B, R).
        hidden: (B, M, D) states of the visual tokens.
        text: (B, W, D) states of the text behind the image.
        text_valid: bool (B, W).
        queries: (B, H, M, d) of the visual tokens, before the rotary turn.
        keys: (B, Hkv, M, d) of the visual tokens, before the rotary turn.
        turned_keys: (B, Hkv, M, d) after it.
        memory: Kept from stage to stage of one pass; a rule may leave tensors of B rows here.
    """

    stage: int
    layer: int
    num_layers: int
    keep: Tensor
    plan: Tensor
    alive: Tensor
    places: Tensor
    full: Tensor
    rows: Tensor | None = None
    row_valid: Tensor | None = None
    hidden: Tensor | None = None
    text: Tensor | None = None
    text_valid: Tensor | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    turned_keys: Tensor | None = None
    average: float | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Choice:
    """What stays.

    Attributes:
        keep: bool (B, M).
        states: (B, M, D) new states of the tokens that stay, where a method merges others into
            them; ``None`` leaves the states alone. A merged token stands at the place of the token
            whose entry it takes.
        behind: bool (B, M), tokens that go behind the other visual tokens (recycled ones).
    """

    keep: Tensor
    states: Tensor | None = None
    behind: Tensor | None = None


class LayerPruner(Reducer):
    """Chooses, before some decoder layers, the visual tokens that go on.

    It reads nothing of :class:`~tprl_env.reducers.interfaces.PruneInputs`, and its budget is an
    average over layers: :meth:`stages` checks it. "contiguous" positions are closed up after every
    stage.

    Attributes:
        merges: Whether tokens that stay take up others; ``lives`` then says how many tokens enter
            each layer, but replaying it drops without merging.
    """

    knowledge: ClassVar[Knowledge] = "heuristic"
    merges: ClassVar[bool] = False

    @property
    def _kind(self) -> str:
        return "reducer inside the language model"

    @property
    def label(self) -> str:
        """Name for tables; methods of several published versions add theirs."""
        return self.name

    @abstractmethod
    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """The schedule: ascending layers, which depend on ``num_layers`` alone.

        Args:
            num_tokens: Visual tokens of the full image.
            num_layers: Decoder layers of the model.
            average: Wanted mean over all layers of the visual tokens that enter a layer, met as
                closely as whole tokens allow; ``None`` for the authors' own schedule.

        Raises:
            ValueError: The average cannot be met; the message has the feasible range.
        """

    @abstractmethod
    def wants(self, stage: int) -> Wants:
        """What the rule looks at in a stage."""

    @abstractmethod
    def select(self, view: LayerView) -> Choice:
        """Choose; the view is not modified, except for its ``memory``."""


class RankingLayerPruner(LayerPruner):
    """A rule that gives every token a saliency and keeps the largest, ties by lowest place."""

    @abstractmethod
    def saliency(self, view: LayerView) -> Tensor:
        """Value per token, (B, M); larger is kept first."""

    def select(self, view: LayerView) -> Choice:
        """Keep ``view.keep`` tokens of every sample, or all where fewer are alive."""
        return Choice(top_k_mask(self.saliency(view), view.alive, view.keep))


@dataclass(frozen=True)
class OneCut(RankingLayerPruner):
    """The ranking of another method at one cut of one's choice: for maps of layers and counts.

    Attributes:
        rule: The method that ranks.
        layer: Before which layer tokens leave.
        keep: How many stay.
    """

    rule: RankingLayerPruner
    layer: int
    keep: int

    name: ClassVar[str] = "one_cut"

    def __post_init__(self) -> None:
        """Refuse what cannot be cut.

        Raises:
            ValueError: A method that does more than rank, a negative layer or count.
        """
        if not isinstance(self.rule, RankingLayerPruner):
            raise ValueError(
                f"{self.rule.label} does not rank the tokens of a layer alone; take a method that "
                "does, such as question_rows, fastv or pyramiddrop"
            )
        if self.layer < 0 or self.keep < 0:
            raise ValueError(f"layer and keep must be at least 0, got {self.layer}, {self.keep}")

    @property
    def label(self) -> str:
        """The rule's, with layer and count."""
        return f"{self.rule.label} before layer {self.layer}, {self.keep} kept"

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """The one stage.

        Raises:
            ValueError: No such layer, or an average was given.
        """
        if average is not None:
            raise ValueError(f"{self.label} has its count already; leave average {average:g} out")
        if self.layer >= num_layers:
            raise ValueError(
                f"layer must lie in [0, {num_layers - 1}], the decoder layers, got {self.layer}"
            )
        return (Stage(self.layer, min(self.keep, num_tokens)),)

    def wants(self, stage: int) -> Wants:
        """As the rule in its first stage."""
        return self.rule.wants(0)

    def saliency(self, view: LayerView) -> Tensor:
        """As the rule."""
        return self.rule.saliency(view)


def attention(view: LayerView) -> Tensor:
    """The rows of a view, (B, H, R, M), with invalid rows at zero.

    Raises:
        ValueError: The rule did not ask for rows.
    """
    if view.rows is None or view.row_valid is None:
        raise ValueError("this rule needs attention rows; ask for them in wants()")
    return view.rows * view.row_valid[:, None, :, None]


def mean_rows(view: LayerView) -> Tensor:
    """(B, M): mean over heads and valid rows."""
    rows = attention(view)
    count = view.row_valid.sum(1).clamp(min=1) if view.row_valid is not None else 1
    total: Tensor = rows.mean(1).sum(1) / torch.as_tensor(count)[:, None]
    return total


def rows_of_equal_counts(view: LayerView) -> Iterator[tuple[int, int, Tensor]]:
    """Samples that can be chosen for together: tokens alive, tokens to keep, and their rows."""
    groups: dict[tuple[int, int], list[int]] = {}
    counts = zip(view.alive.sum(1).tolist(), view.keep.tolist(), strict=True)
    for row, pair in enumerate(counts):
        groups.setdefault(pair, []).append(row)
    for (alive, keep), rows in groups.items():
        yield alive, keep, torch.tensor(rows, device=view.alive.device)
