"""Checks of what an Arrow file and a manifest say, before anything is read by their numbers.

A wrong offset makes pyarrow read outside of the mapped file, which ends the process; a wrong width
or count moves rows without a word. Both are found here from types, offsets and counts alone: the
values themselves are the checksums' business (`tprl verify`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.arrow import ArrowRows
from tprl_env.data.features.manifest import Manifest, StoreError
from tprl_env.data.features.placement import TILE_FIELDS

CURE = "encode the store again with resume=False"
HALVES, FLOATS, INTS = ("large_list<halffloat>",), ("large_list<float>",), ("int32",)
IMAGE_COLUMNS: dict[str, tuple[str, ...]] = {
    "image_id": ("string",),
    **dict.fromkeys(("count", "grid_rows", "grid_columns"), INTS),
    **dict.fromkeys(("tokens", "tower"), HALVES),
    "cls_attention": FLOATS,
    "picture": ("large_binary",),
    "more_pictures": ("list<large_binary>",),
    "box": ("list<float>",),
    "fixed": HALVES,
    **dict.fromkeys(("coords", "runs", "offsets", "extents"), ("large_list<int32>",)),
    "tiles": FLOATS,
    "placeholder": ("string",),
}
SAMPLE_COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("id", "kind", "metric", "question"), ("string",)),
    "image": ("int64",),
    "answers": ("list<string>",),
    "prompt_ids": ("large_list<int32>",),
    "visual_at": ("large_list<int32>",),
    "answer_ids": ("list<list<int32>>",),
    **dict.fromkeys(("image_at", "question_start", "question_stop", "question_tokens"), INTS),
    "query_tokens": HALVES,
    **dict.fromkeys(("query", "relevance"), FLOATS),
    **dict.fromkeys(("full_exact", "full_likelihood", "full_graded"), ("float",)),
}
VALUES = {"values": HALVES + FLOATS}
PLACES = ("fixed", "coords", "runs", "offsets", "extents", "tiles", "placeholder")
LATER = (
    "box",
    "visual_at",
    "more_pictures",
    "full_graded",
    *PLACES,
)  # columns that the first stores lack
OPTIONAL = ("tower", "cls_attention", "relevance", *LATER)  # null where there is none


def check_columns(
    where: Path, rows: ArrowRows, wanted: Mapping[str, tuple[str, ...]], cure: str = CURE
) -> None:
    """Compare the columns of every batch with those that the format has.

    Raises:
        StoreError: One is missing, of another type, or holds nulls where it must not.
    """
    for batch in rows.batches:
        names = _names(where, batch, wanted, cure)
        for name, types in wanted.items():
            place = batch.schema.get_field_index(name)
            if place < 0 and name in LATER and name not in names:
                continue
            if place < 0:
                raise StoreError(f"{where} is damaged: its rows have no {name!r}; {cure}")
            column = batch.column(place)
            found = _type_name(column.type)
            if found not in types:
                raise StoreError(
                    f"{where} is damaged: {name!r} must be {' or '.join(types)}, found {found}; "
                    f"{cure}"
                )
            if _nulls(column, name in OPTIONAL):
                raise StoreError(f"{where} is damaged: {name!r} has empty cells; {cure}")


def _names(where: Path, batch: Any, wanted: Mapping[str, object], cure: str) -> list[str]:
    """Names of a batch's columns: an unknown one may be the damaged name of one that is missed.

    Raises:
        StoreError: One is unknown.
    """
    try:
        names: list[str] = batch.schema.names
    except UnicodeDecodeError:
        names = ["a name that is no text"]
    for name in names:
        if name not in wanted:
            raise StoreError(f"{where} is damaged: its rows have {name!r}; {cure}")
    return names


def _type_name(kind: Any) -> str:
    """Name of an Arrow type without the names of its parts, which may be damaged."""
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        large = "large_" if types.is_large_list(kind) else ""
        return f"{large}list<{_type_name(kind.value_type)}>"
    return str(kind) if kind.num_fields == 0 else "a nested type"


def _nulls(column: Any, optional: bool) -> bool:
    """Whether a column, or a list inside it, has nulls."""
    if column.null_count and not optional:
        return True
    return hasattr(column, "values") and _nulls(column.values, optional=False)


def check_rows(folder: Path, manifest: Manifest, images: ArrowRows, samples: ArrowRows) -> None:
    """Compare the manifest's counts and widths with the rows.

    Raises:
        StoreError: They differ, or rows contradict each other.
    """
    _same(folder, "images", manifest.images, len(images))
    _same(folder, "samples", manifest.samples, len(samples))
    if not (len(images) and len(samples)):
        raise StoreError(f"{folder} is damaged: it holds no samples; {CURE}")
    check_columns(folder, images, IMAGE_COLUMNS)
    check_columns(folder, samples, SAMPLE_COLUMNS)
    counts, numbers = images.vector("count"), samples.vector("image")
    _good(folder, "counts of visual tokens", counts >= 1)
    _good(folder, "numbers of images", (numbers >= 0) & (numbers < len(images)))
    _same(folder, "max_tokens", manifest.max_tokens, int(counts.max()))
    questions = samples.vector("question_tokens")
    _good(folder, "counts of question tokens", questions >= 1)
    _same(folder, "max_question_tokens", manifest.max_question_tokens, int(questions.max()))
    prompts = samples.lengths("prompt_ids")
    start, stop = samples.vector("question_start"), samples.vector("question_stop")
    _good(folder, "places of the question", (start >= 0) & (start <= stop) & (stop <= prompts))
    place = samples.vector("image_at")
    _good(folder, "places of the image", (place >= 0) & (place < prompts))
    _check_placements(folder, manifest, images, samples)
    width, tower, query = manifest.token_width, manifest.tower_width, manifest.query_width
    per_sample = counts[numbers].astype(np.int64)
    for name, rows, expected, optional in (
        ("tokens", images, counts.astype(np.int64) * width, False),
        ("tower", images, counts.astype(np.int64) * tower, False),
        ("cls_attention", images, counts, True),
        ("query_tokens", samples, questions.astype(np.int64) * query, False),
        ("query", samples, np.full(len(samples), query), False),
        ("relevance", samples, per_sample, True),
    ):
        found = rows.lengths(name)
        _good(folder, f"lengths of {name}", (found == expected) | (optional & (found == 0)))
    for name in ("full_exact", "full_likelihood"):
        scores = samples.vector(name)
        _good(folder, f"values of {name}", (scores >= 0) & (scores <= 1))
    graded = samples.optional_numbers("full_graded")
    _good(folder, "values of full_graded", np.isnan(graded) | ((graded >= 0) & (graded <= 1)))


def _check_placements(
    folder: Path, manifest: Manifest, images: ArrowRows, samples: ArrowRows
) -> None:
    """Compare the lengths of placements with the tokens they are about."""
    counts, numbers = images.vector("count").astype(np.int64), samples.vector("image")
    width = manifest.token_width
    coords, fixed = images.list_lengths("coords"), images.list_lengths("fixed")
    whole = np.where(coords > 0, counts + fixed // max(width, 1), 0)
    _good(folder, "lengths of coords", coords == 3 * whole)
    _good(folder, "lengths of fixed", fixed % max(width, 1) == 0)
    _good(folder, "lengths of fixed", (coords > 0) | (fixed == 0))
    runs = images.list_lengths("runs")
    _good(folder, "lengths of runs", (runs > 0) == (coords > 0))
    _good(folder, "lengths of extents", images.list_lengths("extents") == runs)
    axes = images.list_lengths("offsets")
    _good(folder, "lengths of offsets", np.isin(axes, (0,)) | (axes == whole) | (axes == 3 * whole))
    _good(folder, "lengths of offsets", (axes > 0) == (coords > 0))
    _good(folder, "lengths of tiles", images.list_lengths("tiles") % TILE_FIELDS == 0)
    wanted = np.where(runs[numbers] > 1, runs[numbers], 0)
    _good(folder, "numbers of image placeholders", samples.list_lengths("visual_at") == wanted)


def _same(folder: Path, name: str, recorded: int, found: int) -> None:
    if recorded != found:
        raise StoreError(
            f"the manifest of {folder} says {name} {recorded}, its files hold {found}; {CURE}"
        )


def _good(folder: Path, name: str, good: npt.NDArray[np.bool_]) -> None:
    if not good.all():
        raise StoreError(
            f"{folder} is damaged: the {name} do not fit its manifest in "
            f"{int((~good).sum())} of {len(good)} rows, the first is row {int(good.argmin())}; "
            f"{CURE}"
        )


def check_channel(
    path: Path, rows: ArrowRows, width: int, counts: npt.NDArray[Any], cure: str
) -> None:
    """Compare a channel's rows with its width and the store's counts.

    Raises:
        StoreError: They differ.
    """
    check_columns(path, rows, VALUES, cure)
    if len(rows) != len(counts):
        raise StoreError(f"{path} holds {len(rows)} rows, its store has {len(counts)}; {cure}")
    if (rows.lengths("values") != counts.astype(np.int64) * max(width, 1)).any():
        raise StoreError(
            f"{path} is damaged: its rows do not hold {width or 1} numbers per token; {cure}"
        )
