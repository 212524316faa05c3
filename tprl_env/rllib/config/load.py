"""Reading the Python files of ``rllib_configs/``, or one's own."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tprl_env.checks import did_you_mean
from tprl_env.rllib.config.train_config import TrainConfig

__all__ = ["load_config", "load_definitions", "presets_folder"]


def load_config(name: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config of a file, with settings replaced.

    Args:
        name: A preset of ``rllib_configs/`` (``"recommended"``), or a path to a Python file with
            ``CONFIG = TrainConfig(...)``. The file is executed: use files you trust.
        overrides: By name, such as ``{"policy.width": 64}``; strings are read as the fields' types.

    Raises:
        ValueError: For an unknown preset or setting, or a file without CONFIG.
    """
    module = load_definitions(name, "preset", "config")
    config = getattr(module, "CONFIG", None)
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{module.__file__!r} must define CONFIG = TrainConfig(...)")
    return config.replace(**dict(overrides or {}))


def load_definitions(name: str | Path, known_as: str, kind: str, folder: str = "") -> ModuleType:
    """Execute a Python file that defines a config or an experiment.

    Args:
        name: A path that ends in ``.py``, or the name of a file in ``rllib_configs/``.
        known_as: What a name is called in messages.
        kind: What a path is called in messages.
        folder: Where in ``rllib_configs/`` names are looked up.

    Raises:
        ValueError: There is no such file, naming the nearest.
    """
    path = Path(name)
    if path.suffix == ".py":
        if not path.is_file():
            raise ValueError(f"there is no {kind} file {str(name)!r}")
    else:
        home = presets_folder() / folder
        path = home / f"{str(name).replace('-', '_')}.py"
        if not path.is_file():
            known = sorted(p.stem for p in home.glob("*.py") if p.stem != "__init__")
            raise ValueError(
                f"unknown {known_as} {str(name)!r}; known: {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    spec = importlib.util.spec_from_file_location(f"_tprl_{kind}_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{str(path)!r} cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def presets_folder() -> Path:
    """The folder of the package ``rllib_configs``."""
    spec = importlib.util.find_spec("rllib_configs")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    beside = Path(__file__).resolve().parents[3] / "rllib_configs"  # a checkout, not installed
    if not beside.is_dir():
        raise ValueError("the package rllib_configs is not installed; pass a path to a config file")
    return beside
