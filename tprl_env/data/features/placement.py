"""Where visual tokens stand: in their pictures, and in the sequence of the language model.

Shapes: n visual tokens, A rotary axes, T tiles or frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TILE_FIELDS = 7
"""Picture, top, left, bottom, right (shares of the picture), rows and columns of tokens."""


PICTURE_BREAK = "\x1e"
"""Between the texts of the pictures of a set; no tokenizer's vocabulary is written with it."""


@dataclass(frozen=True)
class Placement:
    """Where visual tokens stand: in their pictures, and in the sequence.

    The placeholders of a prompt form runs, one per picture in most families, one per tile in some.

    Attributes:
        coords: (n, 3) int64 tile or frame, row and column in it; -1 for a token that shows no
            place of the picture, such as the newline behind a row of tiles.
        runs: Tokens of each run, in order; their sum is n.
        offsets: (A, n) int64 rotary positions from their run's first place; A is 1, or 3 where the
            language model has axes for time, row and column.
        extents: Positions by which the text behind each run moves on.
        tiles: (T, 7) float32, per tile its picture's number, the part of that picture that it
            shows (top, left, bottom, right, 0 to 1, beyond where it is padded) and its rows and
            columns of tokens; ``None`` where every tile shows all of one picture.
    """

    coords: npt.NDArray[np.int64]
    runs: tuple[int, ...]
    offsets: npt.NDArray[np.int64]
    extents: tuple[int, ...]
    tiles: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            ValueError: Counts differ.
        """
        count = len(self.coords)
        fits = self.coords.shape == (count, 3) and self.offsets.shape[1:] == (count,)
        if not fits or sum(self.runs) != count or len(self.extents) != len(self.runs):
            raise ValueError(
                f"a placement needs coords (n, 3), offsets (axes, n), runs that add up to n and an "
                f"extent per run; got {self.coords.shape}, {self.offsets.shape}, {self.runs} and "
                f"{self.extents}"
            )
        last = int(self.coords[:, 0].max(initial=-1))
        if self.tiles is not None and (self.tiles.shape[1:] != (7,) or len(self.tiles) <= last):
            raise ValueError(
                f"a placement needs tiles ({last + 1} or more, 7), got {self.tiles.shape}"
            )

    @property
    def droppable(self) -> npt.NDArray[np.bool_]:
        """Bool (n,): tokens that show a place of the picture; the others are always kept."""
        shown: npt.NDArray[np.bool_] = self.coords[:, 0] >= 0
        return shown

    @property
    def tile_table(self) -> npt.NDArray[np.float32]:
        """(T, 7) as ``tiles``, made from the coordinates where there is none."""
        if self.tiles is not None:
            return self.tiles
        shown = self.coords[self.droppable]
        whole = [0.0, 0.0, 0.0, 1.0, 1.0]
        found = [shown[shown[:, 0] == tile] for tile in range(int(shown[:, 0].max(initial=-1)) + 1)]
        table = [[*whole, *(one[:, 1:].max(0, initial=0) + 1)] for one in found]
        return np.array(table, np.float32).reshape(-1, TILE_FIELDS)

    def areas(self) -> npt.NDArray[np.float32]:
        """(m, 5) of the m droppable tokens: picture, top, left, bottom, right, shares of it."""
        return token_areas(self.coords[self.droppable], self.tile_table)

    @classmethod
    def in_line(
        cls,
        coords: npt.NDArray[np.int64],
        runs: Sequence[int] | None = None,
        tiles: npt.NDArray[np.float32] | None = None,
    ) -> Placement:
        """Tokens at consecutive positions, in one run unless ``runs`` says otherwise."""
        given = (len(coords),) if runs is None else tuple(runs)
        offsets = np.concatenate([np.arange(run) for run in given]) if given else np.zeros(0, int)
        return cls(coords, given, offsets[None], given, tiles)

    @classmethod
    def joined(cls, parts: Sequence[Placement]) -> Placement:
        """The placements of a prompt's pictures, in order; tiles and pictures are counted on."""
        coords, tables, count, pictures = [], [], 0, 0
        for part in parts:
            moved = part.coords.copy()
            moved[part.droppable, 0] += count
            coords.append(moved)
            table = part.tile_table.copy()
            table[:, 0] += pictures
            tables.append(table)
            count += len(table)
            pictures = int(table[:, 0].max(initial=pictures - 1)) + 1
        return cls(
            np.concatenate(coords),
            tuple(run for part in parts for run in part.runs),
            np.concatenate([part.offsets for part in parts], 1),
            tuple(extent for part in parts for extent in part.extents),
            np.concatenate(tables) if len(parts) > 1 else parts[0].tiles,
        )


