"""A small in-memory source with a rule that a policy can learn, and the scorer that knows it.

Each visual token has one of four categories, written into its code; each question asks for one
category, written into the query. The tokens of the asked category are the relevant ones. A
policy that ignores the question cannot tell them from the others, one that relates codes to the
query can. Nothing here is needed for real data; it is the default of ``gymnasium.make``, of the
environment checkers and of the tests that ask whether an algorithm learns at all.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np
import numpy.typing as npt

from tprl_env.checks import check_choice
from tprl_env.data.features.placement import Placement, raster
from tprl_env.data.features.source import Box

CATEGORIES = ("red", "green", "blue", "yellow")
_COLOURS = np.array([[214, 69, 65], [76, 175, 80], [66, 133, 244], [250, 204, 46]], np.uint8)
_CELL = 12  # pixels per token and side in the picture
_TEMPLATE_TOKENS = 2  # question tokens that say nothing


def _near_square(count: int) -> tuple[int, int]:
    rows = int(count**0.5)
    while count % rows:
        rows -= 1
    return rows, count // rows


class ToyStore:
    """A ``TokenSource`` of generated samples; equal arguments give equal content.

    Args:
        samples: Number of samples S; each has its own picture.
        tokens: Visual tokens N per picture (the largest number with ``vary``).
        width: Code width d and query width d_q; at least 4.
        seed: Seed of everything.
        vary: Give pictures between ``tokens // 2`` and ``tokens`` tokens instead of ``tokens``
            each, so that padding occurs.

    Raises:
        ValueError: An argument is too small.
    """

    def __init__(
        self,
        samples: int = 64,
        tokens: int = 16,
        width: int = 8,
        seed: int = 0,
        vary: bool = False,
    ) -> None:
        for name, value, least in (
            ("samples", samples, 1),
            ("tokens", tokens, 4),
            ("width", width, len(CATEGORIES)),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"toy {name} must be at least {least}, got {value}")
        self.location = f"toy:samples={samples},tokens={tokens},width={width},seed={seed}"
        if vary:
            self.location += ",vary=1"
        self.fingerprint = hashlib.sha256(self.location.encode()).hexdigest()[:16]
        self.max_tokens = tokens
        self.token_width = self.code_width = self.query_width = width
        self.max_question_tokens = _TEMPLATE_TOKENS + 1
        self.num_images = samples
        rng = np.random.default_rng([seed, samples, tokens, width, int(vary)])
        low = tokens // 2 if vary else tokens
        self._counts = rng.integers(low, tokens + 1, size=samples)
        self._exists = np.arange(tokens) < self._counts[:, None]
        self._asked = rng.integers(len(CATEGORIES), size=samples)
        self._categories = self._draw_categories(rng)
        self._relevant = (self._categories == self._asked[:, None]) & self._exists
        noise = rng.normal(scale=0.3, size=(samples, tokens, width))
        codes = noise + 2.0 * np.eye(len(CATEGORIES), width)[self._categories]
        self._codes = np.where(self._exists[..., None], codes, 0.0).astype(np.float32)
        template = rng.normal(scale=0.3, size=(_TEMPLATE_TOKENS, width))
        asked = 3.0 * np.eye(len(CATEGORIES), width)[self._asked]
        self._query_tokens = np.concatenate(
            [np.broadcast_to(template, (samples, *template.shape)), asked[:, None]], axis=1
        ).astype(np.float32)

    def _draw_categories(self, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Draw categories (S, N); between one token and a quarter of them are relevant."""
        others = rng.integers(1, len(CATEGORIES), size=self._exists.shape)
        categories = (self._asked[:, None] + others) % len(CATEGORIES)
        for row, count in enumerate(self._counts):
            relevant = rng.integers(1, max(int(count) // 4, 1) + 1)
            places = rng.choice(int(count), size=relevant, replace=False)
            categories[row, places] = self._asked[row]
        return categories

    def __len__(self) -> int:
        """Return the number of samples S."""
        return len(self._counts)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Pickle by location: a few bytes, rebuilt identically elsewhere."""
        return ToyStore.from_location, (self.location,)

    @classmethod
    def from_location(cls, location: str) -> ToyStore:
        """Build from ``"toy"`` or ``"toy:samples=64,tokens=16,width=8,seed=0,vary=0"``.

        Raises:
            ValueError: A field is unknown or not an integer.
        """
        head, _, body = location.partition(":")
        known = ("samples", "tokens", "width", "seed", "vary")
        values: dict[str, int] = {}
        for part in filter(None, body.split(",")):
            name, _, text = part.partition("=")
            if name not in known or not text.isdecimal():
                raise ValueError(
                    f"toy source {location!r}: cannot read {part!r}; "
                    f"write fields as name=number with names {', '.join(known)}"
                )
            values[name] = int(text)
        if head != "toy":
            raise ValueError(f"toy source {location!r} must start with 'toy'")
        vary = bool(values.pop("vary", 0))
        return cls(**values, vary=vary)

    def exists(self, samples: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which tokens exist, ``(B, N)``; False is padding."""
        return self._exists[np.asarray(samples, dtype=np.int64)]

    def codes(self, samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return codes, ``(B, N, d)``; zero where padding."""
        return self._codes[np.asarray(samples, dtype=np.int64)]

    def query(self, samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the mean of the question's token embeddings, ``(B, d_q)``."""
        return self._query_tokens[np.asarray(samples, dtype=np.int64)].mean(axis=1)

    def query_tokens(
        self, samples: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Return the question's token embeddings ``(B, Q, d_q)`` and which exist ``(B, Q)``."""
        tokens = self._query_tokens[np.asarray(samples, dtype=np.int64)]
        return tokens, np.ones(tokens.shape[:2], dtype=np.bool_)

    def full_scores(self, score_kind: str) -> npt.NDArray[np.float32]:
        """Return the score of each sample with all tokens kept, ``(S,)``: always 1.

        Raises:
            ValueError: ``score_kind`` is unknown.
        """
        _check_score_kind(score_kind)
        return np.ones(len(self), dtype=np.float32)

    def relevant(self, samples: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return the tokens the rule is about, ``(B, N)``."""
        return self._relevant[np.asarray(samples, dtype=np.int64)]

    def grid(self, sample: int) -> tuple[int, int]:
        """Return rows and columns of the token grid."""
        return _near_square(int(self._counts[sample]))

    @property
    def one_grid(self) -> bool:
        """Return True: a token's index is all that is known of its place."""
        return True

    def coords(self, sample: int) -> npt.NDArray[np.int64]:
        """Return tile 0, row and column of each token, ``(n, 3)``."""
        return raster(*self.grid(sample))

    def areas(self, sample: int) -> npt.NDArray[np.float32]:
        """Return ``(n, 5)``: picture 0, top, left, bottom, right of each token, shares of it."""
        return Placement.in_line(self.coords(sample)).areas()

    def picture(self, sample: int) -> npt.NDArray[np.uint8]:
        """Return the picture, ``(H, W, 3)`` uint8: one coloured cell per token."""
        count = int(self._counts[sample])
        cells = _COLOURS[self._categories[sample, :count]].reshape(*_near_square(count), 3)
        return cells.repeat(_CELL, axis=0).repeat(_CELL, axis=1)

    def picture_box(self, sample: int) -> Box | None:
        """Return None: the tokens cover the whole picture."""
        return None

    def question(self, sample: int) -> str:
        """Return the question's text."""
        return f"which cells are {CATEGORIES[self._asked[sample]]}?"

    def answers(self, sample: int) -> tuple[str, ...]:
        """Return the accepted answers: the relevant cells' numbers."""
        return (" ".join(str(i) for i in np.flatnonzero(self._relevant[sample])),)

    def id(self, sample: int) -> str:
        """Return the sample's id."""
        return f"toy-{int(sample)}"

    def question_type(self, sample: int) -> str:
        """Return the question type: the asked category."""
        return CATEGORIES[self._asked[sample]]

    def image_number(self, sample: int) -> int:
        """Return the number of the sample's picture: each sample has its own."""
        return int(sample)

    def tokens(self, sample: int) -> npt.NDArray[np.float16]:
        """Return the visual tokens, ``(n, D)``: here the codes themselves."""
        return self._codes[sample, : self._counts[sample]].astype(np.float16)

    def tower(self, sample: int) -> None:
        """Return no vision-tower features: there is no tower."""

    def cls_attention(self, sample: int) -> None:
        """Return no [CLS] attention: there is no tower."""

    def relevance(self, sample: int) -> npt.NDArray[np.float32]:
        """Return 1 for relevant tokens and 0 for the others, ``(n,)``."""
        return self._relevant[sample, : self._counts[sample]].astype(np.float32)

    def has_channel(self, name: str) -> bool:
        """Return whether a channel was written: only ``"codes"`` exists here."""
        return name == "codes"

    def channel(self, name: str, index: int) -> npt.NDArray[np.float32]:
        """Return one picture's array of a channel, ``(n, width)``: its codes.

        Raises:
            ValueError: ``name`` is another one.
        """
        if not self.has_channel(name):
            raise ValueError(f"the toy source has no channel {name!r}; it holds 'codes' only")
        return self._codes[index, : self._counts[index]]


class ToyScorer:
    """Score of a keep-mask on a ``ToyStore``: the fraction of relevant tokens that it keeps.

    Irrelevant tokens cost nothing here; saving them is the business of the reward's second term
    or of a budget.

    Args:
        source: The store that knows the rule.
        score_kind: all kinds mean the same fraction.
    """

    def __init__(
        self, source: ToyStore, score_kind: Literal["exact", "likelihood", "graded"] = "likelihood"
    ) -> None:
        _check_score_kind(score_kind)
        self.source = source
        self.score_kind = score_kind

    def __call__(
        self, samples: npt.NDArray[np.int64], keep: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float32]:
        """Score masks.

        Args:
            samples: Sample numbers, ``(B,)``.
            keep: Kept tokens, ``(B, max_tokens)``.

        Returns:
            Scores in [0, 1], ``(B,)`` float32.

        Raises:
            ValueError: ``keep`` has another shape.
        """
        relevant = self.source.relevant(samples)
        keep = np.asarray(keep, dtype=np.bool_)
        if keep.shape != relevant.shape:
            raise ValueError(f"keep has shape {keep.shape}, expected {relevant.shape}")
        kept = (relevant & keep).sum(axis=1)
        return (kept / relevant.sum(axis=1)).astype(np.float32)


def _check_score_kind(score_kind: str) -> None:
    check_choice("score_kind", score_kind, ("exact", "likelihood", "graded"))
