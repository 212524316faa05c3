"""Assembling pruned prompts into one padded batch: ids, rotary positions, where tokens go.

Shapes: R sequences, L longest sequence of the batch, K kept visual tokens of all sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tprl_env.lvlm.protocol import Positions, Prompt


@dataclass(frozen=True)
class Layout:
    """Layout of a batch of sequences: ids, positions and the places of visual tokens.

    Attributes:
        ids: (R, L) int64 text ids; 0 at padding and visual tokens.
        positions: (R, L) int64 rotary positions, or (A, R, L) with several axes; 0 at padding.
        lengths: (R,) int64.
        kept: Per sequence, the indices of its kept visual tokens in the full image, ascending.
        visual_at: (K,) flat places in (R, L) of the kept tokens, sequence by sequence.
        left: Whether the padding is on the left.
        stands: Per sequence, the place in the full image that each kept token stands for; the
            same as ``kept`` unless tokens were merged.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    kept: list[npt.NDArray[np.int64]]
    visual_at: npt.NDArray[np.int64]
    left: bool
    stands: list[npt.NDArray[np.int64]]

    @property
    def padded_tokens(self) -> int:
        """Places of the batch that hold nothing."""
        return int(self.ids.size - self.lengths.sum())

    def valid(self) -> npt.NDArray[np.int64]:
        """(R, L) 1 outside padding, the library's two-dimensional attention mask."""
        place = np.arange(self.ids.shape[1])
        if self.left:
            place = place[::-1]
        return (place[None] < self.lengths[:, None]).astype(np.int64)

    def image(self) -> npt.NDArray[np.int64]:
        """(R, L) place in its full image of each visual token, -1 elsewhere."""
        places = np.full(self.ids.size, -1, np.int64)
        places[self.visual_at] = np.concatenate(self.stands)
        return places.reshape(self.ids.shape)


