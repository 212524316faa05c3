"""Scorers for the tests of the pool and of training; built inside actors by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from tprl_env.data.features.store import open_source
from tprl_env.data.features.toy import ToyScorer
from tprl_env.scoring.spec import ScorerSpec


def slow(spec: ScorerSpec) -> Any:
    """The toy rule, `options["seconds"]` late."""
    inner = ToyScorer(open_source(spec.source), spec.score_kind)

    def score(samples: np.ndarray, keep: np.ndarray) -> np.ndarray:
        time.sleep(spec.options["seconds"])
        return inner(samples, keep)

    return score


def failing(spec: ScorerSpec) -> Any:
    """Raises on `options["sample"]`, after `options["after"]` calls."""
    inner = ToyScorer(open_source(spec.source), spec.score_kind)
    calls = [0]

    def score(samples: np.ndarray, keep: np.ndarray) -> np.ndarray:
        calls[0] += 1
        if calls[0] > spec.options.get("after", 0) and spec.options["sample"] in samples:
            raise ArithmeticError("no number for this one")
        return inner(samples, keep)

    return score


def poisonous(spec: ScorerSpec) -> Any:
    """Kills its own process when it meets `options["sample"]`; writes each death to a file."""
    inner = ToyScorer(open_source(spec.source), spec.score_kind)

    def score(samples: np.ndarray, keep: np.ndarray) -> np.ndarray:
        if spec.options["sample"] in samples:
            with Path(spec.options["log"]).open("a") as log:
                log.write(f"{len(samples)}\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(samples, keep)

    return score


def nonsense(spec: ScorerSpec) -> Any:
    """Returns NaN."""
    return lambda samples, keep: np.full(len(samples), np.nan, np.float32)


def unbuildable(spec: ScorerSpec) -> Any:
    """Cannot be built."""
    raise FileNotFoundError("the weights are missing")


class Layered:
    """Four layers: the mean life of the tokens over four, a mask as lives of 0 and 4."""

    num_layers = 4

    def __call__(self, samples: np.ndarray, keep: np.ndarray) -> np.ndarray:
        time.sleep(0.05)  # requests that come meanwhile are waiting together
        lives = keep if keep.dtype == np.uint8 else keep * np.uint8(4)
        return (lives.mean(1) / 4 * (1 - 0.001 * samples)).astype(np.float32)


def layered(spec: ScorerSpec) -> Any:
    """See `Layered`."""
    return Layered()
