"""`tprl submit`: the token never travels, mistakes show here and not there, a resend goes on."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import shlex
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests

pytest.importorskip("ray")

from ray._private.runtime_env.packaging import create_package
from ray.job_submission import JobStatus
from ray_heads import BIN, clean_environment, start_head, stop_node

from tprl_env.cli.commands import main
from tprl_env.policy.network import PruningPolicy
from tprl_env.ray_session import check_private, make_private, token_path, use_token
from tprl_env.rllib.run import submit as jobs

SAME_EVERYWHERE = {"iteration", "scores", "score", "mean_return", "kept", "env_steps"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> Path:
    """A home without a token, and no Ray variables."""
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


# The token -----------------------------------------------------------------------------------


def test_the_token_is_private_from_its_first_byte(home: Path):
    mask = os.umask(0)
    try:
        path = make_private()
    finally:
        os.umask(mask)
    assert path == home / ".ray" / "auth_token" == token_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    token = path.read_text()
    assert len(token) == 64 and int(token, 16) and use_token() == token
    assert [p.name for p in path.parent.iterdir()] == ["auth_token"]
    assert make_private().read_text() == token  # never replaced


def test_a_token_that_ray_left_readable_is_closed(home: Path):
    (home / ".ray").mkdir()
    token_path().write_text("ab" * 32)
    token_path().chmod(0o644)
    with pytest.raises(PermissionError, match="mode 644, so others can read it; run chmod 600"):
        use_token()
    make_private()
    assert stat.S_IMODE(token_path().stat().st_mode) == 0o600 and use_token() == "ab" * 32


def test_no_token_or_mode_is_refused(home: Path, monkeypatch):
    with pytest.raises(PermissionError, match="make one with `tprl token`"):
        use_token()
    (home / ".ray").mkdir()
    token_path().write_text("\n")
    with pytest.raises(PermissionError, match="there is no Ray token"):
        check_private(token_path())
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(PermissionError, match="RAY_AUTH_MODE is 'disabled'"):
        use_token()


def test_the_token_command_prints_no_token(home: Path, capsys):
    assert main(["token", str(home / "cluster_token")]) == 0
    said = capsys.readouterr().out
    assert (home / "cluster_token").read_text() not in said and "mode 600" in said


def test_a_local_cluster_of_ours_is_closed_too(home: Path):
    script = """
import os, stat
from pathlib import Path
os.environ.pop("RAY_AUTH_MODE", None)
import ray
from ray._raylet import GcsClient
from tprl_env.rllib.config import load_config
from tprl_env.ray_session import ray_session
with ray_session(cpus=0):
    print(oct(stat.S_IMODE((Path.home() / ".ray/auth_token").stat().st_mode)))
    print(os.environ["RAY_AUTH_MODE"])
    Path("address").write_text(ray.get_runtime_context().gcs_address)
    import subprocess, sys
    other = {n: v for n, v in os.environ.items() if not n.startswith("RAY_")} | {"HOME": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from ray._raylet import GcsClient;"
         "GcsClient(address=open('address').read()).internal_kv_keys(b'', None)"],
        env=other, capture_output=True, text=True)
    print("refused" if "InvalidAuthToken" in done.stderr else done.stderr + "let in")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(home), cwd=home,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.split() == ["0o600", "token", "refused"], done.stdout + done.stderr


# What is sent --------------------------------------------------------------------------------


def test_the_upload_holds_the_code_and_no_secret_nor_result(tmp_path: Path):
    project = tmp_path / "project"
    wanted = ["tprl_env/token_source.py", "tprl_env/lvlm/tiny/weights/a/model.safetensors", "my.py"]
    unwanted = [
        "runs/x/metrics.jsonl", "stores/a/features.arrow", ".venv/bin/python", ".venv-ci/x",
        ".git/config", "draft.tmp", ".env", ".env.local", "deep/.netrc", "key.pem", "ssh.key",
        ".ray/auth_token", "auth_token", ".aws/credentials", "tprl_env/__pycache__/a.pyc",
        "tprl_env.egg-info/PKG-INFO", ".mypy_cache/x",
    ]  # fmt: skip
    for name in wanted + unwanted:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("x")
    table = jobs.runtime_env(project, {})
    assert table["working_dir"] == str(project)
    create_package(
        str(project), tmp_path / "p.zip", include_gitignore=False, excludes=table["excludes"]
    )
    names = zipfile.ZipFile(tmp_path / "p.zip").namelist()
    assert sorted(name for name in names if not name.endswith("/")) == sorted(wanted)


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "passwd"])
def test_a_secret_in_the_environment_is_refused(name: str, tmp_path: Path):
    with pytest.raises(ValueError, match=f"{name} looks like a secret") as error:
        jobs.runtime_env(tmp_path, {name: "hf_abc"})
    assert "hf_abc" not in str(error.value)


