"""The images of a feature store: their tokens, and where these stand.

Shapes: n droppable tokens of one image, m that are always kept, D token width, Dv tower width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.arrow import ArrowRows
from tprl_env.data.features.manifest import Manifest
from tprl_env.data.features.placement import Placement, StoredVisual, raster
from tprl_env.data.features.rows import read_placement, read_visual


class StoredImages(ABC):
    """The part of :class:`~tprl_env.data.features.store.FeatureStore` that is about images.

    Attributes:
        manifest: What is in the store.
    """

    def __init__(self, manifest: Manifest, images: ArrowRows) -> None:
        """Use images that have been checked."""
        self.manifest = manifest
        self._images = images
        self._counts = images.vector("count")
        self._fixed_counts = images.list_lengths("fixed") // max(manifest.token_width, 1)
        self._placements: dict[int, Placement | None] = {}

    @abstractmethod
    def image_number(self, sample: int) -> int:
        """Return the number of the sample's image."""

    def image_id(self, image: int) -> str:
        """Return the id of an image."""
        return str(self._images.value("image_id", image))

    def image_tokens(self, image: int) -> npt.NDArray[np.float16]:
        """Return the droppable visual tokens of an image, ``(n, D)``."""
        return self._images.view("tokens", image).reshape(-1, self.manifest.token_width)

    def image_tower(self, image: int) -> npt.NDArray[np.float16] | None:
        """Return the vision-tower features of an image, ``(n, Dv)``, or None."""
        if not self.manifest.tower_width:
            return None
        return self._images.view("tower", image).reshape(-1, self.manifest.tower_width)

    def image_count(self, image: int) -> int:
        """Return the number of droppable visual tokens n of an image."""
        return int(self._counts[image])

    def fixed_count(self, image: int) -> int:
        """Return the number m of an image's tokens that are always kept, beside its n."""
        return int(self._fixed_counts[image])

    def placement(self, image: int) -> Placement | None:
        """Return where all n + m tokens stand; None for one grid at consecutive positions.

        Raises:
            StoreError: It is damaged.
        """
        if image not in self._placements:
            placed = self._images.optional("coords", image) is not None
            self._placements[image] = read_placement(self._images, image) if placed else None
        return self._placements[image]

    def visual(self, sample: int) -> StoredVisual:
        """Return all n + m tokens of the sample's image in the order of the sequence.

        Raises:
            StoreError: The image's placement is damaged.
        """
        return read_visual(self._images, self.image_number(sample), self.manifest.token_width)

    def grid(self, sample: int) -> tuple[int, int]:
        """Return rows and columns of the token grid; ``(1, n)`` where it is not one grid."""
        image, value = self.image_number(sample), self._images.value
        return value("grid_rows", image), value("grid_columns", image)

    @cached_property
    def one_grid(self) -> bool:
        """Whether all images have the same grid, so that a token's index says where it is."""
        if self._images.list_lengths("coords").any():
            return False
        sides = (self._images.vector(name) for name in ("grid_rows", "grid_columns"))
        return all(bool((side == side[0]).all()) for side in sides)

    @cached_property
    def has_sets(self) -> bool:
        """Whether some questions are about several pictures."""
        name = "more_pictures"
        batches = (batch for batch in self._images.batches if name in batch.schema.names)
        return any(batch.column(name).null_count < batch.num_rows for batch in batches)

    def coords(self, sample: int) -> npt.NDArray[np.int64]:
        """Return tile or frame, row and column in it of each token, ``(n, 3)``."""
        placement = self.placement(self.image_number(sample))
        if placement is None:
            return raster(*self.grid(sample))
        return placement.coords[placement.droppable]

    def areas(self, sample: int) -> npt.NDArray[np.float32]:
        """Return ``(n, 5)``: picture, top, left, bottom, right of each token, shares of it."""
        placement = self.placement(self.image_number(sample))
        if placement is None:
            placement = Placement.in_line(raster(*self.grid(sample)))
        return placement.areas()
