"""Ends the processes of a local Ray when the process that started it is gone, however it went.

Ray's own processes notice a killed driver by looking now and then; its agents stay for up to
twenty seconds. Run as a script, with the standard library alone: it reads its standard input until
the driver's end of the pipe closes. Linux only; elsewhere it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from pathlib import Path

_EVERY = 1.0  # seconds between looks at what Ray has started meanwhile
_PROC = Path("/proc")

Known = dict[int, str]


def _table() -> dict[int, tuple[int, str]]:
    """Parent and start time of every process, by pid."""
    table = {}
    for folder in _PROC.glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        table[int(folder.name)] = (int(words[1]), words[19])
    return table


def _remember(known: Known) -> Known:
    """Which of the known processes still run, and the descendants of these."""
    table = _table()
    alive = {pid: start for pid, start in known.items() if table.get(pid, (0, ""))[1] == start}
    grown = True
    while grown:
        more = {
            pid: start
            for pid, (parent, start) in table.items()
            if parent in alive and pid not in alive
        }
        alive |= more
        grown = bool(more)
    return alive


def main(roots: list[int]) -> None:
    """Watch the descendants of ``roots`` until standard input ends, then kill what is left."""
    table = _table()
    known = {pid: table[pid][1] for pid in roots if pid in table}
    while True:
        known = _remember(known)
        ready, _, _ = select.select([sys.stdin], [], [], _EVERY)
        if ready and not os.read(sys.stdin.fileno(), 1):
            break
    for pid in _remember(known):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__" and _PROC.is_dir():
    main([int(word) for word in sys.argv[1:]])