def layout(
    prompts: Sequence[Prompt],
    suffixes: Sequence[Sequence[int]],
    counts: Sequence[int],
    keep: Sequence[npt.NDArray[np.bool_]] | None,
    positions: Positions,
    left: bool = False,
    merged: Sequence[npt.NDArray[np.int64]] | None = None,
) -> Layout:
    """Lay out ``prompt with kept tokens + suffix`` for every row.

    Args:
        prompts: R prompts.
        suffixes: R sequences of ids that follow the prompt (may be empty).
        counts: R numbers of visual tokens of the full images.
        keep: R masks (count,), or ``None`` for all tokens. An empty selection is legal.
        positions: ``"original"`` leaves gaps where tokens were dropped; ``"contiguous"`` numbers
            what is left from zero.
        left: Pad on the left (for decoding) instead of on the right.
        merged: R arrays (m,), the place in the full image that each of m merged tokens stands for,
            in the order of the tokens; they replace all visual tokens, and ``keep`` must be None.

    Raises:
        ValueError: A mask has the wrong shape or type, ``positions`` is unknown, or a prompt has
            places for another number of visual tokens.
    """
    if positions not in ("original", "contiguous"):
        raise ValueError(f"positions must be 'original' or 'contiguous', got {positions!r}")
    if merged is None:
        kept = [_kept(keep[r] if keep is not None else None, n, r) for r, n in enumerate(counts)]
        stands = kept
    else:
        kept, stands = [np.arange(len(places)) for places in merged], list(merged)
    closed = positions == "contiguous"
    rows = [
        _Row(prompts[r], suffixes[r], counts[r], kept[r], stands[r], r, closed)
        for r in range(len(prompts))
    ]
    lengths = np.array([len(row.ids) for row in rows], np.int64)
    longest = int(lengths.max())
    axes = max(row.positions.shape[0] for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    places = np.zeros((axes, len(rows), longest), np.int64)
    visual_at = []
    for r, row in enumerate(rows):
        start = longest - len(row.ids) if left else 0
        stop = start + len(row.ids)
        ids[r, start:stop] = row.ids
        places[:, r, start:stop] = row.positions
        visual_at.append(r * longest + start + row.visual_at)
    return Layout(
        ids,
        places[0] if axes == 1 else places,
        lengths,
        [row.kept for row in rows],
        np.concatenate(visual_at),
        left,
        [row.stands for row in rows],
    )


class _Row:
    """One sequence: its ids, positions (A, length), and where its visual tokens are."""

    def __init__(
        self,
        prompt: Prompt,
        suffix: Sequence[int],
        count: int,
        kept: npt.NDArray[np.int64],
        stands: npt.NDArray[np.int64],
        row: int,
        contiguous: bool,
    ) -> None:
        where = prompt.placement
        runs = (count,) * len(prompt.visual_at) if where is None else where.runs
        if sum(runs) != count:
            raise ValueError(
                f"row {row}: the prompt has places for {sum(runs)} visual tokens in {len(runs)} "
                f"runs, got {count} tokens; make the prompt with prompt(question, visuals) from "
                f"the pictures whose tokens are given"
            )
        self.kept, self.stands, begins = _by_run(kept, stands, runs)
        text = (*prompt.ids, *suffix)
        length = len(text) - len(runs) + len(kept)
        offsets = np.arange(count)[None] if where is None else where.offsets
        extents = runs if where is None else where.extents
        self.ids = np.zeros(length, np.int64)
        self.positions = np.zeros((len(offsets), length), np.int64)
        visual_at = []
        place = at = before = 0  # in the sequence, in positions, in the text
        for number, stop in enumerate((*prompt.visual_at, len(text))):
            behind = place + stop - before
            self.ids[place:behind] = text[before:stop]
            self.positions[:, place:behind] = np.arange(at, at + stop - before)
            at, before, place = at + stop - before, stop + 1, behind
            if number < len(runs):
                mine = self.stands[begins[number] : begins[number + 1]]
                self.positions[:, place : place + len(mine)] = at + offsets[:, mine]
                visual_at.append(np.arange(place, place + len(mine)))
                at, place = at + extents[number], place + len(mine)
        self.visual_at = np.concatenate(visual_at) if visual_at else np.zeros(0, np.int64)
        if contiguous:
            self.positions = np.arange(length)[None]


def _by_run(
    kept: npt.NDArray[np.int64], stands: npt.NDArray[np.int64], runs: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], Sequence[int]]:
    """Kept tokens in the order of their runs, and where each run begins among them."""
    if len(runs) == 1:
        return kept, stands, (0, len(kept))
    of_run = np.searchsorted(np.cumsum(runs), stands, side="right")
    order = of_run.argsort(kind="stable")  # merged tokens come in an order of their own
    begins = np.searchsorted(of_run[order], np.arange(len(runs) + 1))
    return kept[order], stands[order], begins.tolist()


def check_context(plan: Layout, limit: int, new: int = 1, owner: Sequence[int] = ()) -> None:
    """Refuse sequences that reach beyond the places the language model was made for.

    Args:
        plan: The layout.
        limit: Places of the language model, ``max_position_embeddings``.
        new: Tokens that are to be written behind; the last one is never read.
        owner: Row of the request for each sequence, where they differ.

    Raises:
        ValueError: A sequence is too long; the message has both numbers.
    """
    reached = plan.positions if plan.positions.ndim == 2 else plan.positions.max(0)
    needed = reached.max(1) + new
    row = int(needed.argmax())
    if needed[row] > limit:
        raise ValueError(
            f"row {owner[row] if len(owner) else row}: prompt, visual tokens and answer need "
            f"{needed[row]} places, the language model has {limit} (max_position_embeddings); "
            f"ask a shorter question, about fewer or smaller pictures, or allow a shorter answer"
        )