def test_harmless_variables_pass():
    given = {"HF_HOME": "/cache", "HF_TOKEN_PATH": "/run/secrets/hf", "HF_HUB_OFFLINE": "1"}
    assert jobs.runtime_env(None, given) == {"env_vars": given}
    assert jobs.runtime_env(None, {}) == {}


def test_a_home_or_root_is_never_uploaded(home: Path):
    for folder in (home, Path("/")):
        with pytest.raises(ValueError, match="would be uploaded with everything in it"):
            jobs.runtime_env(folder, {})
    with pytest.raises(ValueError, match="is no folder"):
        jobs.runtime_env(home / "absent", {})


def test_the_command_starts_or_goes_on(tmp_path: Path):
    command = jobs.training_command(
        "smoke", {"algorithm.lr": "1e-3", "source": "toy:samples=8,tokens=16"}, "s3://b/my run",
        working_dir=tmp_path,
    )  # fmt: skip
    assert shlex.split(command) == [
        "python", "-m", "tprl_env.cli", "train", "smoke", "--out", "s3://b/my run",
        "--resume", "auto", "--algorithm.lr=1e-3", "--source=toy:samples=8,tokens=16",
    ]  # fmt: skip
    config = tmp_path / "deep" / "mine.py"
    config.parent.mkdir()
    config.write_text("from tprl_env.rllib.config import load_config\nCONFIG=load_config('smoke')")
    words = shlex.split(
        jobs.training_command(str(config), {}, "/shared/run", working_dir=tmp_path, python="py")
    )
    assert words[0] == "py" and words[4] == "deep/mine.py"
    with pytest.raises(ValueError, match="is not below the uploaded folder"):
        jobs.training_command(str(config), {}, "/shared/run", working_dir=tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "fields", "storage", "sentence"),
    [
        ("smok", {}, "/shared/run", "did you mean 'smoke'"),
        ("smoke", {"algorithm.lrr": "1"}, "/shared/run", "did you mean 'algorithm.lr'"),
        ("smoke", {}, "runs/x", "an absolute path on a disk that every node sees, got 'runs/x'"),
        ("smoke", {}, "s3://me:pass@b/x", "must not hold credentials"),
    ],
)
def test_mistakes_show_before_anything_is_sent(config, fields, storage, sentence):
    with pytest.raises(ValueError, match=sentence):
        jobs.training_command(config, fields, storage, working_dir=None)


