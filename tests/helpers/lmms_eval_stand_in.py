"""The names that the plug-in takes from lmms-eval, for tests without it (0.7.3's signatures)."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock


@dataclass
class Instance:
    """One request."""

    request_type: str
    arguments: tuple[Any, ...]
    idx: int
    task_name: str = "task"
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def args(self) -> tuple[Any, ...]:
        return self.arguments


@dataclass(frozen=True)
class ModelManifest:
    """A name and the classes behind it."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


class lmms:
    """The base class of models."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank


def plug_in() -> Any:
    """``tprl_env.inference.harness``, imported over the stand-ins."""
    names = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.instance", "lmms_eval.api.model",
             "lmms_eval.models", "lmms_eval.models.registry_v2", "loguru")  # fmt: skip
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    made["lmms_eval.api.instance"].Instance = Instance
    made["lmms_eval.api.model"].lmms = lmms
    made["lmms_eval.models.registry_v2"].ModelManifest = ModelManifest
    made["loguru"].logger = mock.Mock()
    with mock.patch.dict(sys.modules, made):
        sys.modules.pop("tprl_env.inference.harness", None)
        return importlib.import_module("tprl_env.inference.harness")
