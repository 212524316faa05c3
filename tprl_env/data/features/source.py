"""The one interface between encoded samples and everything that reads them.

The environment, the policy, the scorers and the pruners of `tprl_env.reducers` take a
``TokenSource``; ``FeatureStore`` and ``ToyStore`` are two. What only a real LVLM can read (prompts
and answers as token ids) belongs to ``FeatureStore`` alone.

Shapes: B batch, S samples, N ``max_tokens``, n tokens of one sample, D token width, Dv tower width,
d code width, Q question tokens, d_q query width.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.placement import Placement, raster

Box = tuple[float, float, float, float]
"""Part of a picture: (top, left, bottom, right) in its pixels, beyond its edges where padded."""


class TokenSource(Protocol):
    """What can be known about encoded samples without the LVLM.

    Attributes:
        location: What ``open_source`` needs to open it again in another process.
        fingerprint: Changes when the content changes.
        max_tokens: Largest number of visual tokens N.
        token_width: Width D of the visual tokens.
        code_width: Width d of the codes.
        query_width: Width d_q of the question's token embeddings.
        max_question_tokens: Largest number of question tokens Q.
    """

    location: str
    fingerprint: str
    max_tokens: int
    token_width: int
    query_width: int
    max_question_tokens: int

    @property
    def code_width(self) -> int:
        """Width d of the codes."""
        ...

    def __len__(self) -> int:
        """Return the number of samples S."""
        ...

    def exists(self, samples: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which tokens exist, ``(B, N)``; False is padding."""
        ...

    def codes(self, samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return codes, ``(B, N, d)``; zero where padding."""
        ...

    def query(self, samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the mean of the question's token embeddings, ``(B, d_q)``."""
        ...

    def query_tokens(
        self, samples: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Return the question's token embeddings ``(B, Q, d_q)`` and which exist ``(B, Q)``."""
        ...

    def image_number(self, sample: int) -> int:
        """Return the number of the sample's image; samples may share one."""
        ...

    def tokens(self, sample: int) -> npt.NDArray[np.float16]:
        """Return the visual tokens as the LLM gets them, ``(n, D)``."""
        ...

    def tower(self, sample: int) -> npt.NDArray[np.float16] | None:
        """Return the vision tower's features, ``(n, Dv)``, or None where there are none."""
        ...

    def cls_attention(self, sample: int) -> npt.NDArray[np.float32] | None:
        """Return the tower's [CLS] attention, ``(n,)``, or None where there is none."""
        ...

    def relevance(self, sample: int) -> npt.NDArray[np.float32] | None:
        """Return the dataset's answer-blind relevance, ``(n,)``, or None where unknown."""
        ...

    def has_channel(self, name: str) -> bool:
        """Return whether there is such a channel: one array per image or sample, by name."""
        ...

    def channel(self, name: str, index: int) -> npt.NDArray[np.float32]:
        """Return one array of a channel, ``(n,)`` or ``(n, width)``.

        ``index`` is the image number for a per-image channel, else the sample number.

        Raises:
            ValueError: There is no such channel.
        """
        ...

    def full_scores(self, score_kind: str) -> npt.NDArray[np.float32]:
        """Return the score of each sample with all tokens kept, ``(S,)``."""
        ...

    def grid(self, sample: int) -> tuple[int, int]:
        """Return rows and columns of the token grid; ``(1, n)`` where it is not one grid."""
        ...

    @property
    def one_grid(self) -> bool:
        """Whether all images have the same grid, so that a token's index says where it is."""
        return True

    def coords(self, sample: int) -> npt.NDArray[np.int64]:
        """Return tile or frame, row and column in it of each token, ``(n, 3)``."""
        return raster(*self.grid(sample))

    def areas(self, sample: int) -> npt.NDArray[np.float32]:
        """Return ``(n, 5)``: picture, top, left, bottom, right of each token, shares of it."""
        return Placement.in_line(self.coords(sample)).areas()

    def picture(self, sample: int) -> npt.NDArray[np.uint8]:
        """Return the picture, ``(H, W, 3)``."""
        ...

    def picture_box(self, sample: int) -> Box | None:
        """Return the part of the picture that the token grid covers; None for all of it."""
        return None

    def question(self, sample: int) -> str:
        """Return the question's text."""
        ...

    def answers(self, sample: int) -> tuple[str, ...]:
        """Return the accepted answers, the reference first."""
        ...

    def id(self, sample: int) -> str:
        """Return the sample's id."""
        ...

    def question_type(self, sample: int) -> str:
        """Return the question type."""
        ...
