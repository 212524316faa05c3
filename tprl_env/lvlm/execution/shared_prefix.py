"""Several questions or draws about one image: the layers before the first cut run once for it.

Attention is causal and the image comes before the question, so nothing in front of the question
depends on it. The prefix (text before the image and its visual tokens) runs once per distinct
image; the rest of each sequence runs behind the prefix's keys and values.

Shapes: R sequences, U distinct prefixes of P places, T = S - P places behind them, D width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tprl_env.lvlm.execution.attention import Probe, probing


@dataclass(frozen=True)
class SharedPrefix:
    """Which sequences begin alike.

    Attributes:
        group: (R,) int64, number of each sequence's prefix.
        leaders: (U,) int64, the first sequence with each prefix.
        length: P, the same for all.
    """

    group: Tensor
    leaders: Tensor
    length: int

    def spread(self, prefix: Tensor, rest: Tensor, dim: int = 1) -> Tensor:
        """Put (U, ..., P, ...) and (R, ..., T, ...) together: (R, ..., S, ...)."""
        group = self.group.to(prefix.device)
        return torch.cat([prefix.index_select(0, group), rest.to(prefix.device)], dim)


def shared_prefix(
    prefixes: Sequence[Hashable], lengths: Sequence[int], device: torch.device
) -> SharedPrefix | None:
    """Sequences with equal prefixes; ``None`` where sharing is impossible or brings nothing.

    Args:
        prefixes: R things that are equal where the prefixes are.
        lengths: R lengths of the prefixes.
        device: Where the numbers go.
    """
    numbers: dict[Hashable, int] = {}
    group = [numbers.setdefault(prefix, len(numbers)) for prefix in prefixes]
    if len(numbers) == len(prefixes) or len(set(lengths)) != 1 or lengths[0] == 0:
        return None
    leaders = [group.index(number) for number in range(len(numbers))]
    return SharedPrefix(
        torch.tensor(group, device=device), torch.tensor(leaders, device=device), lengths[0]
    )


class _KeepsKeys:
    """In place of a cache: remembers the keys and values of every layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        self.layers[layer] = (keys, values)
        return keys, values


class _BehindPrefix:
    """In place of a cache: puts the prefix's keys and values before those of the rest."""

    def __init__(self, known: _KeepsKeys, shared: SharedPrefix) -> None:
        self._known, self._shared = known, shared

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        known = self._known.layers[layer]
        return tuple(
            self._shared.spread(one, mine, 2)
            for one, mine in zip(known, (keys, values))  # noqa: B905
        )


def run_shared(
    text: Any,
    hidden: Tensor,
    rotary: tuple[Tensor, Tensor],
    shared: SharedPrefix,
    layers: range,
    probe: Probe | None = None,
) -> Tensor:
    """States (R, S, D) behind the first layers; the probe sees the rest's queries, all keys.

    Args:
        text: The language model.
        hidden: (R, S, D) input embeddings.
        rotary: Cosines and sines (R or 1, S, d).
        shared: The prefixes.
        layers: From layer 0 on.
        probe: What watches the attention behind the prefixes.
    """
    size, begin = hidden.shape[1], shared.length
    rows = hidden.shape[0]
    cos, sin = (one.expand(rows, -1, -1) for one in rotary)
    keeps = _KeepsKeys()
    prefix = hidden[shared.leaders, :begin]
    front = (cos[shared.leaders, :begin], sin[shared.leaders, :begin])
    for number in layers:
        prefix = text.layers[number](
            prefix,
            attention_mask=None,
            position_embeddings=front,
            past_key_values=keeps,
            use_cache=True,
        )
    rest = hidden[:, begin:]
    behind = (cos[:, begin:], sin[:, begin:])
    place = torch.arange(size, device=hidden.device)
    visible = (place <= place[begin:, None])[None, None].expand(rows, 1, -1, -1)
    given = _BehindPrefix(keeps, shared)
    with contextlib.nullcontext() if probe is None else probing(probe):
        for number in layers:
            rest = text.layers[number](
                rest,
                attention_mask=visible,
                position_embeddings=behind,
                past_key_values=given,
                use_cache=True,
            )
    return shared.spread(prefix, rest)
