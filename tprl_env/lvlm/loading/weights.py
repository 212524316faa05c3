"""Weights of a checkpoint, and the refusal of everything the library only reports about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError

_NAMED = 3
"""Keys of a kind that a message names; the rest are counted."""

_DERIVED = ("position_ids", "inv_freq")
"""Constants that older releases saved beside the weights and newer ones compute."""


def load_model(
    model_class: Any, source: str, *, checkpoint: str, dtype: torch.dtype, **options: Any
) -> Any:
    """Load a model of which every weight comes from the checkpoint, and no weight is left over.

    The library fills weights that it does not find with random numbers and says so in a report
    only, hence the report decides here. Weights that the config ties (a head that is the input
    embedding) are not missing.

    Args:
        model_class: Has the library's ``from_pretrained``.
        source: Folder or hub id.
        checkpoint: What the user called it.
        dtype: Of the weights.
        **options: Passed on, such as the revision.

    Raises:
        ValueError: Weights are damaged, missing, unexpected or of another shape than config.json
            says; the message names the first few.
    """
    try:
        model, report = model_class.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # only to have them all reported; see check_report
            **options,
        )
    except SafetensorError as error:
        raise ValueError(
            f"the weights of {checkpoint!r} are damaged ({error}); save or fetch them again"
        ) from error
    check_report(report, checkpoint)
    return model


def check_report(report: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse a load in which the library reported anything.

    Raises:
        ValueError: It did.
    """
    unexpected = [k for k in report["unexpected_keys"] if not k.endswith(_DERIVED)]
    shapes = [
        f"{key} ({tuple(found)} in the file, {tuple(wanted)} by {_decides(key)})"
        for key, found, wanted in report["mismatched_keys"]
    ]
    found = [
        _first(label, keys)
        for label, keys in (
            ("missing", report["missing_keys"]),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("not loaded", report["error_msgs"]),
        )
        if keys
    ]
    if found:
        raise ValueError(
            f"the weights of {checkpoint!r} do not fit its config.json: {'; '.join(found)}; "
            f"save or fetch both again, what is missing would be random"
        )


def _decides(key: str) -> str:
    """What the shape of a weight comes from."""
    words = key.endswith(("embed_tokens.weight", "lm_head.weight"))
    return "text_config.vocab_size and hidden_size" if words else "config.json"


def _first(label: str, keys: Iterable[str]) -> str:
    names = sorted(keys)
    rest = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{len(names)} {label}: {', '.join(names[:_NAMED])}{rest}"
