"""Weights of a checkpoint, and the refusal of everything the library only reports about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

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
            says, or not finite; the message names the first few.
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
    check_finite(model, checkpoint)
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


def check_finite(model: Any, checkpoint: str) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        ValueError: Some are; the message names the first few.
    """
    bad = [name for name, weight in model.state_dict().items() if not _finite(weight)]
    if bad:
        raise ValueError(
            f"the weights of {checkpoint!r} are not finite in {_first('tensors', bad)}; save or "
            f"fetch them again"
        )


def check_weight_files(folder: Path) -> int:
    """Read every safetensors file of a checkpoint.

    Returns:
        Number of weights.

    Raises:
        ValueError: A file is damaged, or holds weights that are not finite.
    """
    count, bad = 0, []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():
                    weight = file.get_tensor(name)
                    count += weight.numel()
                    bad += [name] * (not _finite(weight))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); save or fetch it again") from error
    if bad:
        raise ValueError(
            f"the weights in {folder} are not finite in {_first('tensors', bad)}; save or fetch "
            f"them again"
        )
    return count


def _finite(weight: torch.Tensor) -> bool:
    return not weight.is_floating_point() or bool(weight.isfinite().all())