def test_a_token_in_the_request_is_refused(home: Path):
    token = make_private().read_text()
    for command, environment in (
        (f"python a.py {token}", {}),
        ("python a.py", {"env_vars": {"X": token}}),
    ):
        with pytest.raises(ValueError, match="would carry the Ray token") as error:
            jobs.send(command, environment, address="127.0.0.1:1")
        assert token not in str(error.value)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["submit"], "required: config; see `tprl submit --help`"),
        (["submit", "smoke", "--", "python", "x.py"], "expected either the config 'smoke' or"),
        (["submit", "--storage", "/x", "--", "python", "x.py"], "belong to a config"),
        (["submit", "--seed", "1", "--", "python", "x.py"], "expected either the config '1' or"),
        (["submit", "--algorithm.lr=1", "--", "python", "x.py"], "belong to a config"),
        (["submit", "--"], "nothing to run after --"),
        (["submit", "smoke"], "--storage is missing"),
        (["submit", "--address", "h:1", "smoke", "--algorithm.lr=1"], "--storage is missing"),
        (["submit", "smoke", "--storage", "/x", "--env", "A"], "--env expects NAME=VALUE, got 'A'"),
        (["train", "--resume", "smoke"], "write --resume after the config"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(home: Path, capsys, words, sentence):
    make_private()
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


# The cluster's side, imitated ----------------------------------------------------------------


class _Answer(http.server.BaseHTTPRequestHandler):
    reply = (200, b'{"authentication_mode": "disabled"}')

    def do_GET(self):
        self.send_response(self.reply[0])
        self.end_headers()
        self.wfile.write(self.reply[1])

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("reply", [(200, b'{"authentication_mode": "disabled"}'), (404, b"")])
def test_a_cluster_that_lets_everybody_in_is_refused(home: Path, monkeypatch, reply):
    make_private()
    monkeypatch.setattr(_Answer, "reply", reply)
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")  # --address wins
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(PermissionError, match="runs without authentication"):
                jobs.send("python a.py", {}, address=f"127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()


def test_nobody_there_and_nonsense_are_said(home: Path, capsys):
    make_private()
    with pytest.raises(ConnectionError, match=r"no Ray dashboard answers at http://127\.0\.0\.1:1"):
        jobs.send("python a.py", {}, address="127.0.0.1:1")
    with pytest.raises(ValueError, match="expected the dashboard's address"):
        jobs.send("python a.py", {}, address="ray://head:10001")
    assert capsys.readouterr().err == ""
    assert jobs._url("head.example:8265") == "http://head.example:8265"
    assert "travels to head.example unencrypted" in capsys.readouterr().err


class FlakyClient:
    """Tails a log from its beginning each time, as Ray does, and loses the connection once."""

    def __init__(self, status: JobStatus, code: int | None) -> None:
        self.status, self.code, self.calls = JobStatus.RUNNING, code, 0
        self.final = status

    async def tail_job_logs(self, job: str):
        self.calls += 1
        yield "one\ntw"
        if self.calls == 1:
            yield "o\nthr"
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
        yield "o\nthree\n"
        yield "four\n"
        self.status = self.final

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(status=self.status, driver_exit_code=self.code)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 7, 7),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 1),
    ],
)
def test_logs_survive_a_broken_connection(capsys, monkeypatch, status, code, expected):
    clock = itertools.count(0, 1000)  # hours of silence are no reason to give up
    monkeypatch.setattr(jobs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert jobs.follow(FlakyClient(status, code), "job_1") == expected
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\nfour\n"
    assert status.value.lower() in err


def test_a_cluster_that_stays_away_is_given_up(monkeypatch):
    client = FlakyClient(JobStatus.FAILED, 1)
    monkeypatch.setattr(jobs, "_PATIENCE", -1.0)
    with pytest.raises(ConnectionError, match="lost the cluster"):
        jobs.follow(client, "job_1")


class StartingClient:
    """Has no agent at first, as a head of a few seconds; then takes one job."""

    def __init__(self, refusals: int, reason: str = "No available agent to submit job") -> None:
        self.refusals, self.reason, self.ids = refusals, reason, []

    def submit_job(self, *, submission_id: str, entrypoint: str) -> str:
        self.ids.append(submission_id)
        if len(self.ids) <= self.refusals:
            raise RuntimeError(f"Request failed with status code 500: {self.reason}")
        return submission_id


def test_a_head_that_has_just_started_is_waited_for(capsys, monkeypatch):
    monkeypatch.setattr(jobs, "_AGENT_PAUSE", 0.0)
    client = StartingClient(2)
    job = jobs._submitted(client, entrypoint="true")
    assert client.ids == [job] * 3  # one job, whichever request got through
    assert capsys.readouterr().err.count("waiting until it takes jobs") == 2
    with pytest.raises(RuntimeError, match="no such environment"):
        jobs._submitted(StartingClient(1, "no such environment"), entrypoint="true")
    monkeypatch.setattr(jobs, "_AGENT_SECONDS", -1.0)
    with pytest.raises(RuntimeError, match=r"no agent.*--dashboard-agent-listen-port 0"):
        jobs._submitted(StartingClient(1), entrypoint="true")


# A real head ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    started = start_head(tmp_path_factory.mktemp("head"), cpus=4)
    yield started
    stop_node(started.node)


def tprl(head, *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(BIN / "tprl"), *words], env=head.environment(**environment), cwd=cwd,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_without_or_with_a_wrong_token_nothing_runs(head, tmp_path: Path):
    job = {"entrypoint": f"touch {tmp_path}/ran"}
    codes = []
    for given in (None, "ff" * 32):
        headers = {"Authorization": f"Bearer {given}"} if given else {}
        codes.append(requests.post(f"{head.address}/api/jobs/", json=job, headers=headers))
    assert [answer.status_code for answer in codes] == [401, 403]
    script = ("submit", "--address", head.address, "--", "touch", f"{tmp_path}/ran")
    done = tprl(head, *script, cwd=tmp_path, RAY_AUTH_TOKEN="ff" * 32)
    assert done.returncode == 2 and "refused the token" in done.stderr, done.stderr
    assert "Invalid authentication token" in done.stderr and "Traceback" not in done.stderr
    done = tprl(head, *script, cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 2 and "there is no Ray token" in done.stderr, done.stderr
    headers = {"Authorization": f"Bearer {head.token}"}
    assert requests.get(f"{head.address}/api/jobs/", headers=headers).json() == []
    assert not (tmp_path / "ran").exists()


def test_a_training_is_sent_fetched_and_goes_on_when_sent_again(head, tmp_path: Path):
    run = tmp_path / "run"
    words = ("submit", "smoke", "--storage", run.as_uri(), "--address", head.address)
    fields = ("--resources.num_scorers=1", "--limits.iterations")
    first = tprl(head, *words, *fields, "3", cwd=tmp_path)
    assert first.returncode == 0, first.stdout + first.stderr
    assert head.token not in first.stdout + first.stderr
    assert f"policy in {run.as_uri()}/policy" in first.stdout  # the job's own words, followed
    assert "succeeded" in first.stderr
    again = tprl(head, *words, *fields, "5", cwd=tmp_path)
    assert again.returncode == 0 and "resuming after iteration 3" in again.stdout
    history = rows(run)
    assert [row["iteration"] for row in history] == [1, 2, 3, 4, 5]
    assert [row["scores"] for row in history] == [256 * n for n in range(1, 6)]
    assert all(0 <= row["score"] <= 1 and 2 <= row["kept"] <= 6 for row in history)
    assert [s["resume"] for s in json.loads((run / "run.json").read_text())] == [False, True]
    assert PruningPolicy.from_pretrained(run / "policy").config.width == 32
    assert json.loads((run / "policy" / "training.json").read_text())["lvlm_scores"] == 1280
    details = requests.get(
        f"{head.address}/api/jobs/", headers={"Authorization": f"Bearer {head.token}"}
    ).text
    assert len(json.loads(details)) == 2 and head.token not in details


@pytest.mark.slow
def test_a_script_ends_with_its_own_exit_code(head, tmp_path: Path):
    (tmp_path / "mine.py").write_text(
        "import os, sys\nprint('address', os.environ['RAY_ADDRESS'])\n"
        "print('token' , 'RAY_AUTH_TOKEN' in os.environ, os.environ['RAY_AUTH_MODE'])\n"
        "print('variable', os.environ['HF_HUB_OFFLINE'])\nsys.exit(7)\n"
    )
    words = ("submit", "--address", head.address, "--env", "HF_HUB_OFFLINE=1", "--")
    done = tprl(head, *words, "python", "mine.py", cwd=tmp_path)
    assert done.returncode == 7, done.stdout + done.stderr
    assert f":{head.gcs.rpartition(':')[2]}\n" in done.stdout and "variable 1" in done.stdout
    assert "token False token" in done.stdout  # by file, never in the environment


@pytest.mark.slow
def test_the_figures_are_those_of_this_machine(head, tmp_path: Path):
    fields = ("--limits.iterations", "3", "--resources.num_scorers", "1")
    words = ("submit", "smoke", "--storage", str(tmp_path / "there"), "--address", head.address)
    done = tprl(head, *words, *fields, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    here = subprocess.run(
        [str(BIN / "tprl"), "train", "smoke", "--out", str(tmp_path / "here"), *fields],
        env=clean_environment(tmp_path), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert here.returncode == 0, here.stderr
    for there, ours in zip(rows(tmp_path / "there"), rows(tmp_path / "here"), strict=True):
        assert {n: there[n] for n in SAME_EVERYWHERE} == {n: ours[n] for n in SAME_EVERYWHERE}


# Which cluster -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, jobs.DEFAULT_ADDRESS),
        ({"RAY_ADDRESS": "local"}, jobs.DEFAULT_ADDRESS),
        ({"RAY_ADDRESS": "http://head:8265"}, "http://head:8265"),
        ({"RAY_API_SERVER_ADDRESS": "http://a:1"}, "http://a:1"),
        ({"RAY_API_SERVER_ADDRESS": "http://a:1", "RAY_ADDRESS": "http://b:2"}, "http://a:1"),
    ],
)
def test_rays_variables_name_the_cluster(home: Path, monkeypatch, variables, wanted: str):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert jobs.dashboard_address() == wanted


def test_the_head_in_ray_address_is_asked_for_its_dashboard(home: Path, monkeypatch):
    from ray.exceptions import RpcError

    asked = []

    def ask(address: str) -> str:
        asked.append(address)
        if "gone" in address:
            raise ConnectionError("Failed to connect to GCS")
        if "deaf" in address:
            raise RpcError("Timed out while waiting for GCS to become available.", rpc_code=4)
        return "http://10.0.0.1:8265"

    monkeypatch.setattr("ray.dashboard.utils.get_address_for_submission_client", ask)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert jobs.dashboard_address() == "http://10.0.0.1:8265" and asked == ["head:6379"]
    for cluster in ("gone:6379", "deaf:6379"):
        monkeypatch.setenv("RAY_ADDRESS", cluster)
        with pytest.raises(ConnectionError, match=f"no cluster answers at RAY_ADDRESS={cluster}"):
            jobs.dashboard_address()
