"""``tprl train [CONFIG] --help``: every setting with its type, its default and its meaning.

tyro lays the help out, from the dataclasses and their docstrings. The settings themselves are read
by `TrainConfig.replace`, whose complaints are one sentence; types are shown as it reads them.
"""

from __future__ import annotations

import contextlib
import io
import json
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from tprl_env.rllib.config import (
    GrpoSettings,
    MapoSettings,
    PpoSettings,
    TrainConfig,
    load_config,
)

__all__ = ["settings_help"]

_REGISTRY = ConstructorRegistry()
_METAVARS: dict[Any, str] = {
    int: "INT",
    float: "FLOAT",
    str: "TEXT",
    bool: "true|false",
    tuple: "LOW,HIGH",
    dict: "JSON",
    type(None): "none",
}


@dataclass(frozen=True, kw_only=True)
class _EveryAlgorithm(MapoSettings, GrpoSettings, PpoSettings):
    """The settings of all algorithms; those that only some have name them in brackets."""

    name: Literal["ppo", "grpo", "mapo"] = "ppo"  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class _EverySetting(TrainConfig):
    algorithm: _EveryAlgorithm = field(default_factory=_EveryAlgorithm)  # type: ignore[assignment]


def settings_help(name: str | None) -> str:
    """The settings of a config.

    Args:
        name: Preset or file whose values are shown; None for the defaults, with the settings of
            all algorithms.

    Raises:
        ValueError: For an unknown preset.
    """
    shown: TrainConfig = _EverySetting() if name is None else load_config(name)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        tyro.cli(
            type(shown),
            default=shown,
            args=["--help"],
            description="",
            registry=_REGISTRY,
            config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
        )
    _usage, _, boxes = text.getvalue().partition("\n\n")  # the usage is argparse's to tell
    return "\n".join(line.rstrip() for line in boxes.strip().splitlines())


@_REGISTRY.primitive_rule
def _one_word(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Show a type as the single word that `tprl_env.rllib.config.values` reads; None: not ours."""
    hint: Any = info.type
    metavars = [
        _metavar(option)
        for option in (typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,))
    ]
    if not all(metavars):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(dict.fromkeys(metavars)),
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: True,
        str_from_instance=lambda value: [_word(value)],
    )


def _metavar(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    return _METAVARS.get(typing.get_origin(hint) or hint, "")


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return "none" if value is None else str(value)
