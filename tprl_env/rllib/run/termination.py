"""SIGTERM (Slurm, Kubernetes, a spot notice): a checkpoint if the grace allows, then rc 143."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

__all__ = ["EXIT_CODE", "GRACE", "Terminated", "Termination", "termination"]

EXIT_CODE = 128 + signal.SIGTERM
GRACE = 15.0
"""Seconds that an iteration may still take: those who send SIGTERM kill 30 s later, and a
checkpoint and the end of the actors take their time too."""


class Terminated(SystemExit):
    """SIGTERM has ended the run; the process ends with 143 unless somebody catches this."""

    def __init__(self, text: str) -> None:
        super().__init__(EXIT_CODE)
        self.text = text

    def __str__(self) -> str:
        """The sentence."""
        return self.text


class Termination:
    """Turns SIGTERM into the end of an iteration, or into `Terminated` where there is none.

    Attributes:
        asked: SIGTERM has come.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waits = False

    def listen(self) -> None:
        """Take the signal; call it again after ``ray.init``, which takes it for itself."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Let what runs inside finish within the grace, then look at `asked`."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
            if self.asked:
                signal.setitimer(signal.ITIMER_REAL, 0.0)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.asked = self.asked, True
        if again or not self._waits:
            raise Terminated("stopped by SIGTERM")
        signal.signal(signal.SIGALRM, self._give_up)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def _give_up(self, number: int, frame: FrameType | None) -> None:
        raise Terminated(f"stopped by SIGTERM: the iteration had not ended after {GRACE:g} s")


@contextlib.contextmanager
def termination() -> Iterator[Termination]:
    """Handle SIGTERM inside, as before outside; the reason is one sentence on stderr."""
    before: Any = signal.getsignal(signal.SIGTERM)
    ending = Termination()
    ending.listen()
    try:
        yield ending
    except Terminated as error:
        print(f"tprl: {error}; the same command with --resume goes on", file=sys.stderr)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
