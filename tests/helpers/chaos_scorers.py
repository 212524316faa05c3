"""Scorers that leave a trace of every pass, for the fault tests; built inside actors by name."""

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


def traced(spec: ScorerSpec) -> Any:
    """The toy rule; each process notes the rows of each pass when it starts and when it ends.

    Options: ``log`` (folder), ``seconds`` per pass, ``late`` (seconds more in the first pass of
    whichever process comes first), ``poison`` (a sample that kills the process).
    """
    inner = ToyScorer(open_source(spec.source), spec.score_kind)
    options, log = spec.options, Path(spec.options["log"])

    def score(samples: np.ndarray, keep: np.ndarray) -> np.ndarray:
        names = "".join(
            f"{sample}:{bits.tobytes().hex()}\n"
            for sample, bits in zip(samples, np.packbits(keep, axis=1), strict=True)
        )
        note(log / f"{os.getpid()}.started", names)
        file = Path(options.get("poison_file", "none"))
        poison = int(file.read_text()) if file.is_file() else options.get("poison")
        if poison in samples:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(options.get("seconds", 0.0) + late(log, options.get("late", 0.0)))
        scores = inner(samples, keep)
        note(log / f"{os.getpid()}.ended", names)
        return scores

    return score


def note(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def late(log: Path, seconds: float) -> float:
    """``seconds`` for the first call of all processes, then 0."""
    if not seconds:
        return 0.0
    try:
        (log / "late").touch(exist_ok=False)
    except FileExistsError:
        return 0.0
    return seconds


def rows(log: Path, kind: str) -> list[str]:
    """What all processes have started or ended, as ``sample:mask``."""
    return [line for path in log.glob(f"*.{kind}") for line in path.read_text().split()]


def in_a_pass(log: Path, pid: int) -> bool:
    """Whether this process is scoring right now."""
    started, ended = (log / f"{pid}.{kind}" for kind in ("started", "ended"))
    done = ended.read_text() if ended.exists() else ""
    return started.exists() and started.read_text() != done
