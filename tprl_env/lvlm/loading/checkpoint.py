"""Finding, checking and identifying a checkpoint before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_LOADED = (
    *("config.json", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)
"""Files that decide how a checkpoint computes, beside its weights."""

_OWN_RECORD = "training.json"
"""Written beside this package's own LVLMs; counted there, as in the first stores' fingerprints."""

_CHUNK = 1 << 22


def is_local(checkpoint: str) -> bool:
    """Whether ``checkpoint`` means a folder here rather than ``owner/name`` on the hub."""
    path = Path(checkpoint).expanduser()
    return (
        path.exists()
        or path.is_absolute()
        or checkpoint.startswith((".", "~"))
        or checkpoint.count("/") != 1
        or "\\" in checkpoint
    )


def check_folder(checkpoint: str) -> Path:
    """Return the folder of a local checkpoint, or say why it cannot be one.

    Raises:
        FileNotFoundError: No such folder, or no ``config.json`` in it.
        ValueError: It holds no safetensors weights under a name that the library loads.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"LVLM folder {checkpoint!r} does not exist; give a checkpoint folder, a hub id "
            f"'owner/name', or 'builtin:crowded'"
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"LVLM folder {checkpoint!r} has no config.json; it must be what "
            "save_pretrained() writes"
        )
    if not (folder / _WEIGHTS).is_file() and not (folder / _INDEX).is_file():
        pickles = sorted(p.name for pattern in _PICKLES for p in folder.glob(pattern))
        found = f"only pickle files ({', '.join(pickles[:3])})" if pickles else "no weights"
        raise ValueError(
            f"LVLM folder {checkpoint!r} holds {found}, but weights are read from safetensors "
            f"alone; "
            f"convert them with model.save_pretrained(folder)"
        )
    return folder


def read_config(checkpoint: str, revision: str | None = None) -> dict[str, Any]:
    """Read ``config.json`` of a local folder or hub repository as plain data.

    Raises:
        FileNotFoundError: The folder is missing or the hub has no such repository within reach.
        ValueError: The file is not JSON, or a local folder holds no safetensors weights.
    """
    if is_local(checkpoint):
        path = check_folder(checkpoint) / "config.json"
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError

        try:
            path = Path(hf_hub_download(checkpoint, "config.json", revision=revision))
        except (OSError, HfHubHTTPError) as error:
            raise FileNotFoundError(
                f"{checkpoint!r} is neither an existing folder nor a reachable hub repository "
                f"({type(error).__name__}); check the name, the revision and the network"
            ) from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{checkpoint!r}: config.json is no valid JSON ({error}); fetch it again"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(
            f"{checkpoint!r}: config.json must hold an object, got {type(config).__name__}"
        )
    return config


def folder_fingerprint(folder: Path) -> str:
    """sha256 over names and contents of all files that decide what the model computes.

    These are the weights that the library loads (``model.safetensors``, else those that the index
    names), the configuration, and the files of tokenizer and image processor. Other files in the
    folder change nothing.
    """
    total = hashlib.sha256()
    for path in sorted(folder / name for name in _loaded_files(folder)):
        part = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                part.update(chunk)
        total.update(f"{path.name}\0{part.hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def weight_files(folder: Path) -> set[str]:
    """Names of the files that the library reads weights from; others in the folder are not read.

    Raises:
        ValueError: The index does not name files.
    """
    if (folder / _WEIGHTS).is_file():
        return {_WEIGHTS}
    shards = _read_object(folder / _INDEX).get("weight_map")
    named = list(shards.values()) if isinstance(shards, dict) else []
    if not named or not all(_is_name(one) for one in named):
        raise ValueError(
            f"{folder / _INDEX} is damaged: weight_map must give a file name in its folder for "
            f"each weight; save or fetch it again"
        )
    return set(named)


def _loaded_files(folder: Path) -> set[str]:
    """Names of the files of a checkpoint that count."""
    names = {name for name in _LOADED if (folder / name).is_file()}
    names |= weight_files(folder)
    if _WEIGHTS not in names:
        names.add(_INDEX)
    if (folder / _OWN_RECORD).is_file() and "recipe" in _read_object(folder / _OWN_RECORD):
        names.add(_OWN_RECORD)
    return names


def _is_name(value: object) -> bool:
    return isinstance(value, str) and Path(value).name == value


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file holds something else, which then is not ours."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
