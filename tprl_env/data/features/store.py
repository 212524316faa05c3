"""Encoded samples: what the environment, the policy and the pruners read.

``TokenSource`` is the interface; ``FeatureStore`` is the memory-mapped folder that has it, and
``ToyStore`` the in-memory one. Features stay where they are: other processes open
the same store by its ``location`` and exchange sample numbers and masks only.

Shapes: B batch, S samples, N ``max_tokens``, n tokens of one image, D token width, d code width,
Dv tower width, Q question tokens, d_q query width. A *sample number* is a row of the store.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from tprl_env.checks import check_choice, quoted
from tprl_env.data.features.arrow import ArrowRows
from tprl_env.data.features.channels import (
    Channel,
    check_codes,
    find_channel,
    load_channels,
    write_channel,
)
from tprl_env.data.features.manifest import Manifest, StoreError, Verify, check_file, default_verify
from tprl_env.data.features.source import Box, TokenSource
from tprl_env.data.features.stored_images import StoredImages
from tprl_env.data.features.toy import ToyStore
from tprl_env.data.features.validation import check_rows
from tprl_env.files import folder_lock

__all__ = ["FeatureStore", "Manifest", "StoreError", "TokenSource", "open_source", "shared_source"]

CODES = "codes"  # the per-image channel the autoencoder writes
QUESTION_ATTENTION = "question_attention"  # the per-sample channel the LVLM's attention fills
QUESTION_ROWS = "question_rows"  # the same of one layer's own queries and keys, before it runs

_LONGEST_NAME = 255  # of a file or folder, on the file systems there are


def open_source(location: str | Path, *, trust: bool = False) -> TokenSource:
    """Open a source by its location: a store's folder, or ``"toy:samples=64,tokens=16,seed=0"``.

    Args:
        location: Where it is.
        trust: Compare the sizes of a store's files only, not their checksums.

    Raises:
        ValueError: The toy location cannot be read, or (``StoreError``) the store not be opened.
    """
    text = str(location)
    if text == "toy" or text.startswith("toy:"):
        return ToyStore.from_location(text)
    if "\0" in text or any(len(part) > _LONGEST_NAME for part in text.split("/")):
        raise ValueError(f"the source must be a folder or toy:..., got {quoted(text)}")
    return FeatureStore.open(text, verify="sizes" if trust else None)


@functools.lru_cache(maxsize=8)
def shared_source(location: str) -> TokenSource:
    """`open_source`, but one opened source per process and location."""
    return open_source(location)


class FeatureStore(StoredImages):
    """A folder of encoded samples, memory-mapped; make one with ``tprl encode``.

    Images are stored once (``images-*.arrow``) and shared by the questions about them
    (``samples-*.arrow``); channels (``channel-<name>.arrow``) add one array per image or sample.
    Rows come back as read-only views, batches as fresh padded arrays. A store pickles as its path.

    Attributes:
        path: The folder.
        manifest: What is in it.
        num_images: Number of distinct images.
    """

    def __init__(self, path: Path, manifest: Manifest, verify: Verify) -> None:
        """Use :meth:`open` instead."""
        self.path = path
        self.location = str(path)
        self.manifest = manifest
        self.num_images = manifest.images
        self.max_tokens = manifest.max_tokens
        self.token_width = manifest.token_width
        self.query_width = manifest.query_width
        self.max_question_tokens = manifest.max_question_tokens
        self._images = self._rows("images-")
        self._samples = self._rows("samples-")
        check_rows(path, manifest, self._images, self._samples)
        super().__init__(manifest, self._images)
        self._image_numbers = self._samples.vector("image")
        self._question_counts = self._samples.vector("question_tokens")
        self._full = {m: self._samples.vector(f"full_{m}") for m in ("exact", "likelihood")}
        self._channels = self._load_channels(verify=verify)
        self.fingerprint = self._fingerprint()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        verify: Verify | None = None,
        lvlm_fingerprint: str | None = None,
        autoencoder_fingerprint: str | None = None,
    ) -> FeatureStore:
        """Open a store.

        Args:
            path: Its folder.
            verify: ``"sizes"`` compares file sizes; ``"checksums"`` reads every byte as well;
                ``"once"`` does unless this process has done so since the file last changed. The
                default is ``"once"``, or ``"sizes"`` within `trust_files`.
            lvlm_fingerprint: Refuse a store that another LVLM encoded.
            autoencoder_fingerprint: Refuse a store with another autoencoder's codes, or none.

        Raises:
            StoreError: The store is missing, unfinished, foreign, damaged, or another LVLM's.
            ValueError: ``verify`` is unknown.
        """
        verify = default_verify() if verify is None else verify
        check_choice("verify", verify, get_args(Verify))
        folder = Path(path).resolve()
        manifest = Manifest.read(folder)
        if lvlm_fingerprint is not None and manifest.lvlm_fingerprint != lvlm_fingerprint:
            raise StoreError(
                f"{folder} was encoded by the LVLM {manifest.lvlm} with fingerprint "
                f"{manifest.lvlm_fingerprint}, not by the given one with {lvlm_fingerprint}; "
                f"load that LVLM or encode again"
            )
        cure = "encode the store again with resume=False"
        for name, entry in manifest.files.items():
            check_file(folder / name, entry, verify=verify, cure=cure)
        store = cls(folder, manifest, verify)
        if autoencoder_fingerprint is not None:
            check_codes(store._channel(CODES), autoencoder_fingerprint, folder)
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as the path; the copy is opened where it is unpickled."""
        return _reopen, (self.location, self.fingerprint)

    def __len__(self) -> int:
        """Return the number of samples S."""
        return len(self._image_numbers)

    def _rows(self, prefix: str) -> ArrowRows:
        names, files = self.manifest.named(prefix), self.manifest.files
        return ArrowRows([self.path / n for n in names], [files[n].rows for n in names])

    def _load_channels(self, *, verify: Verify) -> dict[str, Channel]:
        counts = {"image": self._counts, "sample": self._counts[self._image_numbers]}
        return load_channels(self.path, self.manifest, counts, verify=verify)

    def _fingerprint(self) -> str:
        channels = sorted(self._channels.items())
        parts = [self.manifest.fingerprint, *(f"{k}={v.file.sha256}" for k, v in channels)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]

    def _numbers(self, samples: npt.ArrayLike) -> npt.NDArray[np.int64]:
        numbers = np.asarray(samples, dtype=np.int64)
        if numbers.ndim != 1:
            raise ValueError(f"samples must have shape (B,), got {numbers.shape}")
        if numbers.size and not (0 <= numbers.min() and numbers.max() < len(self)):
            raise IndexError(
                f"sample numbers {numbers.min()} to {numbers.max()} were requested; "
                f"{self.path} holds {len(self)} samples"
            )
        return numbers

    # Batches -------------------------------------------------------------------------------

    def exists(self, samples: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Return which tokens exist, ``(B, N)``; False is padding."""
        counts = self._counts[self._image_numbers[self._numbers(samples)]]
        return np.arange(self.max_tokens) < counts[:, None]

    def codes(self, samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the autoencoder's codes, ``(B, N, d)``; zero where padding.

        Raises:
            StoreError: No autoencoder has written codes yet.
        """
        rows = self._image_numbers[self._numbers(samples)]
        channel = self._channel(CODES)
        return channel.rows.padded("values", rows, self.max_tokens, channel.width)

    def query(self, samples: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the mean of the question's token embeddings, ``(B, d_q)``."""
        return self._samples.padded("query", self._numbers(samples), 1, self.query_width)[:, 0]

    def query_tokens(
        self, samples: npt.ArrayLike
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Return the question's token embeddings ``(B, Q, d_q)`` and which exist ``(B, Q)``."""
        rows, length = self._numbers(samples), self.max_question_tokens
        exist = np.arange(length) < self._question_counts[rows][:, None]
        return self._samples.padded("query_tokens", rows, length, self.query_width), exist

    def full_scores(self, score_kind: str) -> npt.NDArray[np.float32]:
        """Return each sample's score with all tokens kept, ``(S,)``; ValueError if unknown."""
        check_choice("score_kind", score_kind, (*self._full, "graded"))
        if score_kind != "graded":
            return self._full[score_kind].copy()
        found = self._samples.optional_numbers("full_graded")
        if np.isnan(found).any():
            raise StoreError(f"{self.path} has no graded scores; encode it with grade=True")
        return found

    # One sample ----------------------------------------------------------------------------

    def image_number(self, sample: int) -> int:
        """Return the number of the sample's image."""
        return int(self._image_numbers[self._numbers([sample])[0]])

    def tokens(self, sample: int) -> npt.NDArray[np.float16]:
        """Return the droppable visual tokens as the LLM gets them, ``(n, D)``."""
        return self.image_tokens(self.image_number(sample))

    def tower(self, sample: int) -> npt.NDArray[np.float16] | None:
        """Return the vision-tower features, ``(n, Dv)``, or None when they were not stored."""
        return self.image_tower(self.image_number(sample))

    def cls_attention(self, sample: int) -> npt.NDArray[np.float32] | None:
        """Return the tower's [CLS] attention, ``(n,)``, or None when the tower has none."""
        values = self._images.view("cls_attention", self.image_number(sample))
        return values if len(values) else None

    def relevance(self, sample: int) -> npt.NDArray[np.float32] | None:
        """Return the dataset's answer-blind relevance, ``(n,)``, or None when unknown."""
        values = self._samples.view("relevance", sample)
        return values if len(values) else None

    def picture(self, sample: int) -> npt.NDArray[np.uint8]:
        """As :meth:`pictures`, ``(H, W, 3)`` of the only one; ValueError if there are several."""
        pictures = self.pictures(sample)
        if len(pictures) > 1:
            raise ValueError(
                f"sample {self.id(sample)!r} is about {len(pictures)} pictures; methods that look "
                f"into the vision tower take one, see pictures()"
            )
        return pictures[0]

    def pictures(self, sample: int) -> list[npt.NDArray[np.uint8]]:
        """Return all pictures that the sample is about, as they were encoded.

        Raises:
            StoreError: One is damaged.
        """
        from tprl_env.data.pictures import read_picture  # Pillow, which rollouts do not need

        image = self.image_number(sample)
        stored = [self._images.value("picture", image)]
        stored += self._images.optional("more_pictures", image) or ()
        try:
            return [read_picture(one) for one in stored]
        except ValueError as error:
            raise StoreError(
                f"the picture of sample {sample} in {self.path} is damaged ({error}); encode the "
                f"store again with resume=False"
            ) from error

    def picture_box(self, sample: int) -> Box | None:
        """Return the part of the picture that the token grid covers; None for all of it.

        Raises:
            StoreError: It is no box.
        """
        box = self._images.optional("box", self.image_number(sample))
        if box is None:
            return None
        if len(box) != 4 or not (np.isfinite(box).all() and box[0] < box[2] and box[1] < box[3]):
            raise StoreError(
                f"{self.path} holds the picture box {box} for sample {self.id(sample)!r}; encode "
                f"the store again with resume=False"
            )
        return (*box,)

    def prompt_ids(self, sample: int) -> npt.NDArray[np.int64]:
        """Return the prompt's token ids, one image placeholder per run of tokens, ``(P,)``."""
        return self._samples.view("prompt_ids", sample).astype(np.int64)

    def visual_at(self, sample: int) -> tuple[int, ...]:
        """Return the places of the image placeholders in the prompt."""
        places = self._samples.optional("visual_at", sample)
        return tuple(places or (self._samples.value("image_at", sample),))

    def question_span(self, sample: int) -> tuple[int, int]:
        """Return where the question's text starts and stops in the prompt."""
        value = self._samples.value
        return value("question_start", sample), value("question_stop", sample)

    def answer_ids(self, sample: int) -> list[npt.NDArray[np.int64]]:
        """Return the token ids of each answer, end token included."""
        return [np.asarray(a, np.int64) for a in self._samples.value("answer_ids", sample)]

    def question(self, sample: int) -> str:
        """Return the question's text."""
        return str(self._samples.value("question", sample))

    def answers(self, sample: int) -> tuple[str, ...]:
        """Return the accepted answers, the reference first."""
        return tuple(self._samples.value("answers", sample))

    def id(self, sample: int) -> str:
        """Return the sample's id."""
        return str(self._samples.value("id", sample))

    def question_type(self, sample: int) -> str:
        """Return the question type."""
        return str(self._samples.value("kind", sample))

    def grader(self, sample: int) -> str:
        """Return the name of the grader of free text; the column keeps its first name."""
        return str(self._samples.value("metric", sample))

    # Channels ------------------------------------------------------------------------------

    def _channel(self, name: str) -> Channel:
        return find_channel(self._channels, name, self.path)

    @property
    def code_width(self) -> int:
        """Width d of the codes.

        Raises:
            StoreError: No autoencoder has written codes yet.
        """
        return self._channel(CODES).width

    def has_channel(self, name: str) -> bool:
        """Return whether a channel was written."""
        return name in self._channels

    def channel(self, name: str, index: int) -> npt.NDArray[np.float32]:
        """Return one array of a channel, ``(n,)`` or ``(n, width)`` float32.

        ``index`` is the image number for a per-image channel, else the sample number.

        Raises:
            StoreError: The channel was not written.
        """
        return self._channel(name).array(index)

    def channel_meta(self, name: str) -> dict[str, Any]:
        """Return what the channel's writer said about it.

        Raises:
            StoreError: The channel was not written.
        """
        return dict(self._channel(name).meta)

    def write_channel(
        self,
        name: str,
        arrays: Iterable[npt.ArrayLike],
        per: Literal["image", "sample"] = "image",
        meta: Mapping[str, Any] | None = None,
        dtype: Literal["float16", "float32"] = "float32",
    ) -> None:
        """Add or replace a channel: one number or vector per visual token.

        Args:
            name: Small letters, digits and underscores.
            arrays: ``(n,)`` or ``(n, width)`` for each image or sample in order; may be a
                generator, one array is in memory at a time.
            per: What the arrays are about.
            meta: JSON values to store beside it.
            dtype: Type on disk.

        Raises:
            StoreError: An array has the wrong shape or non-finite values, or there are too
                few or too many; nothing is changed then.
            FolderInUseError: Another process encodes into the store or writes a channel.
        """
        counts = self._counts if per == "image" else self._counts[self._image_numbers]
        label = self.image_id if per == "image" else self.id
        with folder_lock(self.path, f"writing {name!r}"):
            write_channel(
                self.path, self.manifest, name, arrays, counts, label, per, dict(meta or {}), dtype
            )
        self._channels = self._load_channels(verify="sizes")
        self.fingerprint = self._fingerprint()


def _reopen(location: str, fingerprint: str) -> FeatureStore:
    store = FeatureStore.open(location)
    if store.fingerprint != fingerprint:
        raise StoreError(
            f"the feature store {location} changed since it was sent to this process "
            f"(fingerprint {store.fingerprint}, expected {fingerprint}); start the run again"
        )
    return store
