"""SparseVLM: text-guided cuts at three layers, with recycling; versions 1, 1.5 and 2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tprl_env.checks import check_choice
from tprl_env.reducers.interfaces import given
from tprl_env.reducers.layer.recycle import kept_and_recycled, recycle
from tprl_env.reducers.layer.schedule import at_depth, meet_average, merged_stages
from tprl_env.reducers.layer_pruner import Choice, LayerPruner, LayerView, Stage, Wants, attention
from tprl_env.reducers.selection import top_k_mask

VERSIONS = ("v1", "v1.5", "v2")
FULL = 576
LISTS: dict[str, dict[int, tuple[int, int, int]]] = {
    "v1": {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)},
    "v1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "v2": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""The authors' counts of 576 behind layers 2, 6 and 15, by the number they are named after."""


@dataclass(frozen=True)
class SparseVLM(LayerPruner):
    """Rank by the attention of the raters, the text that resembles the image most.

    Raters: softmax over the text behind the image of ``V T'`` before layer 0, mean over the visual
    tokens; words above the average rate. Behind layers 2, 6 and 15 of 32 the visual tokens are
    ranked by the raters' attention in that layer, mean over raters and heads.

    * v1 and v1.5 recycle: of the dropped, the best 30 % are clustered and the clusters' means go on
      behind the others. We count them in the budget, the authors add them on top. A mean stands at
      the place of its cluster's centre. v1.5 computes the raters' rows beside a fused attention,
      as everything does here, and has a list for 96 tokens.
    * v2 (SparseVLM+) keeps positions, merges nothing and takes only the heads whose text looks most
      at the image, 14 of 32. Our reading leaves out its "gravity correction", which divides
      the logits by a bias of the rotary distance: a rule here is shown rows behind the softmax.

    Between and beyond the authors' lists the shares of the tokens are interpolated. Their names do
    not count as this package does: the list called 192 has an average of (2 * 576 + 4 * 300
    + 10 * 200 + 16 * 110) / 32 = 191 if tokens left before layers 2, 6 and 16, and of 202.75 where
    the code drops them, before layers 3, 7 and 16.

    Attributes:
        version: "v1", "v1.5" or "v2"; published tables differ by which it is.
        layers: The cuts are before these layers.
        depth: Depth of the model that ``layers`` belong to; ``None`` takes them literally.
    """

    version: Literal["v1", "v1.5", "v2"] = "v1.5"
    layers: tuple[int, int, int] = (3, 7, 16)
    depth: int | None = 32

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = (
        "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, "
        "ICML 2025, arXiv 2410.04417"
    )
    larger_model: ClassVar[bool] = True
    heads: ClassVar[float] = 14 / 32

    def __post_init__(self) -> None:
        """Refuse another version.

        Raises:
            ValueError: There is no such version.
        """
        check_choice("version", self.version, VERSIONS)

    @property
    def label(self) -> str:
        """With the version, which every row of a table must print."""
        return f"{self.name} {self.version}"

    @property
    def positions(self) -> Literal["original", "contiguous"]:  # type: ignore[override]
        """Closed up in v1 and v1.5, kept in v2."""
        return "original" if self.version == "v2" else "contiguous"

    @property
    def merges(self) -> bool:  # type: ignore[override]
        """Whether dropped tokens are recycled."""
        return self.version != "v2"

    def stages(
        self, num_tokens: int, num_layers: int, average: float | None = None
    ) -> tuple[Stage, ...]:
        """A first stage before layer 0, where raters are found and nothing leaves, and the cuts."""
        layers = tuple(at_depth(self.layers, self.depth, num_layers, first=1))
        if average is None:
            counts = [round(num_tokens * count / FULL) for count in LISTS[self.version][192]]
            cuts = merged_stages(layers, counts)
        else:
            cuts = meet_average(self.label, layers, self._shares, num_tokens, num_layers, average)
        return (Stage(0, num_tokens), *cuts)

    def _shares(self, x: float) -> Sequence[float]:
        """Shares of the full image, linear between the authors' lists; x = 1 keeps all."""
        known = {0: (0.0, 0.0, 0.0), FULL: (1.0, 1.0, 1.0)}
        for name, counts in LISTS[self.version].items():
            known[name] = (counts[0] / FULL, counts[1] / FULL, counts[2] / FULL)
        names = sorted(known)
        wanted = x * FULL
        above = next(name for name in names if name >= wanted)
        below = max((name for name in names if name <= wanted), default=0)
        part = 0.0 if above == below else (wanted - below) / (above - below)
        return [
            low + part * (high - low) for low, high in zip(known[below], known[above], strict=True)
        ]

    def wants(self, stage: int) -> Wants:
        """States before layer 0, then rows of the text in the layer below."""
        if stage == 0:
            return Wants(hidden=True, text=True)
        return Wants("text", "previous", hidden=self.merges)

    def select(self, view: LayerView) -> Choice:
        """Find the raters, or rank by them."""
        if view.layer == 0:
            view.memory["raters"] = raters(view)
            return Choice(view.alive)
        scores = self.scores(view)
        if not self.merges:
            return Choice(top_k_mask(scores, view.alive, view.keep))
        return recycled_choice(view, scores)

    def scores(self, view: LayerView) -> Tensor:
        """(B, M): mean over raters and heads; in v2 over the heads that look most at the image."""
        rows = attention(view) * view.memory["raters"][:, None, :, None]
        per_head = rows.sum(2) / view.memory["raters"].sum(1).clamp(min=1)[:, None, None]
        if self.version != "v2":
            return per_head.mean(1)
        count = max(1, round(self.heads * per_head.shape[1]))
        best = per_head.sum(2).topk(count, dim=1).indices
        index = best[..., None].expand(-1, -1, per_head.shape[2])
        return per_head.gather(1, index).mean(1)


