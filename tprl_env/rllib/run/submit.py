"""Sending a training, or any script, to a Ray cluster as a job.

A thin layer over Ray's own client that adds what is easy to forget: the token comes from a private
file and never travels in the request, a cluster without authentication is refused, secrets and
results stay out of the upload, and submitting the training again resumes it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import tprl_env
from tprl_env.ray_session import use_token

__all__ = [
    "EXCLUDES",
    "checkout",
    "dashboard_address",
    "follow",
    "runtime_env",
    "script_command",
    "send",
    "training_command",
]

EXCLUDES = (
    *("/runs/", "/stores/", "/build/", "/dist/", "*.tmp"),
    *(".git/", ".venv*/", "venv/", "__pycache__/", "*.egg-info/", ".*_cache/"),
    *(".env", ".env.*", ".netrc", ".aws/", ".ssh/", ".ray/", "auth_token", "*.pem", "*.key"),
)
"""Left out of the upload: results, stores, environments, and files that hold secrets."""

DEFAULT_ADDRESS = "http://127.0.0.1:8265"

_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
_HARMLESS = re.compile(r"_(PATH|FILE|DIR)$", re.IGNORECASE)
_CHATTY = (  # tell every ignored file and every closed connection
    "ray._private.runtime_env.packaging",
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
)
_NO_AGENT = (
    "its head takes jobs but has no agent to run them; dashboard_agent.log on the head says why. "
    "Where it says 'address already in use', another Ray of that machine has the port: start the "
    "head with --dashboard-agent-listen-port 0"
)
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_AGENT_SECONDS, _AGENT_PAUSE = 90.0, 2.0  # for the agent of a head that has just started
_PATIENCE = 300.0  # seconds without the cluster after which following ends
_INTERRUPTED = 130


def checkout() -> Path | None:
    """The checkout that this package runs from, None if it is installed."""
    root = Path(tprl_env.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def training_command(
    config: str,
    overrides: Mapping[str, str],
    storage: str,
    *,
    working_dir: Path | None,
    python: str = "python",
) -> str:
    """The job's command: ``tprl train`` that starts the run, or resumes it.

    Args:
        config: Preset, or path of a config file below ``working_dir``.
        overrides: Fields of the config.
        storage: URI, or absolute path on a disk that every node sees.
        working_dir: What is uploaded, None for nothing.
        python: Interpreter on the cluster.

    Raises:
        ValueError: The mistakes that would otherwise show minutes later, on the cluster.
    """
    from tprl_env.rllib.config import load_config
    from tprl_env.rllib.run.storage import Storage, is_uri

    load_config(config, overrides)
    if is_uri(storage):
        Storage.check(storage)
    elif not Path(storage).is_absolute():
        raise ValueError(
            f"--storage must be a URI such as s3://bucket/run, or an absolute path on a disk that "
            f"every node sees, got {storage!r}"
        )
    if config.endswith(".py"):
        path = Path(config).resolve()
        if working_dir is None or not path.is_relative_to(working_dir.resolve()):
            raise ValueError(
                f"the config file {config!r} is not below the uploaded folder "
                f"({working_dir or 'none'}); move it there, or pass --working-dir"
            )
        config = path.relative_to(working_dir.resolve()).as_posix()
    words = [python, "-m", "tprl_env.cli", "train", config, "--out", storage, "--resume", "auto"]
    for name, value in overrides.items():
        words.append(f"--{name}={value}")
    return shlex.join(words)


def runtime_env(working_dir: Path | None, variables: Mapping[str, str]) -> dict[str, Any]:
    """Ray's description of a job's surroundings, which everybody with the dashboard can read.

    Args:
        working_dir: Folder to upload, None for nothing.
        variables: Environment variables of the job and its actors.

    Raises:
        ValueError: For a secret in the variables, or a folder that is no project.
    """
    for name in variables:
        if _SECRET.search(name) and not _HARMLESS.search(name):
            raise ValueError(
                f"{name} looks like a secret, and a job's environment can be read in the "
                f"dashboard; mount it as a file on the nodes and pass {name}_PATH"
            )
    table: dict[str, Any] = {"env_vars": dict(variables)} if variables else {}
    if working_dir is None:
        return table
    folder = working_dir.resolve()
    if not folder.is_dir():
        raise ValueError(f"--working-dir {str(working_dir)!r} is no folder")
    if folder in (Path.home().resolve(), Path(folder.anchor)):
        raise ValueError(
            f"--working-dir {str(folder)!r} would be uploaded with everything in it; choose the "
            "folder of the project"
        )
    return table | {"working_dir": str(folder), "excludes": list(EXCLUDES)}


def send(
    command: str,
    environment: Mapping[str, Any],
    *,
    address: str | None = None,
    driver_cpus: float = 0.0,
) -> tuple[Any, str]:
    """Submit a job.

    Args:
        command: What the job runs.
        environment: From `runtime_env`.
        address: Of the dashboard; default RAY_API_SERVER_ADDRESS, else the dashboard of the cluster
            in RAY_ADDRESS, else this machine's port 8265.
        driver_cpus: CPUs reserved for the command; with 0 it runs on the head.

    Returns:
        Ray's client and the job's id.

    Raises:
        PermissionError: No token, a wrong one, or a cluster that lets everybody in.
        OSError: The cluster cannot be reached or refuses the job.
        ValueError: The request holds the token.
    """
    token = use_token()
    if token in json.dumps([command, dict(environment)]):
        raise ValueError("the job would carry the Ray token in clear text; remove it")
    address = _url(address or dashboard_address())
    _check_guarded(address)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # else RAY_ADDRESS would win over --address
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        client = JobSubmissionClient(address)
        job = _submitted(
            client,
            entrypoint=command,
            runtime_env=dict(environment),
            entrypoint_num_cpus=driver_cpus or None,
        )
    except AuthenticationError as error:
        raise PermissionError(
            f"the cluster at {address} refused the token ({str(error).splitlines()[0]}); use the "
            "token that the cluster was started with"
        ) from error
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise OSError(f"the cluster at {address} refused the job: {reason}") from error
    return client, job


def _submitted(client: Any, **job: Any) -> str:
    """The id of a submitted job.

    A head that has just started takes jobs some seconds before its agent can run them; until then
    it answers "No available agent ... try again later". The id is fixed beforehand, so that no job
    starts twice.

    Raises:
        RuntimeError: The cluster refuses the job, or its agent is not there in time.
    """
    job_id = f"raysubmit_{secrets.token_hex(8)}"
    until = time.monotonic() + _AGENT_SECONDS
    while True:
        try:
            submitted: str = client.submit_job(submission_id=job_id, **job)
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > until:
                raise RuntimeError(_NO_AGENT) from error
            print("the head has just started; waiting until it takes jobs", file=sys.stderr)
            time.sleep(_AGENT_PAUSE)
        else:
            return submitted


def dashboard_address() -> str:
    """The dashboard that Ray's own variables name, as `ray job submit` reads them.

    RAY_API_SERVER_ADDRESS wins over RAY_ADDRESS. The latter may be the dashboard's URL, or the
    cluster's address (``host:6379``, ``auto``, ``ray://host:10001``), whose head is asked for it.

    Raises:
        ConnectionError: No cluster answers at RAY_ADDRESS.
    """
    direct = os.environ.get("RAY_API_SERVER_ADDRESS", "").strip()
    cluster = os.environ.get("RAY_ADDRESS", "").strip()
    if direct or not cluster or cluster == "local":
        return direct or DEFAULT_ADDRESS
    if cluster.startswith(("http://", "https://")):
        return cluster
    from ray.dashboard.utils import get_address_for_submission_client
    from ray.exceptions import RayError

    try:
        return str(get_address_for_submission_client(cluster))
    except (ValueError, RuntimeError, OSError, RayError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConnectionError(
            f"no cluster answers at RAY_ADDRESS={cluster} ({reason}); start it, or pass the "
            f"dashboard with --address {DEFAULT_ADDRESS}"
        ) from error


def _url(address: str) -> str:
    """``host:port`` or URL to URL; a warning where the token would travel in clear text."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError(
            f"expected the dashboard's address such as {DEFAULT_ADDRESS}, got {address!r}"
        )
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        print(
            f"tprl: the token travels to {parts.hostname} unencrypted; a tunnel (ray dashboard, "
            "ssh -L, kubectl port-forward) avoids that",
            file=sys.stderr,
        )
    return url.rstrip("/")