def check_rows(
    prompts: Sequence[Prompt],
    tokens: Sequence[Any],
    keep: Any,
    answers: Any = None,
    placed: bool = False,
) -> None:
    """Refuse arguments that do not have one entry per prompt.

    Raises:
        ValueError: Lengths differ, a row has no answer or an empty one, or, where visual tokens
            must be ``placed``, a prompt does not say where its own stand.
    """
    for row, prompt in enumerate(prompts):
        if placed and prompt.placement is None:
            raise ValueError(
                f"row {row}: the prompt was made without its pictures, on which text and rotary "
                f"positions depend in this family; make it with prompt(question, visuals)"
            )
    given = {"tokens": tokens, "keep": keep, "answers": answers}
    for name, value in given.items():
        if value is not None and len(value) != len(prompts):
            raise ValueError(f"{name} has {len(value)} rows, expected {len(prompts)} as prompts")
    for row, accepted in enumerate(answers if answers is not None else ()):
        if not accepted or not all(accepted):
            raise ValueError(f"row {row} has an empty answer; pass ids ending with the end token")


def _kept(mask: npt.NDArray[np.bool_] | None, count: int, row: int) -> npt.NDArray[np.int64]:
    if mask is None:
        return np.arange(count)
    mask = np.asarray(mask)
    if mask.shape != (count,) or mask.dtype != np.bool_:
        raise ValueError(
            f"keep of row {row} must be bool of shape ({count},), one entry per visual token, "
            f"got {mask.dtype} of shape {mask.shape}"
        )
    return np.flatnonzero(mask)


def embed(plan: Layout, tokens: Sequence[Tensor], embedding: nn.Module) -> Tensor:
    """(R, L, D) input embeddings with the kept visual tokens in their places.

    Args:
        plan: The layout.
        tokens: Per sequence (n, D) or wider, all on the embedding's device and of its dtype.
            Tensors may be shared between sequences; only kept rows are copied.
        embedding: The language model's input embedding.
    """
    device = tokens[0].device
    hidden = embedding(torch.from_numpy(plan.ids).to(device))
    visual = _kept_rows(plan, tokens)
    hidden.view(-1, hidden.shape[-1]).index_copy_(
        0, torch.from_numpy(plan.visual_at).to(device), visual[:, : hidden.shape[-1]]
    )
    return hidden


def deep_levels(plan: Layout, tokens: Sequence[Tensor], width: int) -> tuple[Tensor, ...]:
    """(R, L, D) per DeepStack level: what is added behind the first layers, zero on text.

    Args:
        plan: The layout.
        tokens: Per sequence (n, D + levels * D).
        width: D.
    """
    visual = _kept_rows(plan, tokens)
    at = torch.from_numpy(plan.visual_at).to(visual.device)
    found = []
    for level in visual.split(width, 1)[1:]:
        dense = level.new_zeros(plan.ids.size, width).index_copy_(0, at, level)
        found.append(dense.view(*plan.ids.shape, width))
    return tuple(found)


def _kept_rows(plan: Layout, tokens: Sequence[Tensor]) -> Tensor:
    index = torch.from_numpy(np.concatenate(plan.kept)).to(tokens[0].device)
    parts = index.split([len(chosen) for chosen in plan.kept])
    return torch.cat([t.index_select(0, part) for t, part in zip(tokens, parts, strict=True)])


def on_device(
    tokens: Sequence[Any], device: torch.device, dtype: torch.dtype, width: int
) -> list[Tensor]:
    """Visual tokens, arrays or tensors (n, width), as tensors; each object is moved once.

    Raises:
        ValueError: An entry has another shape.
    """
    moved: dict[int, Tensor] = {}
    for item in tokens:
        if id(item) in moved:
            continue
        if item.ndim != 2 or item.shape[1] != width:
            raise ValueError(f"visual tokens must be (n, {width}), got {tuple(item.shape)}")
        frozen = isinstance(item, np.ndarray) and not item.flags.writeable
        moved[id(item)] = torch.as_tensor(item.copy() if frozen else item).to(device, dtype)
    return [moved[id(item)] for item in tokens]
