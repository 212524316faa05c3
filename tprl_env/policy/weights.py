"""Weights on disk: ``config.json`` next to ``model.safetensors``, strict and without pickle.

The configuration is written into the header of the weights as well: a folder whose two files do
not come from the same save is refused instead of loaded. So are weights that are not finite, or
not those that were saved (their checksum is in the header too).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tprl_env.checks import quoted
from tprl_env.files import write_atomically, write_text

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
DIGEST = "sha256"
"""Field of the weights' header: the checksum of all tensors, compared whenever they are loaded."""

MOST_LAYERS, WIDEST = 1000, 1 << 20
"""Sizes that no configuration names but a damaged or hostile one."""

Built = TypeVar("Built", bound=nn.Module)
Shape = tuple[int, ...]


def weights_digest(module: nn.Module) -> str:
    """Checksum of a module's weights, the one that :func:`save_weights` writes."""
    return _digest({key: value.detach().cpu() for key, value in module.state_dict().items()})


def save_weights(
    folder: str | Path, *, kind: str, config: dict[str, Any], module: nn.Module
) -> None:
    """Write a module's configuration and weights.

    Args:
        folder: Created if needed.
        kind: What the module is; loading checks it.
        config: JSON-serialisable fields.
        module: Its state dict is stored.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
    header = {
        "kind": kind,
        "config": json.dumps(config, sort_keys=True),
        DIGEST: _digest(tensors),
    }
    text = json.dumps({"kind": kind, **config}, indent=2) + "\n"
    content = save(tensors, metadata=header)  # written here, so that a full disk is an OSError
    write_atomically(folder / WEIGHTS_NAME, lambda stream: stream.write(content))
    write_text(folder / CONFIG_NAME, text)


def read_config(folder: str | Path, *, kind: str) -> dict[str, Any]:
    """The configuration that :func:`save_weights` wrote.

    Raises:
        FileNotFoundError: When the folder or its ``config.json`` is missing.
        ValueError: When it is not JSON or describes another kind of module.
    """
    path = _existing(folder, CONFIG_NAME)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); save the model again") from error
    if not isinstance(content, dict) or content.get("kind") != kind:
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must describe a {kind}, got {quoted(found)}")
    return {key: value for key, value in content.items() if key != "kind"}


def load_module(
    folder: str | Path, *, kind: str, config: dict[str, Any], build: Callable[[], Built]
) -> Built:
    """Build a module and load its weights: every key, shape and byte must match.

    Nothing of the size that the configuration names is allocated before the file is known to hold
    as much.

    Args:
        folder: What :func:`save_weights` wrote.
        kind: As saved.
        config: The fields of ``config.json``; must equal those in the weights' header.
        build: Makes the module with any weights.

    Raises:
        FileNotFoundError: When the file is missing.
        ValueError: When it is torn or changed, of another configuration, keys or shapes differ,
            or a weight is not finite.
    """
    path = _existing(folder, WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
            _check_header(path, header, kind, config)
            with torch.device("meta"):  # shapes without memory
                skeleton = build()
            wanted = {key: tuple(value.shape) for key, value in skeleton.state_dict().items()}
            _check_fit(path, shapes, wanted)
            tensors = {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OverflowError) as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again") from error
    if DIGEST in header and header[DIGEST] != _digest(tensors):
        raise ValueError(
            f"{path} is damaged: its weights are not those that were saved (their sha256 differs); "
            f"copy the folder again or save the model again"
        )
    _check_finite(path, tensors)
    module = build()
    module.load_state_dict(tensors, strict=True)
    return module


def has_digest(folder: str | Path) -> bool:
    """Whether the weights were saved with a checksum; older releases wrote none."""
    with safe_open(_existing(folder, WEIGHTS_NAME), framework="pt") as file:
        return DIGEST in (file.metadata() or {})


def _check_header(path: Path, header: Mapping[str, str], kind: str, config: dict[str, Any]) -> None:
    if header.get("kind") != kind or header.get("config") != json.dumps(config, sort_keys=True):
        raise ValueError(
            f"{path} and {CONFIG_NAME} come from different saves; copy both files of one folder"
        )
    if unknown := header.keys() - {"kind", "config", DIGEST}:
        raise ValueError(
            f"{path} is damaged: its header has unknown fields {sorted(unknown)}; save the model "
            f"again"
        )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, types, shapes and values."""
    digest = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    bad = sorted(key for key, value in tensors.items() if not value.isfinite().all())
    if bad:
        raise ValueError(
            f"{path} holds weights that are not finite, in {_first(bad)}; use an earlier save or "
            f"train again with a lower learning rate"
        )


def _check_fit(path: Path, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its configuration: missing {_first(missing)}, unexpected "
            f"{_first(extra)}"
        )
    for key, shape in wanted.items():
        if found[key] != shape:
            raise ValueError(f"{path}: {key} must have shape {shape}, got {found[key]}")


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "nothing") + more


def _existing(folder: str | Path, name: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; pass one written by save_pretrained")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name}; pass one written by save_pretrained")
    return path
