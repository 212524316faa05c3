"""What the environment asks of a scorer: protocol, checks of requests and scores, counters.

A scorer answers "how well does the frozen LVLM do on this sample when only these tokens reach
it?". Failure is never turned into a number: it raises :class:`ScoringError`.

Shapes: B rows of a request, N = ``source.max_tokens`` visual tokens, S samples of the source.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tprl_env.checks import NotFiniteError
from tprl_env.data.features.source import TokenSource

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float32]

SCORE_TOLERANCE = 1e-6
"""Rounding error by which a score may leave [0, 1] before it is refused."""


class ScoringError(RuntimeError):
    """A sample could not be scored; the message names the samples and the scorer."""


class Scorer(Protocol):
    """Anything that maps (sample numbers, keep-masks) to scores in [0, 1].

    Scorers that have ``num_layers`` also take ``lives`` in place of masks, told apart by type:
    uint8 (B, N), the decoder layers that each token enters.
    """

    def __call__(self, samples: IntArray, keep: BoolArray) -> FloatArray:
        """Score ``samples`` (B,) int64 with ``keep`` (B, N) bool; returns (B,) float32."""
        ...


@dataclass
class ScorerStats:
    """Counters of one scorer; ``scores = computed + duplicates + cache_hits + full_hits``.

    Attributes:
        requests: Calls.
        scores: Scores returned.
        computed: Scores that the innermost scorer really computed.
        duplicates: Scores copied from an equal row of the same request.
        cache_hits: Scores taken from the cache of earlier requests.
        full_hits: Rows with all tokens, answered from the stored full-token score.
        batches: Forward passes of the LVLM.
        batch_rows: Sequences in these passes (one per sample and distinct answer).
        padded_tokens: Padding places computed in these passes.
        busy_seconds: Wall-clock seconds spent computing.
    """

    requests: int = 0
    scores: int = 0
    computed: int = 0
    duplicates: int = 0
    cache_hits: int = 0
    full_hits: int = 0
    batches: int = 0
    batch_rows: int = 0
    padded_tokens: int = 0
    busy_seconds: float = 0.0

    def add(self, other: ScorerStats) -> ScorerStats:
        """Add the counters of ``other`` to this object and return it."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
        return self

    def as_dict(self) -> dict[str, float]:
        """The counters as plain numbers, for metrics and JSON."""
        return asdict(self)


def check_request(
    samples: Any, keep: Any, source: TokenSource
) -> tuple[IntArray, BoolArray, BoolArray]:
    """Validate the arguments of a scorer call.

    Returns:
        ``samples`` as int64 (B,); ``keep`` as bool (B, N), False where the source is padded; and
        ``source.exists(samples)`` bool (B, N).

    Raises:
        ValueError: A shape, type or sample number is wrong.
    """
    numbers = np.asarray(samples)
    masks = np.asarray(keep)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"samples must be a 1-D integer array of sample numbers, "
            f"got shape {numbers.shape} of {numbers.dtype}"
        )
    if masks.shape != (len(numbers), source.max_tokens) or masks.dtype != np.bool_:
        raise ValueError(
            f"keep must be bool of shape ({len(numbers)}, {source.max_tokens}), a row per sample, "
            f"got {masks.dtype} of shape {masks.shape}"
        )
    if len(numbers) and not (0 <= int(numbers.min()) and int(numbers.max()) < len(source)):
        raise ValueError(
            f"sample numbers must lie in [0, {len(source)}), "
            f"got {int(numbers.min())}..{int(numbers.max())}"
        )
    numbers = numbers.astype(np.int64, copy=False)
    exists = source.exists(numbers)
    return numbers, masks & exists, exists


def split_lives(
    keep: Any, num_layers: int | None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.uint8] | None]:
    """What reaches the first layer, and lives where some token leaves between layers.

    Args:
        keep: bool (B, N) masks, or uint8 (B, N) lives; padding must be cleared.
        num_layers: Decoder layers L of the scorer's LVLM, ``None`` where it has none.

    Returns:
        The mask, and the lives, or ``None`` where masks say it all: every token has 0 or L.

    Raises:
        ValueError: Lives above L, or lives for a scorer without layers.
    """
    values = np.asarray(keep)
    if values.dtype != np.uint8:
        return values, None
    if num_layers is None:
        raise ValueError(
            "lives (uint8) need a scorer with an LVLM's decoder layers, which this one lacks; "
            "give a bool mask"
        )
    if values.size and int(values.max()) > num_layers:
        raise ValueError(
            f"lives must lie in [0, {num_layers}], the decoder layers, got {int(values.max())}; a "
            "mask is given as bool"
        )
    entered = values > 0
    return entered, None if bool((entered == (values == num_layers)).all()) else values


def check_scores(
    scores: Any, samples: IntArray, source: TokenSource, *, scorer: str = "the scorer"
) -> FloatArray:
    """Return ``scores`` as float32 (B,), or refuse them.

    Args:
        scores: What a scorer returned for ``samples``.
        samples: Sample numbers (B,).
        source: Names the samples in the error.
        scorer: Name of the scorer for the error.

    Raises:
        ScoringError: Wrong length, not numeric, not finite, or outside [0, 1]; the message names
            the first offending sample.
    """
    values = np.asarray(scores)
    if values.shape != (len(samples),) or not (
        np.issubdtype(values.dtype, np.floating)
        or np.issubdtype(values.dtype, np.integer)
        or values.dtype == np.bool_
    ):
        raise ScoringError(
            f"{scorer} returned {values.dtype} of shape {values.shape} for {len(samples)} samples "
            f"{name_samples(samples, source)}; expected {len(samples)} numbers, one per sample"
        )
    numbers = values.astype(np.float32)
    bad = ~(np.isfinite(numbers) & (numbers >= -SCORE_TOLERANCE) & (numbers <= 1 + SCORE_TOLERANCE))
    if bad.any():
        row = int(np.argmax(bad))
        raise ScoringError(
            f"{scorer} returned {numbers[row]} for sample {source.id(int(samples[row]))!r} "
            f"(number {int(samples[row])}); a score must be finite and lie in [0, 1]"
        )
    return np.clip(numbers, 0.0, 1.0)


class NamedFailures:
    """Context that turns any failure inside it into a :class:`ScoringError` naming the samples."""

    def __init__(self, samples: IntArray, source: TokenSource, scorer: str) -> None:
        """Remember what is being scored by whom."""
        self._samples, self._source, self._scorer = samples, source, scorer

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Re-raise a failure with its samples, those to blame where the failure says which.

        Interrupts and scoring errors pass unchanged.
        """
        if isinstance(error, Exception) and not isinstance(error, ScoringError):
            guilty = self._samples
            if isinstance(error, NotFiniteError):
                guilty = np.unique(self._samples[list(error.rows)])
            raise ScoringError(
                f"{self._scorer} failed on {name_samples(guilty, self._source)}: "
                f"{type(error).__name__}: {error}"
            ) from error


def name_samples(samples: IntArray, source: TokenSource, most: int = 8) -> str:
    """Ids of the first few samples, for an error message."""
    shown = ", ".join(repr(source.id(int(s))) for s in samples[:most])
    rest = len(samples) - most
    return f"[{shown}{f', and {rest} more' if rest > 0 else ''}]"
