"""Weights on disk: ``config.json`` next to ``model.safetensors``, strict and without pickle.

The configuration is written into the header of the weights as well: a folder whose two files do
not come from the same save is refused instead of loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tprl_env.files import write_atomically, write_text

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


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
    header = {"kind": kind, "config": json.dumps(config, sort_keys=True)}
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
        raise ValueError(f"{path} must describe a {kind}, got {found!r}")
    return {key: value for key, value in content.items() if key != "kind"}


def load_weights(
    folder: str | Path, *, kind: str, config: dict[str, Any], module: nn.Module
) -> None:
    """Load weights into ``module``: every key and shape must match.

    Args:
        folder: What :func:`save_weights` wrote.
        kind: As saved.
        config: The fields of ``config.json``; must equal those in the weights' header.
        module: Receives the weights.

    Raises:
        FileNotFoundError: When the file is missing.
        ValueError: When it is torn, of another configuration, or keys or shapes differ.
    """
    path = _existing(folder, WEIGHTS_NAME)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save the model again") from error
    if header.get("kind") != kind or header.get("config") != json.dumps(config, sort_keys=True):
        raise ValueError(
            f"{path} and {CONFIG_NAME} come from different saves; copy both files of one folder"
        )
    _check_fit(path, tensors, module.state_dict())
    module.load_state_dict(tensors, strict=True)


def _check_fit(path: Path, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its configuration: missing {', '.join(missing) or 'nothing'}, "
            f"unexpected {', '.join(extra) or 'nothing'}"
        )
    for key, value in wanted.items():
        if found[key].shape != value.shape:
            raise ValueError(
                f"{path}: {key} must have shape {tuple(value.shape)}, got {tuple(found[key].shape)}"
            )


def _existing(folder: str | Path, name: str) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; pass one written by save_pretrained")
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name}; pass one written by save_pretrained")
    return path
