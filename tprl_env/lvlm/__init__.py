"""Frozen vision-language models that answer from a part of their visual tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from tprl_env.checks import did_you_mean

if TYPE_CHECKING:
    import torch

    from tprl_env.lvlm.loading.devices import DeviceMap
    from tprl_env.lvlm.protocol import LVLM

FAMILIES: dict[str, tuple[str, str]] = {
    "llava": ("tprl_env.lvlm.families.llava", "LlavaLVLM"),
    **dict.fromkeys(
        (
            *("llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"),
            *("smolvlm", "idefics3", "video_llava"),
        ),
        ("tprl_env.lvlm.families.library", "LibraryLVLM"),
    ),
}
"""Module and class by the ``model_type`` of a checkpoint's config.json."""

RELATIVES: dict[str, str] = {
    "gemma3": "its sliding layers count places, which change when tokens leave",
    "qwen3_5": "its linear-attention layers have no row per token to drop",
    "qwen2_5_omni": "sound is not taken; its pictures work like those of qwen2_5_vl",
    "llava_next_video": "videos are not taken yet; its pictures work like those of llava_next",
    "mllama": "its pictures enter through cross-attention, not as tokens of the prompt",
    "internvl_chat": "this is the authors' own format; take the checkpoint that ends in -hf",
}
"""Why relatives of the known families cannot be loaded, by ``model_type``."""

_BUILTIN = "builtin:"


def load_lvlm(
    checkpoint: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    device_map: DeviceMap | None = None,
) -> LVLM:
    """Load a frozen LVLM.

    Args:
        checkpoint: ``"builtin:crowded"`` or ``"builtin:sparse"`` (shipped with the package), a
            checkpoint folder, or a hub id such as ``"llava-hf/llava-1.5-7b-hf"``.
        device: Default: the GPU if there is one, else the CPU.
        dtype: Default: bfloat16 on a GPU, float32 on the CPU.
        revision: Branch, tag or commit of a hub repository.
        device_map: Several GPUs of this machine instead of ``device``: ``"auto"`` spreads the
            layers evenly, ``"sequential"`` fills one GPU after the other, and a mapping gives a
            GPU for each part by its name. Layers run one after the other, so this makes room, not
            speed.

    Raises:
        ImportError: Transformers is not installed, or accelerate for a device map.
        FileNotFoundError: No such folder or repository.
        ValueError: The checkpoint's family is not supported, or it has pickle weights only.
    """
    source, kind = find_lvlm(checkpoint, revision)
    module, name = FAMILIES[kind]
    with _naming_the_extra():
        family = getattr(import_module(module), name)
    lvlm: LVLM = family.from_pretrained(
        source, device=device, dtype=dtype, revision=revision, device_map=device_map
    )
    return lvlm


def find_lvlm(checkpoint: str | Path, revision: str | None = None) -> tuple[str, str]:
    """Find a checkpoint that :func:`load_lvlm` could load, without loading any weight.

    Args:
        checkpoint: As for :func:`load_lvlm`.
        revision: Branch, tag or commit of a hub repository.

    Returns:
        Folder or hub id, and the ``model_type`` of its family.

    Raises:
        ImportError: Transformers is not installed.
        FileNotFoundError: No such folder or repository.
        ValueError: There is no such built-in LVLM, the checkpoint's family is not supported, or
            it has pickle weights only.
    """
    source = str(checkpoint)
    with _naming_the_extra():
        from tprl_env.lvlm.loading.checkpoint import read_config

        if source.startswith(_BUILTIN):
            from tprl_env.data.scenes import TASKS
            from tprl_env.lvlm.tiny import builtin_path

            known = [f"{_BUILTIN}{task}" for task in TASKS]
            if source not in known:
                raise ValueError(
                    f"there is no LVLM {source!r}; built in are {', '.join(known)}"
                    f"{did_you_mean(source, known)}"
                )
            source = str(builtin_path(source.removeprefix(_BUILTIN)))
        kind = read_config(source, revision).get("model_type")
    if kind not in FAMILIES:
        why = f" ({RELATIVES[kind]})" if kind in RELATIVES else ""
        raise ValueError(
            f"{source!r} has model_type {kind!r}, which cannot be run{why}; known are "
            f"{', '.join(sorted(FAMILIES))}{did_you_mean(str(kind), FAMILIES)}"
        )
    return source, kind


@contextmanager
def _naming_the_extra() -> Iterator[None]:
    """Say how to install what an LVLM needs where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("transformers", "torch", "huggingface_hub"):
            raise
        raise ImportError(
            f'an LVLM needs {error.name}, which is not installed: pip install "tprl-env[lvlm]"'
        ) from error
