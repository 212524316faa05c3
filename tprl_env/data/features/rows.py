"""Rows of a feature store and the Arrow batches they become; the last check of every value."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.arrow import ArrowRows, list_column
from tprl_env.data.features.manifest import CURE, StoreError
from tprl_env.data.features.placement import TILE_FIELDS, Placement, StoredVisual
from tprl_env.data.features.source import Box
from tprl_env.data.sample import Sample

if TYPE_CHECKING:
    import pyarrow as pa

_PNG_LEVEL = 1  # five times faster than the default for a tenth more bytes
_ROUNDING = 1e-5  # a product of probabilities may exceed 1 by this much


@dataclass(frozen=True)
class ImageRow:
    """One encoded image.

    Attributes:
        image_id: Its id.
        picture: ``(H, W, 3)`` uint8.
        tokens: ``(n, D)``, any float type; stored as float16.
        tower: ``(n, Dv)`` or None; stored as float16.
        cls_attention: ``(n,)`` or None; stored as float32.
        grid: Rows and columns of the token grid.
        box: Part of the picture that the grid covers; None for all of it.
        placement: Where the tokens stand; None for one grid at consecutive positions. ``tokens``
            are the droppable ones then, and ``fixed`` the others, in the placement's order.
        fixed: ``(m, D)`` tokens that are always kept, or None; stored as float16.
        placeholder: Text that stands for the image in a prompt; empty for the placeholder alone.
        more_pictures: The pictures behind the first, where the image is a set of pictures.
    """

    image_id: str
    picture: npt.NDArray[np.uint8]
    tokens: npt.NDArray[Any]
    tower: npt.NDArray[Any] | None
    cls_attention: npt.NDArray[Any] | None
    grid: tuple[int, int]
    box: Box | None = None
    placement: Placement | None = None
    fixed: npt.NDArray[Any] | None = None
    placeholder: str = ""
    more_pictures: Sequence[npt.NDArray[np.uint8]] = ()


@dataclass(frozen=True)
class SampleRow:
    """One encoded question.

    Attributes:
        sample: The sample.
        image: Number of its image.
        prompt_ids: Prompt with one image placeholder per run of visual tokens, ``(P,)``.
        visual_at: Places of the placeholders.
        question_span: Where the question's text starts and stops.
        answer_ids: Token ids of each answer.
        query_tokens: ``(Q, d_q)``; stored as float16.
        exact: Full-token exact score.
        likelihood: Full-token likelihood score.
        graded: Full-token score of the written answer by the sample's grader, or None.
    """

    sample: Sample
    image: int
    prompt_ids: Sequence[int]
    visual_at: Sequence[int]
    question_span: tuple[int, int]
    answer_ids: Sequence[Sequence[int]]
    query_tokens: npt.NDArray[Any]
    exact: float
    likelihood: float
    graded: float | None = None


def image_batch(rows: Sequence[ImageRow]) -> pa.RecordBatch:
    """Build the Arrow batch of some images.

    Raises:
        StoreError: Values are not finite in float16 or shapes disagree; the image is named.
    """
    import pyarrow as pa

    tokens, towers, attention, fixed = [], [], [], []
    for row in rows:
        name = f"image {row.image_id!r}"
        tokens.append(_half(row.tokens, f"{name}: tokens", rank=2))
        count = len(tokens[-1])
        towers.append(None if row.tower is None else _half(row.tower, f"{name}: tower", 2, count))
        fixed.append(None if row.fixed is None else _half(row.fixed, f"{name}: fixed", rank=2))
        attention.append(
            None
            if row.cls_attention is None
            else _checked(row.cls_attention, np.float32, f"{name}: cls_attention", 1, count)
        )
    return pa.record_batch(
        {
            "image_id": pa.array([row.image_id for row in rows], pa.string()),
            "count": pa.array([len(t) for t in tokens], pa.int32()),
            "grid_rows": pa.array([row.grid[0] for row in rows], pa.int32()),
            "grid_columns": pa.array([row.grid[1] for row in rows], pa.int32()),
            "tokens": list_column(tokens, np.float16),
            "tower": list_column(towers, np.float16),
            "cls_attention": list_column(attention, np.float32),
            # absent from the first stores
            "box": pa.array([row.box for row in rows], pa.list_(pa.float32())),
            "picture": pa.array([_png(row.picture) for row in rows], pa.large_binary()),
            "more_pictures": pa.array(
                [[_png(one) for one in row.more_pictures] or None for row in rows],
                pa.list_(pa.large_binary()),
            ),
            "fixed": list_column(fixed, np.float16),
            **_placement_columns(rows),
        }
    )


def _placement_columns(rows: Sequence[ImageRow]) -> dict[str, Any]:
    """Null where an image is one grid at consecutive positions."""
    import pyarrow as pa

    places = [row.placement for row in rows]

    def column(name: str, dtype: npt.DTypeLike) -> pa.LargeListArray:
        found = [None if place is None else getattr(place, name) for place in places]
        return list_column([None if f is None else np.asarray(f) for f in found], dtype)

    return {
        **{name: column(name, np.int32) for name in ("coords", "runs", "offsets", "extents")},
        "tiles": column("tiles", np.float32),
        "placeholder": pa.array([row.placeholder or None for row in rows], pa.string()),
    }


def read_visual(images: ArrowRows, image: int, width: int) -> StoredVisual:
    """A stored image's tokens in the order of the sequence, those that are always kept included.

    Raises:
        StoreError: The row's placement contradicts its tokens.
    """
    tokens = images.view("tokens", image).reshape(-1, width)
    grid = images.value("grid_rows", image), images.value("grid_columns", image)
    if images.optional("coords", image) is None:
        return StoredVisual(tokens, grid)
    placement = read_placement(images, image)
    shown = placement.droppable
    fixed = images.view("fixed", image).reshape(-1, width)
    if (int(shown.sum()), int((~shown).sum())) != (len(tokens), len(fixed)):
        raise StoreError(
            f"image {images.value('image_id', image)!r} holds {len(tokens)} + {len(fixed)} tokens "
            f"where its placement has {int(shown.sum())} + {int((~shown).sum())}; {CURE}"
        )
    whole = tokens
    if len(fixed):
        whole = np.empty((len(shown), width), tokens.dtype)
        whole[shown], whole[~shown] = tokens, fixed
    return StoredVisual(whole, grid, placement, images.value("placeholder", image) or "")


def read_placement(images: ArrowRows, image: int) -> Placement:
    """The placement of an image that has one.

    Raises:
        StoreError: Its parts do not fit together.
    """

    def column(name: str) -> npt.NDArray[np.int64]:
        return images.view(name, image).astype(np.int64)

    try:
        coords = column("coords").reshape(-1, 3)
        tiles = images.view("tiles", image).reshape(-1, TILE_FIELDS)
        return Placement(
            coords,
            tuple(column("runs").tolist()),
            column("offsets").reshape(-1, len(coords)),
            tuple(column("extents").tolist()),
            tiles if len(tiles) else None,
        )
    except ValueError as error:
        raise StoreError(
            f"the placement of image {images.value('image_id', image)!r} is damaged ({error}); "
            f"{CURE}"
        ) from error


def sample_batch(rows: Sequence[SampleRow], counts: Sequence[int]) -> pa.RecordBatch:
    """Build the Arrow batch of some samples; ``counts`` are the visual tokens of each.

    Raises:
        StoreError: A query, relevance or score is not finite or has the wrong shape; the
            sample is named.
    """
    import pyarrow as pa

    queries, means, relevance = [], [], []
    for row, count in zip(rows, counts, strict=True):
        name = f"sample {row.sample.id!r}"
        queries.append(_half(row.query_tokens, f"{name}: query_tokens", rank=2))
        means.append(queries[-1].astype(np.float32).mean(axis=0))
        given = row.sample.relevance
        relevance.append(
            None if given is None else _checked(given, np.float32, f"{name}: relevance", 1, count)
        )
        graded = 0.0 if row.graded is None else row.graded
        named = {"exact": row.exact, "likelihood": row.likelihood, "graded": graded}
        for label, score in named.items():
            if not 0.0 <= score <= 1.0 + _ROUNDING:
                raise StoreError(f"{name}: full {label} score must be in [0, 1], got {score}")
    samples = [row.sample for row in rows]
    strings, ids = pa.string(), pa.list_(pa.list_(pa.int32()))
    return pa.record_batch(
        {
            "id": pa.array([s.id for s in samples], strings),
            "image": pa.array([row.image for row in rows], pa.int64()),
            # the names of the first stores, so that those still open
            "kind": pa.array([s.question_type for s in samples], strings),
            "metric": pa.array([s.grader for s in samples], strings),
            "question": pa.array([s.question for s in samples], strings),
            "answers": pa.array([list(s.answers) for s in samples], pa.list_(strings)),
            "prompt_ids": list_column([np.asarray(r.prompt_ids) for r in rows], np.int32),
            # the first of several placeholders, which alone the first stores know
            "image_at": pa.array([row.visual_at[0] for row in rows], pa.int32()),
            "visual_at": list_column(
                [np.array(r.visual_at) if len(r.visual_at) > 1 else None for r in rows], np.int32
            ),
            "question_start": pa.array([row.question_span[0] for row in rows], pa.int32()),
            "question_stop": pa.array([row.question_span[1] for row in rows], pa.int32()),
            "answer_ids": pa.array([[list(a) for a in r.answer_ids] for r in rows], ids),
            "question_tokens": pa.array([len(q) for q in queries], pa.int32()),
            "query_tokens": list_column(queries, np.float16),
            "query": list_column(means, np.float32),
            "relevance": list_column(relevance, np.float32),
            "full_exact": pa.array([min(r.exact, 1.0) for r in rows], pa.float32()),
            "full_likelihood": pa.array([min(r.likelihood, 1.0) for r in rows], pa.float32()),
            "full_graded": pa.array([r.graded for r in rows], pa.float32()),
        }
    )


def _checked(
    values: npt.ArrayLike, dtype: npt.DTypeLike, name: str, rank: int, count: int | None = None
) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        array = np.asarray(values).astype(dtype)
    if array.ndim != rank or len(array) == 0 or (count is not None and len(array) != count):
        expected = f"{count} tokens" if count is not None else "at least one token"
        raise StoreError(f"{name} has shape {array.shape}; expected rank {rank} and {expected}")
    if not np.isfinite(array).all():
        raise StoreError(
            f"{name} has values that are not finite in {np.dtype(dtype)}; "
            f"check the LVLM and the image"
        )
    return array


def _half(
    values: npt.ArrayLike, name: str, rank: int, count: int | None = None
) -> npt.NDArray[np.float16]:
    return _checked(values, np.float16, name, rank, count)


def _png(picture: npt.NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=_PNG_LEVEL)
    return buffer.getvalue()
