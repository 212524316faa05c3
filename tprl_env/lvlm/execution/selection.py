"""What a caller wants to happen to visual tokens, checked: masks, lifetimes, merged tokens.

Shapes: B rows, n visual tokens of one image, m merged ones, N visual tokens of the largest image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tprl_env.lvlm.protocol import Positions
from tprl_env.reducers.layer_pruner import LayerPruner


@dataclass(frozen=True)
class Selection:
    """At most one of masks, lifetimes, a reducer, and merged tokens.

    Attributes:
        keep: Per row bool (n,).
        wanted_positions: As asked for; see :attr:`positions`.
        lives: Per row integers (n,), decoder layers that each token enters.
        reducer: A method inside the language model.
        average: Its wanted average.
        places: Per row integers (m,), the places that merged tokens stand for.
        sizes: Per row the visual tokens of the full image, with ``places``.
    """

    keep: Sequence[npt.NDArray[np.bool_]] | None = None
    wanted_positions: Positions | None = None
    lives: Sequence[npt.NDArray[Any]] | None = None
    reducer: LayerPruner | None = None
    average: float | None = None
    places: Sequence[npt.NDArray[np.int64]] | None = None
    sizes: Sequence[int] | None = None

    @property
    def positions(self) -> Positions:
        """The reducer's own where none are asked for, else original."""
        if self.wanted_positions is not None:
            return self.wanted_positions
        return "original" if self.reducer is None else self.reducer.positions

    def check(self, counts: Sequence[int], num_layers: int) -> None:
        """Refuse what does not fit the tokens.

        Args:
            counts: Per row the number of tokens given.
            num_layers: Decoder layers.

        Raises:
            ValueError: Two ways at once, or an array of another shape, type or range.
        """
        ways = {"keep": self.keep, "lives": self.lives, "reducer": self.reducer}
        given = [
            name for name, value in {**ways, "places": self.places}.items() if value is not None
        ]
        if len(given) > 1:
            raise ValueError(
                f"give one of keep, lives, reducer and places, got {' and '.join(given)}; lives "
                "can say all that masks and reducers do"
            )
        if self.average is not None and self.reducer is None:
            raise ValueError(f"average {self.average} has no reducer; give reducer=...")
        for row, count in enumerate(counts):
            if self.lives is not None:
                _check_lives(np.asarray(self.lives[row]), count, num_layers, row)
            if self.places is not None:
                size = self.sizes[row] if self.sizes is not None else None
                _check_places(np.asarray(self.places[row]), count, size, row)

    def masks(self) -> Sequence[npt.NDArray[np.bool_]] | None:
        """What reaches the first layer; ``None`` for all tokens."""
        if self.lives is not None:
            return [np.asarray(one) > 0 for one in self.lives]
        return self.keep

    def full(self, counts: Sequence[int]) -> Sequence[int]:
        """Per row the visual tokens of the full image."""
        return counts if self.sizes is None else self.sizes

    def padded_lives(self) -> npt.NDArray[np.int64]:
        """(B, N) lifetimes, padded with zeros."""
        rows = [] if self.lives is None else [np.asarray(one) for one in self.lives]
        table = np.zeros((len(rows), max(map(len, rows), default=0)), np.int64)
        for row, one in enumerate(rows):
            table[row, : len(one)] = one
        return table


def _check_lives(lives: npt.NDArray[Any], count: int, num_layers: int, row: int) -> None:
    if lives.shape != (count,) or lives.dtype.kind not in "iu":
        raise ValueError(
            f"lives of row {row} must be integers of shape ({count},), one per visual token, got "
            f"{lives.dtype} of shape {lives.shape}; a mask is given as keep"
        )
    if count and not 0 <= int(lives.min()) <= int(lives.max()) <= num_layers:
        raise ValueError(
            f"lives of row {row} must lie in [0, {num_layers}], the decoder layers, got "
            f"{int(lives.min())} to {int(lives.max())}"
        )


def _check_places(places: npt.NDArray[Any], count: int, size: int | None, row: int) -> None:
    if size is None:
        raise ValueError("places need sizes, the visual tokens of the full image per row")
    if places.shape != (count,) or places.dtype.kind not in "iu":
        raise ValueError(
            f"places of row {row} must be integers of shape ({count},), one per merged token, got "
            f"{places.dtype} of shape {places.shape}"
        )
    if count and not 0 <= int(places.min()) <= int(places.max()) < size:
        raise ValueError(
            f"places of row {row} must lie in [0, {size - 1}] of a full image of {size} tokens, "
            f"got {int(places.min())} to {int(places.max())}"
        )
