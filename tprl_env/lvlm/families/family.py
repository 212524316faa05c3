"""What tells one family of checkpoints from another, beside what the library does alike for all.

The library gives the same three handles in every family: ``get_image_features`` (projected
tokens), the image placeholder's id (where they go, in order of appearance), and the language model
with its layers. A family adds where each token lies in the picture, and the text around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tprl_env.lvlm.protocol import Placement

Placed = tuple[Placement, str]
"""Where a picture's tokens stand, and the text that stands for it with a placeholder per run."""


@dataclass(frozen=True)
class Family:
    """One row of :data:`~tprl_env.lvlm.families.library.LIBRARY_FAMILIES`.

    Attributes:
        model: Name of the library's class.
        place: From the model, the image processor's output for one picture, and the placeholder
            to the placement and the text of its tokens.
        needs: What the image processor must give, pixels first.
        axes: Axes of the pixels of one call.
        prepare: More arguments of the image processor.
    """

    model: str
    place: Callable[[Any, Mapping[str, Any], str], Placed]
    needs: tuple[str, ...]
    axes: int
    prepare: Mapping[str, Any] = field(default_factory=dict)