def _check_guarded(address: str) -> None:
    """Refuse a cluster that runs without authentication.

    Raises:
        PermissionError: It does.
        ConnectionError: No answer, or not from Ray.
    """
    import requests

    try:
        answer = requests.get(f"{address}/api/authentication_mode", timeout=15)
        mode = answer.json().get("authentication_mode") if answer.ok else "disabled"
    except requests.RequestException as error:
        raise ConnectionError(
            f"no Ray dashboard answers at {address} ({type(error).__name__}); open the tunnel to "
            "the head's port 8265 or pass --address"
        ) from error
    if mode == "disabled":
        raise PermissionError(
            f"the cluster at {address} runs without authentication, so anybody who reaches it "
            "runs code on it; start it with RAY_AUTH_MODE=token and a token"
        )


def follow(client: Any, job: str) -> int:
    """Print the job's output until it ends.

    Returns:
        0 if it succeeded, else its own exit code, or 1; 130 after Ctrl-C, which leaves it running.

    Raises:
        ConnectionError: The cluster has not answered for five minutes.
    """
    try:
        asyncio.run(_print_logs(client, job))
    except KeyboardInterrupt:
        print(
            f"\ntprl: job {job} keeps running; `ray job logs -f {job}` shows it, "
            f"`ray job stop {job}` ends it",
            file=sys.stderr,
        )
        return _INTERRUPTED
    info = client.get_job_info(job)
    status = str(getattr(info.status, "value", info.status))
    print(f"tprl: job {job} {status.lower()}", file=sys.stderr)
    if status == "SUCCEEDED":
        return 0
    return int(info.driver_exit_code or 1)


async def _print_logs(client: Any, job: str) -> None:
    """Tail the logs, again after a broken connection; what was shown is not shown twice."""
    import aiohttp

    shown, broken = 0, None
    while True:
        seen = 0
        try:
            async for chunk in client.tail_job_logs(job):
                broken = None
                seen += len(chunk)
                new = chunk[max(0, len(chunk) - max(0, seen - shown)) :]
                print(new, end="", flush=True)
                shown = max(shown, seen)
            if client.get_job_info(job).status.is_terminal():
                return
            broken = None
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            now = time.monotonic()
            broken = now if broken is None else broken
            if now - broken > _PATIENCE:
                raise ConnectionError(
                    f"lost the cluster ({type(error).__name__}); job {job} may still run, "
                    f"check with `ray job status {job}`"
                ) from error
        await asyncio.sleep(1.0)


def script_command(words: Sequence[str]) -> str:
    """The words after ``--`` as one shell command.

    Raises:
        ValueError: There are none.
    """
    if not words:
        raise ValueError("nothing to run after --; write -- python script.py")
    return shlex.join(words)
