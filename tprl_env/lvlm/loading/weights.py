"""Weights of a checkpoint, and the refusal of everything the library only reports about them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tprl_env.lvlm.loading.checkpoint import weight_files

_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
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
            says, or not finite; the message names the first few. Or they do not fit on the GPUs
            of a device map.
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
    except (TypeError, AttributeError) as error:  # of generation_config.json, the last one read
        raise ValueError(
            f"{checkpoint!r} cannot be loaded ({' '.join(str(error).split())[:200]}); fetch "
            f"config.json and generation_config.json again"
        ) from error
    check_report(report, checkpoint)
    check_on_gpus(getattr(model, "hf_device_map", {}))
    check_finite(model, checkpoint)
    return model


def check_size(model_class: Any, config: Any, folder: Path, checkpoint: str) -> None:
    """Refuse a config.json that describes a much larger model than the files hold.

    A number that is wrong by orders, or a lost part that the library replaces by that of a large
    model, would take all memory before the first weight is compared. The comparison is by the
    number of weights alone, so that names may differ between releases of the library.

    Args:
        model_class: Builds a model from ``config``.
        config: The library's config object.
        folder: Local folder with safetensors files.
        checkpoint: What the user called it.

    Raises:
        ValueError: More layers than tensors, or more than twice as many weights as in the files.
    """
    stored, tensors = 0, 0
    for path in sorted(folder / name for name in weight_files(folder)):
        header = _header(path, checkpoint)
        shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
        tensors += len(shapes)
        stored += sum(math.prod(shape) for shape in shapes)
    for name in ("text_config", "vision_config"):
        layers = getattr(getattr(config, name, None), "num_hidden_layers", 0)
        if layers > tensors:
            raise ValueError(
                f"{checkpoint!r}: {name}.num_hidden_layers of config.json is {layers}, but the "
                f"files hold {tensors} tensors; fetch config.json again"
            )
    try:
        with torch.device("meta"):
            described = sum(p.numel() for p in model_class(config).parameters())
    except (RuntimeError, TypeError, ValueError, ZeroDivisionError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{checkpoint!r}: no model can be built from config.json ({reason}); fetch it again"
        ) from error
    if described > 2 * stored:
        raise ValueError(
            f"{checkpoint!r}: config.json describes {described:,} weights, but the files hold "
            f"{stored:,}; fetch config.json and the weights again, both of one checkpoint"
        )


def _header(path: Path, checkpoint: str) -> dict[str, Any]:
    """The table at the start of a safetensors file.

    Raises:
        ValueError: The file is damaged.
    """
    if not path.is_file():
        raise ValueError(f"the weights of {checkpoint!r} lack {path.name}; fetch them again")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(_LONGEST_HEADER, path.stat().st_size):
            length = 0  # read as empty, and refused below
        text = file.read(length)
    try:
        header = json.loads(text)
        for name, entry in header.items():
            if name != "__metadata__" and not all(size >= 0 for size in entry["shape"]):
                raise ValueError("a negative size")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"the weights of {checkpoint!r} are damaged ({path.name} has no readable header); "
            f"save or fetch them again"
        ) from error
    return dict(header)


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


def check_on_gpus(places: Mapping[str, Any]) -> None:
    """Refuse parts in main memory or on disk, where every pass would wait for them.

    Args:
        places: Device by the name of each part of a model over several GPUs; empty for others.

    Raises:
        ValueError: Some are.
    """
    outside = {n: str(d) for n, d in places.items() if str(d) in ("cpu", "disk", "meta")}
    if outside:
        (part, place), more = next(iter(outside.items())), len(outside) - 1
        rest = f" and {more} more parts" if more else ""
        raise ValueError(
            f"device_map puts {part or 'the whole model'!r}{rest} on {place!r}, not on a GPU; use "
            f"more GPUs, or dtype='bfloat16' where it is wider"
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
