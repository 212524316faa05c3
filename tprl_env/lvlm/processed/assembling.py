"""Shortened inputs for a plain model: ids, mask, positions and the visual tokens that are left.

The library takes visual tokens in place of pixels as ``mm_encoder_outputs``, in ``forward`` and
in ``generate``; nothing is patched.

Shapes: B prompts, S places of the shortened batch, A rotary axes, n visual tokens of a full
prompt, m of them left, D token width.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from tprl_env.lvlm.processed.reading import ReadPrompt
from tprl_env.reducers.interfaces import Positions

_ONE_TENSOR = ("internvl",)
"""Families whose ``get_image_features`` gives one tensor instead of a list of them."""

_ENCODED = "mm_encoder_outputs"
_IGNORED = -100
"""Label that the library's losses leave out."""


@dataclass(frozen=True)
class Left:
    """What a reducer left of one prompt's visual tokens.

    Attributes:
        places: (m,) int64, the place among the prompt's n tokens that each stands for.
        tokens: (m, D) in the order of ``places``.
    """

    places: npt.NDArray[np.int64]
    tokens: Tensor


@dataclass(frozen=True)
class _Encoded:
    """Visual tokens of a batch, from which each call gets an output of its own.

    ``generate`` repeats the tokens for its beams IN PLACE, so that the same object given to a
    second call would give rows each other's tokens. For the same reason there is one tensor per
    prompt, or one place per token: what is repeated must not cross prompts.
    """

    tokens: tuple[Tensor, ...]
    width: int
    one_tensor: bool

    def to(self, *where: Any, **more: Any) -> _Encoded:
        return replace(self, tokens=tuple(one.to(*where, **more) for one in self.tokens))

    def build(self) -> dict[str, Any]:
        levels = zip(*(one.split(self.width, 1) for one in self.tokens), strict=True)
        first, *deep = [list(level) for level in levels]
        fields: dict[str, Any] = {"pooler_output": first}
        if self.one_tensor:
            fields["pooler_output"] = torch.cat(first)[:, None]
        kind: Any = BaseModelOutputWithPooling
        if deep:
            kind, fields["deepstack_features"] = BaseModelOutputWithDeepstackFeatures, deep
        return {"image": kind(**fields)}


class PrunedInputs(UserDict[str, Any]):
    """Inputs for ``model(**inputs)`` and ``model.generate(**inputs)``, as often as wanted.

    A mapping with ``input_ids``, ``attention_mask``, ``position_ids``, ``mm_encoder_outputs``
    (absent where no token is left) and what else the processor's inputs held for each place.
    Padded on the left.

    Attributes:
        keep: Per prompt bool (n,): visual tokens of the full prompt, always-kept ones included,
            that are left; of merged tokens the places that they stand for.
        counts: Per prompt the visual tokens that are left.
    """

    def __init__(
        self, data: dict[str, Any], keep: list[npt.NDArray[np.bool_]], counts: list[int]
    ) -> None:
        super().__init__()
        self.data.update(data)
        self.keep, self.counts = keep, counts

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        return value.build() if isinstance(value, _Encoded) else value

    def to(self, *where: Any, **more: Any) -> Self:
        """Everything on another device; a floating-point type changes the visual tokens only."""
        moved = {}
        for name, value in self.data.items():
            if isinstance(value, _Encoded):
                moved[name] = value.to(*where, **more)
            else:
                kind = value.dtype
                moved[name] = value.to(*where, **more).to(kind)
        return type(self)(moved, self.keep, self.counts)


