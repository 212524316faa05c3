"""Joins or starts Ray, privately: the session, its authentication token, what a cluster has.

Ray 2.60 writes its token readable for everybody (mode 644). Whoever has the token runs code on the
cluster, so ours is written with mode 600 in a folder of mode 700 before Ray would make it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "MODE",
    "TOKEN",
    "TOKEN_PATH",
    "check_private",
    "make_private",
    "ray_session",
    "requested_and_available",
    "token_path",
    "use_token",
]

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def token_path() -> Path:
    """Where Ray looks for the token file: RAY_AUTH_TOKEN_PATH, else ``~/.ray/auth_token``."""
    given = os.environ.get(TOKEN_PATH)
    return Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"


def make_private(path: Path | None = None) -> Path:
    """Make the token file if it is missing, and take it from all others if it is ours.

    Args:
        path: The file, by default the one that Ray reads.

    Raises:
        OSError: It can be neither written nor changed.
    """
    path = path or token_path()
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(file, secrets.token_hex(32).encode())
        finally:
            os.close(file)
        try:
            os.link(draft, path)  # never over a token that another process has just made
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    status = path.stat()
    if status.st_uid == os.getuid() and status.st_mode & _OTHERS:
        path.chmod(0o600)
    return path


def check_private(path: Path) -> None:
    """Refuse a token file that is missing, empty or readable for others.

    Raises:
        PermissionError: With the cure.
    """
    if not path.is_file() or not path.read_text().strip():
        raise PermissionError(
            f"there is no Ray token in {str(path)!r}; make one with `tprl token`, or copy the "
            "cluster's there with mode 600"
        )
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & _OTHERS:
        raise PermissionError(
            f"the Ray token in {str(path)!r} has mode {mode:o}, so others can read it; run "
            f"chmod 600 {path}"
        )


def use_token() -> str:
    """Turn token mode on for this process, before ray is imported, and return the token.

    Raises:
        PermissionError: The mode is another one, or there is no private token.
    """
    mode = os.environ.setdefault(MODE, "token")
    if mode.lower() != "token":
        raise PermissionError(
            f"{MODE} is {mode!r}, but jobs are sent with a token only; set {MODE}=token"
        )
    given = os.environ.get(TOKEN, "").strip()
    if given:
        return given
    check_private(token_path())
    return token_path().read_text().strip()


@contextlib.contextmanager
def ray_session(cpus: float) -> Iterator[None]:
    """A Ray cluster for a run: the one there is, or a local one that ends with the run.

    On a cluster (RAY_ADDRESS) no resources may be declared. A local one declares at least what the
    actors ask for, so that a two-core machine can hold two scorers and the runners between them,
    and listens on loopback only.

    Args:
        cpus: That the actors of the run ask for together.

    Raises:
        BaseException: What a worker raised, itself: Ray wraps it in an error of the same class
            whose text is the worker's whole traceback.
    """
    from ray.exceptions import RayTaskError

    with _session(cpus):
        try:
            yield
        except RayTaskError as error:
            if isinstance(error.cause, BaseException) and error.cause is not error:
                raise error.cause from error
            raise


@contextlib.contextmanager
def _session(cpus: float) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    with contextlib.ExitStack() as local:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            declared = max(2, os.cpu_count() or 1, math.ceil(cpus))
            make_private()  # Ray would write its token for everybody on this machine to read
            with _on_loopback():
                ray.init(address="local", num_cpus=declared, include_dashboard=False, **quiet)
            local.enter_context(_reaper())
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _reaper() -> Iterator[None]:
    """Let none of Ray's processes outlive this one, see `tprl_env.ray_reaper`."""
    from ray._private.worker import global_worker

    processes = global_worker.node.all_processes
    pids = [str(info.process.pid) for each in processes.values() for info in each]
    script = Path(__file__).with_name("ray_reaper.py")
    reaper = subprocess.Popen(
        [sys.executable, "-I", "-S", str(script), *pids],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in the terminal is for the driver
    )
    try:
        yield
    finally:
        if reaper.stdin is not None:
            reaper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            reaper.wait(10)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a Ray that starts inside bind all its ports to 127.0.0.1, as it does on macOS.

    Ray has no option for that: it replaces a loopback address that it is given by the machine's
    own. This switch, which its processes inherit, is read when ray is imported, so both are set.
    """
    from ray._private import ray_constants

    name, known = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = known
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def requested_and_available(bundles: Sequence[Mapping[str, float]]) -> str:
    """``"CPU: 6 requested, 4 in the cluster, 1 free; ..."`` for the sum of what actors ask for."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    names = sorted({name for bundle in bundles for name in bundle})
    return ", ".join(
        f"{name}: {sum(bundle.get(name, 0) for bundle in bundles):g} requested, "
        f"{total.get(name, 0):g} in the cluster, {free.get(name, 0):g} free"
        for name in names
    )
