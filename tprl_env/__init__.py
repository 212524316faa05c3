"""Token pruning for vision-language models as a reinforcement-learning environment (TPRL).

Importing the package registers the environment ids and loads nothing heavy; the names below are
imported the first time they are used. Gymnasium finds an id only after this import, which
``gym.make("tprl_env:tprl_env/TokenPruning-v0")`` does by itself.

>>> import gymnasium as gym
>>> import tprl_env
>>> env = gym.make("tprl_env/TokenPruning-v0")
"""

from __future__ import annotations

import importlib
from typing import Any

import gymnasium

__version__ = "0.1.0"

# name -> module that defines it; resolved on first use so that torch stays out of a plain import.
_EXPORTS = {
    "FeatureStore": "tprl_env.data.features",
    "PruningPolicy": "tprl_env.policy",
    "TokenPruningEnv": "tprl_env.env",
    "TokenPruningVectorEnv": "tprl_env.env",
    "load_lvlm": "tprl_env.lvlm",
    "make_pruner": "tprl_env.reducers",
    "open_source": "tprl_env.data.features",
}

# id -> arguments of the environment; all ids are one class and one vector class.
_ENVIRONMENTS: dict[str, dict[str, Any]] = {
    "tprl_env/TokenPruning-v0": {},
    "tprl_env/TokenPruningToy-v0": {
        "source": "toy:samples=64,tokens=8",
        "max_steps": 1,
        "beta": 1.0,
    },
}

__all__ = ["register", *_EXPORTS]


def register() -> None:
    """Register every id with gymnasium, as the import does; ids already there are left alone."""
    for env_id, arguments in _ENVIRONMENTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(
                id=env_id,
                entry_point="tprl_env.env:TokenPruningEnv",
                vector_entry_point="tprl_env.env:TokenPruningVectorEnv",
                kwargs=arguments,
            )


def __getattr__(name: str) -> Any:
    """Import an exported name from its module on first use (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names for completion, the lazy ones included."""
    return sorted({*globals(), *_EXPORTS})


register()
