"""Where a model's weights go: one device, or several GPUs of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch

from tprl_env.checks import check_choice
from tprl_env.lvlm.loading.supported import pick_device
from tprl_env.lvlm.loading.weights import check_on_gpus, load_model

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")
"""How the library spreads a model over the GPUs that it finds; "auto" is "balanced"."""

DeviceMap = str | Mapping[str, Any]
"""One of :data:`STRATEGIES`, or a GPU for each part of the model by its name."""


def first_device(
    device: str | torch.device | None, device_map: DeviceMap | None = None
) -> torch.device:
    """The device that the number type is chosen for, once both arguments are checked.

    Args:
        device: One device for all weights; ``None``: the GPU if there is one.
        device_map: Several GPUs; ``None``: one device.

    Raises:
        ImportError: A device map without accelerate, which the library splits models with.
        ValueError: Both are given, the map is of no known kind or names what is not a GPU of this
            machine, or this machine has none.
    """
    if device_map is None:
        return pick_device(device)
    if device is not None:
        raise ValueError(
            f"device={str(device)!r} is one device and device_map={device_map!r} several; give one "
            f"of the two"
        )
    if isinstance(device_map, str):
        check_choice("device_map", device_map, STRATEGIES)
    elif not isinstance(device_map, Mapping) or not device_map:
        raise ValueError(
            f"device_map must be one of {', '.join(STRATEGIES)}, or a GPU by the name of each part "
            f"such as {{'': 0}}, got {device_map!r}"
        )
    check_splitting()
    if not torch.cuda.device_count():
        raise ValueError(
            "device_map spreads a model over GPUs, and this machine shows torch none; leave it "
            "out, or give device='cpu'"
        )
    for part, place in {} if isinstance(device_map, str) else device_map.items():
        if pick_device(f"cuda:{place}" if isinstance(place, int) else place).type != "cuda":
            check_on_gpus({part: place})
    return torch.device("cuda")


def check_splitting() -> None:
    """Refuse to split a model where accelerate is missing.

    Raises:
        ImportError: It is.
    """
    if find_spec("accelerate") is None:
        raise ImportError(
            "a model over several GPUs needs accelerate; install it with "
            "pip install 'tprl-env[gpus]'"
        )


def load_onto(
    model_class: Any,
    source: str,
    device: torch.device,
    device_map: DeviceMap | None = None,
    **options: Any,
) -> Any:
    """Load a model to where it shall run; see :func:`load_model` for the rest and its errors."""
    if device_map is None:
        return load_model(model_class, source, **options).to(device)
    where = device_map if isinstance(device_map, str) else dict(device_map)
    return load_model(model_class, source, device_map=where, **options)
