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
        positions: (R, L) int64 rotary positions; 0 at padding.
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
        ValueError: A mask has the wrong shape or type, or ``positions`` is unknown.
    """
    if positions not in ("original", "contiguous"):
        raise ValueError(f"positions must be 'original' or 'contiguous', got {positions!r}")
    if merged is None:
        kept = [_kept(keep[r] if keep is not None else None, n, r) for r, n in enumerate(counts)]
        stands = kept
    else:
        kept, stands = [np.arange(len(places)) for places in merged], list(merged)
    lengths = np.array(
        [len(p.ids) - 1 + len(k) + len(s) for p, k, s in zip(prompts, kept, suffixes, strict=True)],
        np.int64,
    )
    rows, longest = len(lengths), int(lengths.max())
    ids = np.zeros((rows, longest), np.int64)
    places = np.zeros((rows, longest), np.int64)
    visual_at = []
    for r, (prompt, suffix, count, chosen) in enumerate(
        zip(prompts, suffixes, counts, stands, strict=True)
    ):
        start = longest - int(lengths[r]) if left else 0
        stop = start + int(lengths[r])
        image, after = start + prompt.image_at, start + prompt.image_at + len(chosen)
        ids[r, start:image] = prompt.ids[: prompt.image_at]
        ids[r, after:stop] = (*prompt.ids[prompt.image_at + 1 :], *suffix)
        if positions == "original":
            places[r, start:image] = np.arange(prompt.image_at)
            places[r, image:after] = prompt.image_at + chosen
            places[r, after:stop] = prompt.image_at + count + np.arange(stop - after)
        else:
            places[r, start:stop] = np.arange(stop - start)
        visual_at.append(np.arange(r * longest + image, r * longest + after))
    return Layout(ids, places, lengths, kept, np.concatenate(visual_at), left, stands)


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
    needed = plan.positions.max(1) + new
    row = int(needed.argmax())
    if needed[row] > limit:
        raise ValueError(
            f"row {owner[row] if len(owner) else row}: prompt, visual tokens and answer need "
            f"{needed[row]} places, the language model has {limit} (max_position_embeddings); "
            f"ask a shorter question, or allow a shorter answer"
        )


def check_rows(
    prompts: Sequence[Prompt], tokens: Sequence[Any], keep: Any, answers: Any = None
) -> None:
    """Refuse arguments that do not have one entry per prompt.

    Raises:
        ValueError: Lengths differ, or a row has no answer or an empty one.
    """
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
        tokens: Per sequence (n, D), all on the embedding's device and of its dtype. Tensors
            may be shared between sequences; only kept rows are copied.
        embedding: The language model's input embedding.
    """
    device = tokens[0].device
    hidden = embedding(torch.from_numpy(plan.ids).to(device))
    index = torch.from_numpy(np.concatenate(plan.kept)).to(device)
    parts = index.split([len(chosen) for chosen in plan.kept])
    visual = torch.cat([t.index_select(0, part) for t, part in zip(tokens, parts, strict=True)])
    hidden.view(-1, hidden.shape[-1]).index_copy_(
        0, torch.from_numpy(plan.visual_at).to(device), visual
    )
    return hidden


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