def raters(view: LayerView) -> Tensor:
    """Bool (B, W): text whose mean softmax of ``V T'`` is above the average of the text."""
    hidden, text = given(view.hidden).float(), given(view.text).float()
    valid = given(view.text_valid)
    alike = (hidden @ text.transpose(1, 2)).masked_fill(~valid[:, None], -torch.inf).softmax(2)
    alike = alike * view.alive[..., None]
    mean = alike.sum(1) / view.alive.sum(1).clamp(min=1)[:, None]
    average = mean.sum(1, keepdim=True) / valid.sum(1, keepdim=True)
    found = (mean > average) & valid
    # where all words are alike none is above the average: then all rate
    return torch.where(found.any(1, keepdim=True), found, valid)


def recycled_choice(view: LayerView, scores: Tensor) -> Choice:
    """Keep the best, and clusters of the dropped; ``view.keep`` counts both."""
    hidden = given(view.hidden)
    alive = view.alive.sum(1).tolist()
    plans = [kept_and_recycled(n, k) for n, k in zip(alive, view.keep.tolist(), strict=True)]
    counts = torch.tensor([kept for kept, _ in plans], device=scores.device)
    keep = top_k_mask(scores, view.alive, counts)
    behind = torch.zeros_like(view.alive)
    states = hidden.clone()
    dropped = view.alive & ~keep
    groups: dict[tuple[int, int], list[int]] = {}
    for row, (kept, recycled) in enumerate(plans):
        if recycled:
            groups.setdefault((alive[row] - kept, recycled), []).append(row)
    for (count, recycled), members in groups.items():
        rows = torch.tensor(members, device=scores.device)
        places = dropped[rows].nonzero()[:, 1].view(len(members), count)
        found, means = recycle(
            hidden[rows[:, None], places], scores[rows[:, None], places], recycled
        )
        centres = places.gather(1, found)
        keep[rows[:, None], centres] = True
        behind[rows[:, None], centres] = True
        states[rows[:, None], centres] = means
    return Choice(keep, states, behind)
