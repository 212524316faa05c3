"""Token pruning for vision-language models as a reinforcement-learning environment (TPRL).

Importing the package registers the environment id and loads nothing heavy; the names below are
imported the first time they are used.

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

# id -> (class of one environment, class of the vector environment).
_ENVIRONMENTS = {
    "tprl_env/TokenPruning-v0": (
        "tprl_env.env:TokenPruningEnv",
        "tprl_env.env:TokenPruningVectorEnv",
    ),
}

__all__ = ["register", *_EXPORTS]


def register() -> None:
    """Register every id with gymnasium; ids already there are left alone.

    Called on import and through the entry point group ``gymnasium.envs``, in either order.
    """
    for env_id, (single, vector) in _ENVIRONMENTS.items():
        if env_id not in gymnasium.registry:
            gymnasium.register(id=env_id, entry_point=single, vector_entry_point=vector)


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