class Pictured(Protocol):
    """What a prompt must know of a picture."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns, or (1, n)."""
        ...

    @property
    def placement(self) -> Placement | None:
        """Where the tokens stand; ``None`` for one grid at consecutive positions."""
        ...

    @property
    def placeholder(self) -> str:
        """Text that stands for the picture; empty for the placeholder alone.

        Of a set of pictures their texts, with :data:`PICTURE_BREAK` between them.
        """
        ...


@dataclass(frozen=True)
class StoredVisual:
    """A picture's tokens as arrays, those that are always kept included.

    Attributes:
        tokens: (n, D).
        grid: Rows and columns, or (1, n).
        placement: As of ``Visual``.
        placeholder: As of ``Visual``.
    """

    tokens: npt.NDArray[Any]
    grid: tuple[int, int]
    placement: Placement | None = None
    placeholder: str = ""

    @property
    def droppable(self) -> npt.NDArray[np.bool_]:
        """Bool (n,): tokens that show a place of the picture."""
        if self.placement is None:
            return np.ones(len(self.tokens), bool)
        return self.placement.droppable


def raster(rows: int, columns: int, tile: int = 0) -> npt.NDArray[np.int64]:
    """(rows * columns, 3) coordinates of a grid, row by row."""
    place = np.arange(rows * columns)
    return np.stack([np.full_like(place, tile), place // columns, place % columns], 1)


def tile_row(
    rows: int, columns: int, side: int, padding: tuple[float, float] = (0.0, 0.0)
) -> npt.NDArray[np.float32]:
    """(rows * columns, 7) table of square tiles that cut a picture in raster order.

    Args:
        rows: Rows of tiles.
        columns: Columns of tiles.
        side: Rows, and columns, of tokens in a tile.
        padding: Share of the tiles' height, and width, that was added on each side.
    """
    _, row, column = raster(rows, columns).T
    inner = 1 - 2 * padding[0], 1 - 2 * padding[1]
    edges = [
        (row / rows - padding[0]) / inner[0],
        (column / columns - padding[1]) / inner[1],
        ((row + 1) / rows - padding[0]) / inner[0],
        ((column + 1) / columns - padding[1]) / inner[1],
    ]
    sides = np.full(len(row), side)
    return np.stack([np.zeros(len(row)), *edges, sides, sides], 1).astype(np.float32)


def token_areas(
    coords: npt.NDArray[np.int64], tiles: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """(n, 5) picture, top, left, bottom, right of tokens with coordinates in ``tiles`` (T, 7)."""
    picture, top, left, bottom, right, rows, columns = tiles[coords[:, 0]].T
    height, width = (bottom - top) / rows, (right - left) / columns
    above, before = top + coords[:, 1] * height, left + coords[:, 2] * width
    return np.stack([picture, above, before, above + height, before + width], 1).astype(np.float32)


def full_grid(coords: npt.NDArray[np.int64]) -> tuple[int, int]:
    """Rows and columns where tokens are one full grid in raster order, else (1, n)."""
    count = len(coords)
    if count and (coords[:, 0] == coords[0, 0]).all():
        rows, columns = int(coords[:, 1].max()) + 1, int(coords[:, 2].max()) + 1
        if rows * columns == count and (coords[:, 1:] == raster(rows, columns)[:, 1:]).all():
            return rows, columns
    return 1, count
