"""Running decoder layers one after the other while visual tokens leave in between.

The library's own layers are called; nothing is patched. Padding is on the right, so prefill needs
no mask: a place sees only earlier places, and padding comes last. Layers then hold caches of
different lengths, so each run of layers between two cuts (a :class:`Segment`) keeps which of its
cached places are real and which position comes next.

Shapes: R sequences, S places, D width, N visual tokens of the largest image. Rotary positions are
(R, S), or (3, R, S) where the family has three axes of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from tprl_env.lvlm.execution.attention import Probe, probing
from tprl_env.lvlm.execution.decoder import angles, last_layer_at, logits
from tprl_env.lvlm.execution.shared_prefix import SharedPrefix, run_shared


@dataclass(frozen=True)
class Stream:
    """The sequences between two layers.

    Attributes:
        hidden: (R, S, D), on the device of the layer that made it; all else is where the input
            embedding is, for layers may be on several GPUs.
        positions: (R, S) or (3, R, S) int64.
        lengths: (R,) int64, places that are not padding; padding comes last.
        image: (R, S) int64, the visual token's place in its full image, -1 where there is none.
        deep: (R, S, D) each, zero on text: what is added behind layers 0, 1, ... (DeepStack).
        shared: Sequences that begin alike, until the first cut; see :mod:`.shared_prefix`.
    """

    hidden: Tensor
    positions: Tensor
    lengths: Tensor
    image: Tensor
    deep: tuple[Tensor, ...] = ()
    shared: SharedPrefix | None = None

    @property
    def valid(self) -> Tensor:
        """Bool (R, S), False at padding."""
        return torch.arange(self.image.shape[1], device=self.image.device) < self.lengths[:, None]

    def take(self, keep: Tensor, behind: Tensor | None = None) -> Stream:
        """What is in ``keep`` (R, S), in order, right-padded.

        Args:
            keep: Places that stay.
            behind: Visual places (R, S) that move behind the sequence's other visual tokens.
        """
        keep = keep & self.valid
        place = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
        if behind is not None:
            last = torch.where(self.image >= 0, place, -1).amax(1, keepdim=True)
            place = torch.where(behind, last + 0.5, place.to(torch.float64))
        lengths = keep.sum(1)
        order = place.masked_fill(~keep, keep.shape[1]).argsort(dim=1, stable=True)
        order = order[:, : int(lengths.max())]
        flat = order.expand(*self.positions.shape[:-1], order.shape[1])
        padding = torch.arange(order.shape[1], device=keep.device) >= lengths[:, None]
        return Stream(
            _gather(self.hidden, order),
            self.positions.gather(-1, flat),
            lengths,
            self.image.gather(1, order).masked_fill(padding, -1),
            tuple(_gather(one, order) for one in self.deep),
        )

    def only(self, sequences: Tensor) -> Stream:
        """Some of the sequences, as they are; without what they share."""
        return Stream(
            self.hidden[sequences.to(self.hidden.device)],
            self.positions.index_select(-2, sequences),
            self.lengths[sequences],
            self.image[sequences],
            tuple(one[sequences] for one in self.deep),
        )

    def repacked(self) -> Stream:
        """The same with positions closed up, from zero."""
        places = torch.arange(self.image.shape[1], device=self.image.device)
        return replace(self, positions=places.expand_as(self.positions))

    def next_positions(self) -> Tensor:
        """(R, 1) or (3, R, 1): behind the last place; text has one number on all axes."""
        at = (self.lengths - 1)[:, None].expand(*self.positions.shape[:-1], 1)
        found = self.positions.gather(-1, at) + 1
        return found if found.ndim == 2 else found.amax(0).expand_as(found)


def _gather(values: Tensor, order: Tensor) -> Tensor:
    """(R, K, D) rows ``order`` of (R, S, D)."""
    rows, width = values.shape[0], values.shape[-1]
    order = order.to(values.device)
    flat = torch.arange(rows, device=order.device)[:, None] * values.shape[1] + order
    return values.reshape(-1, width).index_select(0, flat.flatten()).view(rows, -1, width)


class Cuts(Protocol):
    """What leaves, and before which layers."""

    @property
    def layers(self) -> Sequence[int]:
        """Ascending."""
        ...

    def probe(self, stream: Stream, layer: int) -> Probe | None:
        """What must watch the attention of the layer below ``layer``, if anything."""
        ...

    def cut(self, stream: Stream, layer: int) -> Stream:
        """The stream that enters ``layer``."""
        ...


class NoCuts:
    """Nothing leaves.

    Attributes:
        layers: None.
    """

    layers: Sequence[int] = ()

    def probe(self, stream: Stream, layer: int) -> Probe | None:
        """Nothing."""
        return None

    def cut(self, stream: Stream, layer: int) -> Stream:
        """The same stream."""
        return stream


class Replay:
    """Drops what an array of lifetimes says; see ``LVLM.score``.

    Attributes:
        layers: Before which something leaves.
    """

    def __init__(self, lives: Tensor, num_layers: int, contiguous: bool) -> None:
        """Prepare.

        Args:
            lives: (R, N) integers; rows of smaller images are padded with anything.
            num_layers: Decoder layers.
            contiguous: Close up positions after every cut.
        """
        self._lives, self._contiguous = lives.long(), contiguous
        seen = torch.unique(self._lives).tolist()
        self.layers = [int(layer) for layer in seen if 0 < layer < num_layers]

    def probe(self, stream: Stream, layer: int) -> Probe | None:
        """Nothing."""
        return None

    def cut(self, stream: Stream, layer: int) -> Stream:
        """Keep text and the tokens that live longer."""
        lives = self._lives.gather(1, stream.image.clamp(min=0))
        stream = stream.take((stream.image < 0) | (lives > layer))
        return stream.repacked() if self._contiguous else stream


@dataclass
class Segment:
    """Layers between two cuts, for decoding.

    Attributes:
        layers: The layers.
        valid: bool (R, S + written), cached places that are not padding.
        next_positions: (R, 1) or (3, R, 1), position of the next token.
    """

    layers: range
    valid: Tensor
    next_positions: Tensor


def advance(
    text: Any, stream: Stream, layers: range, cache: Any = None, probe: Probe | None = None
) -> Stream:
    """The stream behind some layers, whose attention ``probe`` watches."""
    if not layers:
        return stream
    hidden = stream.hidden
    rotary = angles(text, hidden, stream.positions)
    if stream.shared is not None and layers.start == 0 and cache is None and not stream.deep:
        hidden = run_shared(text, hidden, rotary, stream.shared, layers, probe)
        return replace(stream, hidden=hidden)
    with contextlib.nullcontext() if probe is None else probing(probe):
        hidden = _run(text, stream, rotary, layers, cache)
    return replace(stream, hidden=hidden)


def _run(
    text: Any, stream: Stream, rotary: tuple[Tensor, Tensor], layers: range, cache: Any
) -> Tensor:
    hidden = stream.hidden
    for number in layers:
        hidden = text.layers[number](
            hidden,
            attention_mask=None,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=cache is not None,
        )
        if number < len(stream.deep):
            hidden = hidden + stream.deep[number].to(hidden.device)
    return hidden


def run_with_cuts(
    text: Any, stream: Stream, cuts: Cuts, stop: int, cache: Any = None
) -> tuple[Stream, list[Segment]]:
    """Layers 0 to ``stop`` - 1, with every cut before or at ``stop``; before the final norm."""
    segments: list[Segment] = []
    start = 0
    for layer in (*(one for one in cuts.layers if one <= stop), None):
        until = stop if layer is None else layer
        probe = None if layer is None else cuts.probe(stream, layer)
        stream = advance(text, stream, range(start, until), cache, probe)
        if until > start:
            next_positions = stream.next_positions()
            segments.append(Segment(range(start, until), stream.valid, next_positions))
        if layer is not None:
            stream = cuts.cut(stream, layer)
        start = until
    return stream, segments


def states_with_cuts(text: Any, stream: Stream, cuts: Cuts, from_end: Tensor) -> Tensor:
    """Normed final states (R, A, D) at places counted from each sequence's end, 1 = the last.

    In the last layer only the wanted places get queries and an MLP, as without cuts.
    """
    depth = len(text.layers)
    if len(stream.deep) >= depth:
        raise ValueError(f"additions behind {len(stream.deep)} layers reach the last of {depth}")
    stream, _ = run_with_cuts(text, stream, cuts, depth - 1)
    places = (stream.lengths[:, None] - from_end).clamp(min=0)
    rotary = angles(text, stream.hidden, stream.positions)
    return last_layer_at(text, stream.hidden, rotary, places)


def decode_step(text: Any, tokens: Tensor, segments: Sequence[Segment], cache: Any) -> Tensor:
    """Normed final states (R, D) behind one more token (R,), which every layer caches."""
    hidden = text.embed_tokens(tokens[:, None])
    for segment in segments:
        segment.valid = torch.cat([segment.valid, segment.valid.new_ones(len(tokens), 1)], 1)
        rotary = angles(text, hidden, segment.next_positions)
        segment.next_positions = segment.next_positions + 1
        for number in segment.layers:
            hidden = text.layers[number](
                hidden,
                attention_mask=segment.valid[:, None, None],
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=True,
            )
    states: Tensor = text.norm(hidden)
    return states[:, 0]


def greedy_with_cuts(
    text: Any,
    head: Tensor,
    stream: Stream,
    cuts: Cuts,
    eos_ids: Collection[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """As :func:`~tprl_env.lvlm.execution.decoder.greedy`, with tokens leaving between layers.

    Returns:
        Per sequence the generated ids without the end token.
    """
    rows = len(stream.lengths)
    cache = DynamicCache(config=text.config)
    stream, segments = run_with_cuts(text, stream, cuts, len(text.layers), cache)
    hidden = stream.hidden
    ends = (stream.lengths - 1).to(hidden.device)
    states = text.norm(hidden[torch.arange(rows, device=hidden.device), ends])
    written: list[list[int]] = [[] for _ in range(rows)]
    running = [True] * rows
    for step in range(max_new_tokens):
        chosen = logits(states, head).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            if running[row] and token in eos_ids:
                running[row] = False
            elif running[row]:
                written[row].append(token)
        if not any(running) or step + 1 == max_new_tokens:
            break
        states = decode_step(text, chosen, segments, cache)
    return written
