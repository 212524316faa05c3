"""Reading what a processor made: each prompt without padding, its pictures and visual tokens.

Nothing of the model is changed, and its vision tower runs once.

Shapes: B prompts, S places of the padded batch, L of one prompt, A rotary axes, n visual tokens of
one prompt, D token width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tprl_env.checks import did_you_mean
from tprl_env.lvlm.processed.placing import PLACES, Pictures, place

_PIXELS = "pixel_values"
_PER_PLACE = ("attention_mask", "labels", "mm_token_type_ids", "position_ids", "token_type_ids")
_OF_PICTURES = (
    *(_PIXELS, "image_sizes", "batch_num_images", "image_grid_thw", "pixel_attention_mask"),
    *("num_patches", "rows", "cols"),
)
_KNOWN = ("input_ids", *_PER_PLACE, *_OF_PICTURES)


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt of a batch, without its padding.

    Attributes:
        ids: (L,) int64.
        positions: (A, L) int64 rotary positions of the full prompt.
        more: (L,) arrays of what else the inputs hold for each place, by name.
        visual_at: (n,) places of the visual tokens in the prompt.
        tokens: (n, D), or (n, D + levels D) with DeepStack, on the model's device.
        pictures: Where they lie.
        first_picture: Number of its first picture in the batch.
    """

    ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    more: dict[str, npt.NDArray[np.int64]]
    visual_at: npt.NDArray[np.int64]
    tokens: Tensor
    pictures: Pictures
    first_picture: int

    @property
    def droppable(self) -> npt.NDArray[np.bool_]:
        """Bool (n,): tokens that show a place of a picture; newlines behind tiles do not."""
        parts = [one.droppable for one in self.pictures.placements]
        return np.concatenate(parts) if parts else np.zeros(0, bool)


