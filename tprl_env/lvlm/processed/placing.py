"""Where the tokens of a processor's pictures lie, by family, from the processor's output alone.

Shapes: n placeholders of one prompt, T tiles of one picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.placement import Placement, raster, tile_row
from tprl_env.lvlm.families import anyres, qwen_vl

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Pictures:
    """The pictures of one prompt.

    Attributes:
        placements: Where the tokens of each lie, in order.
        areas_known: Whether the placements say which part of its picture each token shows; not
            where a processor does not say how it cut a picture into tiles.
    """

    placements: tuple[Placement, ...]
    areas_known: bool = True

    @property
    def counts(self) -> list[int]:
        """Tokens of each picture."""
        return [len(one.coords) for one in self.placements]


Place = Callable[[Any, Mapping[str, Any], Sequence[Ids], Sequence[int]], list[Pictures]]
"""From the model, the inputs, each prompt's ids and the lengths of the parts that the library
encodes (pictures; tiles; or all pictures of a prompt) to the pictures of each prompt."""


def place(
    model: Any, inputs: Mapping[str, Any], prompts: Sequence[Ids], parts: Sequence[int]
) -> list[Pictures]:
    """The pictures of each prompt.

    Args:
        model: One of the library's.
        inputs: What its processor made.
        prompts: Ids of each prompt, without padding.
        parts: Tokens of each part that ``get_image_features`` gave.

    Raises:
        ValueError: Placeholders and pictures do not fit together.
    """
    image = int(model.config.image_token_id)
    placeholders = [int((ids == image).sum()) for ids in prompts]
    if sum(placeholders) != sum(parts):
        raise ValueError(
            f"the prompts have {placeholders} image placeholders, {sum(placeholders)} together, "
            f"but the pictures make {sum(parts)} visual tokens; pass what ONE call of the "
            f"checkpoint's own processor made of text and pictures, not truncated"
        )
    found = PLACES[model.config.model_type](model, inputs, prompts, parts)
    for number, (pictures, wanted) in enumerate(zip(found, placeholders, strict=True)):
        if sum(pictures.counts) != wanted:
            raise _misfit(number, wanted, pictures.counts)
    return found


def _misfit(prompt: int, placeholders: int, counts: Sequence[int]) -> ValueError:
    return ValueError(
        f"prompt {prompt} has {placeholders} image placeholders, but its pictures make "
        f"{list(counts)} visual tokens; pass what ONE call of the checkpoint's own processor made "
        f"of text and pictures, not truncated"
    )


def _by_prompt(
    model: Any, prompts: Sequence[Ids], pictures: Sequence[Placement], known: bool = True
) -> list[Pictures]:
    """Give pictures to the prompts whose placeholders they fill, in order."""
    image, at, found = int(model.config.image_token_id), 0, []
    ends = list(accumulate((len(one.coords) for one in pictures), initial=0))
    for number, ids in enumerate(prompts):
        wanted = int((ids == image).sum())
        stop = at
        while stop < len(pictures) and ends[stop] - ends[at] < wanted:
            stop += 1
        if ends[stop] - ends[at] != wanted:
            raise _misfit(number, wanted, [len(one.coords) for one in pictures[at:stop]])
        found.append(Pictures(tuple(pictures[at:stop]), known))
        at = stop
    return found


def _llava(
    model: Any, inputs: Mapping[str, Any], prompts: Sequence[Ids], parts: Sequence[int]
) -> list[Pictures]:
    """One grid per picture."""
    patch = int(model.config.vision_config.patch_size)
    height, width = (int(size) // patch for size in inputs["pixel_values"].shape[-2:])
    one = Placement.in_line(raster(height, width))
    return _by_prompt(model, prompts, [one] * len(parts))


def _anyres(
    model: Any, inputs: Mapping[str, Any], prompts: Sequence[Ids], parts: Sequence[int]
) -> list[Pictures]:
    """The whole picture and its tiles.

    LLaVA-OneVision sees the whole pictures alone where a prompt has more than one.
    """
    sizes, groups = inputs["image_sizes"].cpu(), inputs.get("batch_num_images")
    alone = [True] * len(sizes)
    if groups is not None:
        alone = [int(n) == 1 for n in groups for _ in range(int(n))]
    tower = model.config.vision_config
    side = int(tower.image_size) // int(tower.patch_size)
    newline = np.full((1, 3), -1, np.int64)
    whole = Placement.in_line(np.concatenate([raster(side, side), newline]))
    pictures = [
        anyres.place(model, {"image_sizes": sizes[i : i + 1]}, "")[0] if cut else whole
        for i, cut in enumerate(alone)
    ]
    return _by_prompt(model, prompts, pictures)


def _qwen(
    model: Any, inputs: Mapping[str, Any], prompts: Sequence[Ids], parts: Sequence[int]
) -> list[Pictures]:
    """One grid of any size per picture."""
    grids = inputs["image_grid_thw"].cpu()
    pictures = [
        qwen_vl.place(model, {"image_grid_thw": grids[i : i + 1]}, "")[0] for i in range(len(grids))
    ]
    return _by_prompt(model, prompts, pictures)


def _internvl(
    model: Any, inputs: Mapping[str, Any], prompts: Sequence[Ids], parts: Sequence[int]
) -> list[Pictures]:
    """Square tiles, a thumbnail last; each run of placeholders is a picture.

    The processor does not hand out how many rows and columns of tiles there are, and as many
    tiles may lie side by side or upon each other.
    """
    each, found = parts[0], []
    side = round(each**0.5)
    for number, ids in enumerate(prompts):
        lengths = [stop - start for start, stop in _runs(ids, int(model.config.image_token_id))]
        if any(length % each for length in lengths):
            raise ValueError(
                f"prompt {number} has runs of {lengths} image placeholders, but a tile has {each} "
                f"tokens; pass the processor's inputs as they are, not truncated"
            )
        pictures = [
            Placement.in_line(
                np.concatenate([raster(side, side, tile) for tile in range(length // each)])
            )
            for length in lengths
        ]
        found.append(Pictures(tuple(pictures), all(length == each for length in lengths)))
    return found


def _smolvlm(
    model: Any, inputs: Mapping[str, Any], prompts: Sequence[Ids], parts: Sequence[int]
) -> list[Pictures]:
    """Tiles behind texts that name them; read from those texts."""
    return [_named_tiles(model, ids, number) for number, ids in enumerate(prompts)]


def _named_tiles(model: Any, ids: Ids, number: int) -> Pictures:
    """The pictures of one prompt: each ends with the run behind the name of the whole picture.

    In front of each run stand two tokens, a mark and a name. A row of tiles ends in a line break,
    so more than two tokens stand in front of the next row, and of the whole picture.
    """
    runs = _runs(ids, int(model.config.image_token_id))
    if not runs:
        return Pictures(())
    mark, whole = ids[max(runs[-1][0] - 2, 0)], ids[runs[-1][0] - 1]
    tower = model.config.vision_config
    side = int(tower.image_size) // int(tower.patch_size) // int(model.config.scale_factor)
    pictures: list[Placement] = []
    first = 0
    for last, (start, _) in enumerate(runs):
        if ids[start - 1] != whole:
            continue
        mine = runs[first : last + 1]
        breaks = [i for i in range(1, len(mine)) if mine[i][0] - mine[i - 1][1] > 2]
        columns = breaks[0] if breaks else 0
        fits = breaks == [columns * (row + 1) for row in range(len(breaks))]
        named = all(begin > 1 and ids[begin - 2] == mark for begin, _ in mine)
        sizes = {stop - begin for begin, stop in mine}
        if not (fits and named and sizes == {side * side} and len(mine) == (breaks or [0])[-1] + 1):
            raise ValueError(
                f"prompt {number}: the texts between its tiles do not tell their rows and columns "
                f"({len(mine)} runs of {sorted(sizes)} placeholders, line breaks before runs "
                f"{breaks}); pass the processor's inputs as they are, not truncated"
            )
        coords = np.concatenate([raster(side, side, tile) for tile in range(len(mine))])
        table = np.concatenate([tile_row(len(breaks), columns, side), tile_row(1, 1, side)])
        pictures.append(Placement.in_line(coords, [side * side] * len(mine), table))
        first = last + 1
    return Pictures(tuple(pictures))


def _runs(ids: Ids, image: int) -> list[tuple[int, int]]:
    """(first, behind) of each run of placeholders."""
    inside = np.concatenate([[False], ids == image, [False]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(inside)).reshape(-1, 2)
    return [(int(start), int(stop)) for start, stop in edges]


PLACES: Mapping[str, Place] = {
    "llava": _llava,
    "llava_next": _anyres,
    "llava_onevision": _anyres,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "internvl": _internvl,
    "smolvlm": _smolvlm,
    "idefics3": _smolvlm,
}
"""By ``model_type``: the families whose inputs can be pruned."""
