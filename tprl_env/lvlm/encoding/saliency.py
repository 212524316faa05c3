"""Per-sample channels that the LVLM itself fills: what its question looks at, (n,) per sample.

A policy can imitate them (``imitation.demonstrator``), and pruners of the same names rank by them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tprl_env.data.features.manifest import StoreError
from tprl_env.data.features.store import QUESTION_ATTENTION, QUESTION_ROWS, FeatureStore
from tprl_env.lvlm.encoding.encode import check_sizes, to_numpy
from tprl_env.lvlm.stored import stored_prompt, without_fixed

if TYPE_CHECKING:
    from tprl_env.lvlm.protocol import LVLM

Maps = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
"""From prompts and visual tokens to one (n,) map each."""


def add_question_attention(store: FeatureStore, lvlm: LVLM, batch_size: int = 64) -> None:
    """Write the per-sample channel ``"question_attention"``: the LVLM's own (n,) map.

    It is what the ``question_attention`` demonstrator imitates; it costs one LVLM pass with all
    tokens per sample and is needed while training only.

    Args:
        store: A finished store.
        lvlm: The LVLM that encoded it.
        batch_size: Samples per call of the LVLM.

    Raises:
        StoreError: Another LVLM encoded the store, or the attention is not finite.
        ValueError: ``batch_size`` is below one.
    """
    _add_maps(store, lvlm, QUESTION_ATTENTION, lvlm.question_attention, {}, batch_size)


def add_question_rows(
    store: FeatureStore, lvlm: LVLM, layer: int = 0, batch_size: int = 64
) -> None:
    """Write the per-sample channel ``"question_rows"``: the question's words looked up in a layer.

    The map is what :class:`~tprl_env.reducers.layer.question_rows.QuestionRows` ranks by before
    that layer, with all tokens present. Layer 0 costs a key projection of the embedded tokens and
    no pass; layer k costs the layers below it.

    Args:
        store: A finished store.
        lvlm: The LVLM that encoded it.
        layer: The decoder layer.
        batch_size: Samples per call of the LVLM.

    Raises:
        StoreError: Another LVLM encoded the store.
        ValueError: The LVLM has no such layer, or ``batch_size`` is below one.
    """
    from tprl_env.reducers.layer.question_rows import QuestionRows

    rule = QuestionRows(layer=layer)

    def maps(prompts: Sequence[Any], tokens: Sequence[Any]) -> Sequence[Any]:
        return lvlm.saliency(prompts, tokens, rule)

    _add_maps(store, lvlm, QUESTION_ROWS, maps, {"layer": layer}, batch_size)


def _add_maps(
    store: FeatureStore, lvlm: LVLM, name: str, maps: Maps, meta: dict[str, Any], batch_size: int
) -> None:
    """Fill one channel, sample by sample."""
    check_sizes(batch_size, 1)
    if lvlm.fingerprint != store.manifest.lvlm_fingerprint:
        raise StoreError(
            f"{store.path} was encoded by the LVLM {store.manifest.lvlm} (fingerprint "
            f"{store.manifest.lvlm_fingerprint}), not by {lvlm.name} ({lvlm.fingerprint}); give "
            f"that LVLM"
        )

    def rows() -> Iterator[npt.NDArray[np.float32]]:
        numbers = iter(range(len(store)))
        while batch := list(islice(numbers, batch_size)):
            prompts = [stored_prompt(store, sample) for sample in batch]
            tokens = [store.visual(sample).tokens for sample in batch]
            for sample, one in zip(batch, maps(prompts, tokens), strict=True):
                yield without_fixed(store, sample, to_numpy(one))

    meta = {"lvlm": lvlm.name, "lvlm_fingerprint": lvlm.fingerprint, **meta}
    store.write_channel(name, rows(), per="sample", meta=meta)