def check_model(model: Any) -> None:
    """Refuse what is no model of the library of a known family, with its weights in reach.

    Raises:
        ValueError: It is something else.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in PLACES or not hasattr(model, "lm_head"):
        raise ValueError(
            f"prune takes a model such as AutoModelForImageTextToText.from_pretrained() gives, of "
            f"model_type {', '.join(PLACES)}; got {type(model).__name__} of model_type {kind!r}"
            f"{did_you_mean(str(kind), PLACES)}"
        )
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no mm_encoder_outputs; install transformers 5.17 or "
            f"later, and pass the model itself rather than a wrapper"
        )


@torch.no_grad()
def read(model: Any, inputs: Mapping[str, Any]) -> list[ReadPrompt]:
    """Read a batch.

    Args:
        model: One of the library's, see :func:`check_model`.
        inputs: What its processor made of texts and pictures; padded on either side.

    Raises:
        ValueError: There is no picture, or a video; something is unknown, missing or has another
            shape; placeholders and pictures do not fit together.
    """
    ids, valid = _check(inputs)
    bounds = [_bounds(row, number) for number, row in enumerate(valid)]
    prompts = [ids[number, start:stop] for number, (start, stop) in enumerate(bounds)]
    parts, levels = _encode(model, inputs)
    pictures = place(model, inputs, prompts, [len(part) for part in parts])
    tokens = torch.cat([torch.cat(parts), *levels], 1)
    positions = _positions(model, inputs, valid)
    image = int(model.config.image_token_id)
    more = {
        name: _plain(inputs[name], ids.shape, name)
        for name in ("labels", "mm_token_type_ids", "token_type_ids")
        if inputs.get(name) is not None
    }
    found, token, picture = [], 0, 0
    for number, (start, stop) in enumerate(bounds):
        at = np.flatnonzero(prompts[number] == image)
        found.append(
            ReadPrompt(
                ids=prompts[number],
                positions=positions[:, number, start:stop],
                more={name: value[number, start:stop] for name, value in more.items()},
                visual_at=at,
                tokens=tokens[token : token + len(at)],
                pictures=pictures[number],
                first_picture=picture,
            )
        )
        token, picture = token + len(at), picture + len(pictures[number].placements)
    return found


def _check(inputs: Mapping[str, Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """(B, S) ids, and which places are no padding."""
    given = {name for name, value in inputs.items() if value is not None}
    if videos := sorted(name for name in given if "video" in name or "second_per_grid" in name):
        raise ValueError(f"videos are not pruned yet, got {', '.join(videos)}; pass pictures only")
    if unknown := sorted(given - set(_KNOWN)):
        raise ValueError(
            f"prune does not know the inputs {', '.join(unknown)}; pass what the processor made "
            f"({', '.join(_KNOWN)}) and everything else to generate or the model itself"
        )
    if missing := [name for name in ("input_ids", _PIXELS) if name not in given]:
        raise ValueError(
            f"there is no {' and no '.join(missing)} among the inputs, got "
            f"{', '.join(sorted(given)) or 'nothing'}; pass what the processor made of text AND "
            f"pictures, as tensors (return_tensors='pt')"
        )
    if not all(torch.is_tensor(inputs[name]) for name in ("input_ids", _PIXELS)):
        raise ValueError(
            "the inputs must be tensors; call the processor with return_tensors='pt', and with "
            "padding=True for a batch"
        )
    ids = inputs["input_ids"]
    if ids.ndim != 2:
        raise ValueError(f"input_ids must have shape (batch, places), got {tuple(ids.shape)}")
    shape = tuple(ids.shape)
    mask = inputs.get("attention_mask")
    valid = np.ones(shape, np.int64) if mask is None else _plain(mask, shape, "attention_mask")
    return ids.cpu().numpy(), valid.astype(bool)


def _plain(value: Tensor, shape: tuple[int, ...], name: str) -> npt.NDArray[np.int64]:
    if not torch.is_tensor(value) or tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name} must be a tensor of the shape of input_ids, {tuple(shape)}, got "
            f"{tuple(getattr(value, 'shape', ()))}"
        )
    return value.cpu().numpy().astype(np.int64)


def _bounds(valid: npt.NDArray[np.bool_], number: int) -> tuple[int, int]:
    """First place of a prompt and the one behind its last."""
    places = np.flatnonzero(valid)
    if not len(places) or places[-1] - places[0] + 1 != len(places):
        raise ValueError(
            f"the attention_mask of prompt {number} must be 1 on one unbroken stretch, with "
            f"padding on one side; got {len(places)} ones"
        )
    return int(places[0]), int(places[-1]) + 1


def _encode(model: Any, inputs: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Tokens of each part that the library encodes, and all of them per DeepStack level."""
    get = model.base_model.get_image_features
    known = [name for name in inspect.signature(get).parameters if name != "kwargs"]
    wanted = {}
    for name in known:
        if (value := inputs.get(name)) is not None:
            moved = value.to(model.device) if torch.is_tensor(value) else value
            wanted[name] = moved.to(model.dtype) if name == _PIXELS else moved
    try:
        found = get(**wanted, return_dict=True)
    except TypeError as error:
        missing = sorted(set(known) & set(_OF_PICTURES) - set(wanted) - {"batch_num_images"})
        raise ValueError(
            f"the pictures cannot be encoded ({error}); pass all that the processor made, here "
            f"{', '.join(missing) or 'nothing'} is missing"
        ) from error
    width = found.pooler_output[0].shape[-1]
    parts = [part.reshape(-1, width) for part in found.pooler_output]
    deep = getattr(found, "deepstack_features", None) or ()
    return parts, [torch.cat([part.reshape(-1, width) for part in level]) for level in deep]


def _positions(
    model: Any, inputs: Mapping[str, Any], valid: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """(A, B, S) positions that the library would give the full prompts."""
    ids, given = inputs["input_ids"], inputs.get("position_ids")
    if given is not None:
        found = given if given.ndim == 3 else given[None]
        if found.shape[1:] != ids.shape or len(found) not in (1, 3):
            raise ValueError(
                f"position_ids must have the shape of input_ids, {tuple(ids.shape)}, or three "
                f"axes in front; got {tuple(given.shape)}"
            )
    elif hasattr(model.base_model, "get_rope_index"):
        mask = torch.from_numpy(valid.astype(np.int64)).to(ids.device)
        found = model.base_model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            image_grid_thw=inputs["image_grid_thw"].to(ids.device),
            attention_mask=mask,
        )[0]
    else:
        return (valid.cumsum(1) - 1).clip(min=0)[None]
    return found.cpu().numpy().astype(np.int64)