def assemble(
    model: Any, prompts: Sequence[ReadPrompt], left: Sequence[Left], positions: Positions
) -> PrunedInputs:
    """Inputs with fewer visual tokens.

    Args:
        model: The model that they are for.
        prompts: B full prompts.
        left: What is left of each.
        positions: ``"original"`` leaves each token its position in the full prompt,
            ``"contiguous"`` closes the gaps.
    """
    axes = len(prompts[0].positions)
    names = ["ids", *prompts[0].more]
    fill = {"ids": pad_id(model), "labels": _IGNORED}
    rows, tokens, keep = [], [], []
    for prompt, one in zip(prompts, left, strict=True):
        places, order = _order(prompt, one)
        row = {"ids": prompt.ids[places], **{k: v[places] for k, v in prompt.more.items()}}
        where = prompt.positions[:, places]
        if positions == "contiguous":
            where = np.broadcast_to(np.arange(len(places)), where.shape)
        rows.append((row, where))
        tokens.append(one.tokens[torch.from_numpy(order).to(one.tokens.device)])
        kept = np.zeros(len(prompt.visual_at), bool)
        kept[one.places] = True
        keep.append(kept)
    longest = max(len(row["ids"]) for row, _ in rows)
    shape = (len(rows), longest)
    arrays = {name: np.full(shape, fill.get(name, 0), np.int64) for name in names}
    valid, place = np.zeros(shape, np.int64), np.zeros((axes, *shape), np.int64)
    for number, (row, where) in enumerate(rows):
        start = longest - len(row["ids"])
        for name in names:
            arrays[name][number, start:] = row[name]
        valid[number, start:] = 1
        place[:, number, start:] = where
    more = {name: value for name, value in arrays.items() if name != "ids"}
    return with_tokens(model, arrays["ids"], valid, place, tokens, keep, more)


def with_tokens(
    model: Any,
    ids: npt.NDArray[np.int64],
    valid: npt.NDArray[np.int64],
    positions: npt.NDArray[np.int64],
    tokens: Sequence[Tensor],
    keep: Sequence[npt.NDArray[np.bool_]],
    more: dict[str, npt.NDArray[np.int64]] | None = None,
) -> PrunedInputs:
    """The same from a batch that is laid out already.

    Args:
        model: The model that they are for.
        ids: (B, S), image placeholders where visual tokens go.
        valid: (B, S), 0 at padding.
        positions: (A, B, S).
        tokens: Per prompt (m, D), or (m, D + levels D) with DeepStack.
        keep: See :class:`PrunedInputs`.
        more: (B, S) arrays that are passed on.
    """
    inner = model.base_model
    wants = 3 if hasattr(inner, "get_rope_index") else 1
    if wants > len(positions):  # closed-up positions are the same on all axes
        positions = np.broadcast_to(positions, (wants, *positions.shape[1:]))
    data = {
        "input_ids": ids,
        "attention_mask": valid,
        "position_ids": positions if wants > 1 else positions[0],
        **(more or {}),
    }
    result: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(model.device)
        for name, value in data.items()
    }
    counts = [len(one) for one in tokens]
    if sum(counts):
        width = int(model.get_input_embeddings().weight.shape[1])
        one_tensor = model.config.model_type in _ONE_TENSOR
        moved = tuple(one.to(model.device, model.dtype) for one in tokens)
        result[_ENCODED] = _Encoded(moved, width, one_tensor)
    return PrunedInputs(result, list(keep), counts)


def pad_id(model: Any) -> int:
    """An id for padding places that is no image placeholder."""
    text = model.config.get_text_config()
    found = getattr(text, "pad_token_id", None)
    image = int(model.config.image_token_id)
    return int(found) if found is not None and int(found) != image else int(image == 0)


def _order(prompt: ReadPrompt, left: Left) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Places of the full prompt in the new order, and the order of the tokens that are left.

    Tokens stay in the run of placeholders that their place is in, and come in the given order
    there: mergers have orders of their own.
    """
    at = prompt.visual_at
    text = np.setdiff1d(np.arange(len(prompt.ids)), at)
    begins = np.concatenate([[True], np.diff(at) > 1]) if len(at) else np.zeros(0, bool)
    starts = at[np.maximum.accumulate(np.where(begins, np.arange(len(at)), 0))]
    keys = np.concatenate([text, starts[left.places]])
    order = keys.argsort(kind="stable")
    places = np.concatenate([text, at[left.places]])[order]
    return places, order[order >= len(text)] - len(text)
