"""SECURITY.md, as far as a machine can check it: the code, the cluster files, and attacks."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("tprl_env", "rllib_configs", "benchmarks", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
CLUSTER = sorted(path for path in (ROOT / "cluster").rglob("*") if path.is_file())

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
# rows of a Ray Data pipeline, made by itself
PICKLE_IS_OURS = {"tprl_env/lvlm/encoding/encode_with_ray.py"}


def name_of(node: ast.expr) -> str:
    """``a.b.c`` of a call's function, as far as it is plain."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keyword(call: ast.Call, name: str) -> Any:
    """A keyword's literal value; ``...`` if it is none, None if it is not given."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ...
    return None


def dangers(tree: ast.AST) -> Iterator[str]:
    """What must not be in the code, in words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            yield from (f"import {n}" for n in names if n.split(".")[0] in PICKLES)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if "0.0.0.0" in node.value:
                yield "0.0.0.0"
            if re.search(r"RAY_AUTH_MODE\W{1,4}disabled", node.value):
                yield "authentication turned off"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "trust_remote_code":
                    if not (isinstance(value, ast.Constant) and value.value is False):
                        yield "trust_remote_code"
        if isinstance(node, ast.Call):
            yield from dangerous_call(node, name_of(node.func))


def dangerous_call(call: ast.Call, name: str) -> Iterator[str]:
    last = name.rpartition(".")[2]
    if name in ("eval", "exec", "os.system", "os.popen", "tempfile.mktemp", "pandas.read_pickle"):
        yield name
    if name.endswith("torch.load") and keyword(call, "weights_only") is not True:
        yield "torch.load without weights_only=True"
    if keyword(call, "trust_remote_code") not in (None, False):
        yield "trust_remote_code"
    if keyword(call, "allow_pickle") not in (None, False):
        yield "allow_pickle"
    if keyword(call, "shell") not in (None, False):
        yield "shell=True"
    if keyword(call, "dashboard_host") not in (None, "127.0.0.1"):
        yield "dashboard_host"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
        yield name
    model = re.search(r"(Model|For\w+Generation|ForCausalLM)\.from_pretrained$", name)
    if model and keyword(call, "use_safetensors") is not True:
        yield "a model without use_safetensors=True"
    if last == "setenv" or name == "os.environ.setdefault":
        words = [a.value for a in call.args if isinstance(a, ast.Constant)]
        if "RAY_AUTH_MODE" in words and "disabled" in words:
            yield "authentication turned off"


def test_there_is_no_dangerous_call_in_the_code():
    assert len(SOURCES) > 100
    found = []
    for path in SOURCES:
        name = str(path.relative_to(ROOT))
        for danger in dangers(ast.parse(path.read_text(), name)):
            if not (name in PICKLE_IS_OURS and danger == "import pickle"):
                found.append(f"{name}: {danger}")
    assert found == []


def test_one_module_starts_ray():
    """There it is bound to loopback and has a private token."""
    package = [path for path in SOURCES if "tprl_env" in path.parts]
    assert len(package) > 100
    starts = [path.name for path in package if "ray.init(" in path.read_text()]
    assert starts == ["ray_session.py"]


@pytest.mark.parametrize(
    "code",
    [
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "import pickle",
        "from joblib import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "AutoModelForCausalLM.from_pretrained('x')",
        "load('x', trust_remote_code=flag)",
        "load('x', trust_remote_code=True)",
        "options = {'trust_remote_code': config.trust}",
        "ray.init(dashboard_host='::')",
        "words = ['--dashboard-host=0.0.0.0']",
        "yaml.load(text)",
        "eval(text)",
        "os.system('ls')",
        "subprocess.run(text, shell=True)",
        "os.environ.setdefault('RAY_AUTH_MODE', 'disabled')",
        "run('RAY_AUTH_MODE=disabled ray start')",
    ],
)
def test_each_danger_would_be_found(code: str):
    assert list(dangers(ast.parse(code)))


def test_harmless_code_is_left_alone():
    code = """
torch.load("x", weights_only=True)
LlavaForConditionalGeneration.from_pretrained("x", use_safetensors=True)
load("x", trust_remote_code=False, options={"trust_remote_code": False})
yaml.safe_load(text)
subprocess.run(["ls"])
"""
    assert list(dangers(ast.parse(code))) == []


# The tree ------------------------------------------------------------------------------------

SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}|sk-[A-Za-z0-9]{32,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY|\bAIza[0-9A-Za-z_-]{35}"
    r"|(?i:(?:auth_)?token|password|secret)['\"]?\s*[:=]\s*['\"]?[0-9a-f]{32,}"
)


def tracked() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return [*SOURCES, *CLUSTER]
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [ROOT / name for name in done.stdout.decode().split("\0") if name]


def test_no_secret_is_in_the_tree():
    assert SECRETS.search("token: " + "ab" * 32) and SECRETS.search("hf_" + "a" * 34)
    found = []
    for path in tracked():
        if not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        content = path.read_bytes()
        if b"\0" not in content and SECRETS.search(content.decode(errors="replace")):
            found.append(str(path.relative_to(ROOT)))
    assert found == []


def test_no_model_in_the_tree_is_a_pickle():
    pickles = [p.name for p in tracked() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    assert pickles == []


# The cluster files ---------------------------------------------------------------------------


def documents() -> Iterator[tuple[str, Any]]:
    for path in CLUSTER:
        if path.suffix == ".yaml":
            for part in yaml.safe_load_all(path.read_text()):
                yield str(path.relative_to(ROOT)), part


def inside(node: Any, key: str) -> Iterator[Any]:
    """Every value under ``key``, at any depth."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from inside(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from inside(value, key)


def words_of(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from words_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from words_of(value)
    elif isinstance(node, str):
        yield node


def test_authentication_is_on_wherever_ray_starts():
    starts = 0
    for name, part in documents():
        for spec in (s for key in ("spec", "rayClusterSpec") for s in inside(part, key)):
            if isinstance(spec, dict) and "headGroupSpec" in spec:
                assert spec["authOptions"] == {"mode": "token"}, name
                starts += 1
        for word in words_of(part):
            for start in re.findall(r"[^;&|]*ray start[^;&|]*", word):
                assert "RAY_AUTH_MODE=token" in start, (name, start)
                starts += 1
            assert "RAY_AUTH_MODE=disabled" not in word
    assert starts == 2 + 2 * 2
    batch = (ROOT / "cluster/slurm/train.sbatch").read_text()
    assert batch.index("export RAY_AUTH_MODE=token") < batch.index("ray symmetric-run")
    assert "RAY_AUTH_MODE=token" in (ROOT / "cluster/Dockerfile").read_text()


def test_nothing_listens_beyond_loopback_without_the_token():
    for name, part in documents():
        open_to_all = [word for word in words_of(part) if "0.0.0.0" in word]
        if open_to_all:
            assert open_to_all == ["0.0.0.0"] and next(inside(part, "authOptions")), name
            policies = [p for _, p in documents() if p.get("kind") == "NetworkPolicy"]
            assert policies, "an address in a pod needs the NetworkPolicy"
        for port in (8265, 6379, 10001):
            assert not [w for w in words_of(part) if re.search(rf"(FromPort|publish).*{port}", w)]
        assert not any(kind in ("NodePort", "LoadBalancer") for kind in inside(part, "serviceType"))
        assert list(inside(part, "IpPermissions")) == [] and list(inside(part, "hostPort")) == []
    for path in CLUSTER:
        if path.suffix in ("", ".sbatch"):
            assert "0.0.0.0" not in path.read_text(), path


def test_pods_have_no_rights_that_they_do_not_need():
    containers = 0
    for name, part in documents():
        for pod in inside(part, "spec"):
            if not isinstance(pod, dict) or "containers" not in pod:
                continue
            assert pod["securityContext"]["runAsNonRoot"] is True, name
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for key in ("hostNetwork", "hostPID", "hostIPC"):
                assert key not in pod
            for container in pod["containers"]:
                assert container["securityContext"] == {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                }, name
                containers += 1
        for volume in (v for volumes in inside(part, "volumes") for v in volumes):
            assert "hostPath" not in volume
        for word in words_of(part):
            assert "--privileged" not in word and "docker.sock" not in word
    assert containers == 3 + 4


def test_no_cluster_file_carries_a_token_or_makes_one_public():
    for name, part in documents():
        assert part.get("kind") != "Secret", name
        for env in (e for variables in inside(part, "env") for e in variables):
            assert not re.search("TOKEN|SECRET|PASSW|KEY", env["name"]), name
        for key in ("runtimeEnvYAML", "env_vars", "runtime_env"):
            assert list(inside(part, key)) == [], name
        assert not [w for w in words_of(part) if re.search(r"RAY_AUTH_TOKEN=|AUTH_TOKEN=\S", w)]
    batch = (ROOT / "cluster/slurm/train.sbatch").read_text()
    assert "RAY_AUTH_TOKEN=" not in batch and "\numask 077\n" in batch
    assert "ENV RAY_AUTH_TOKEN" not in (ROOT / "cluster/Dockerfile").read_text()


# By attack -----------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "adapter.pth"])
def test_a_model_that_is_a_pickle_is_refused_unread(tmp_path: Path, name: str):
    from lvlm_fixtures import save_llava

    from tprl_env.lvlm import load_lvlm

    folder = save_llava(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps({"weight": Bomb(tmp_path / "exploded")}))
    pickle.loads((folder / name).read_bytes())
    (tmp_path / "exploded").rmdir()  # it works
    with pytest.raises(ValueError, match="safetensors alone"):
        load_lvlm(folder)
    assert not (tmp_path / "exploded").exists()


def test_a_policy_or_autoencoder_that_is_a_pickle_is_refused_unread(tmp_path: Path):
    from tprl_env.policy.autoencoder_training import TokenAutoencoder
    from tprl_env.policy.network import PolicyConfig, PruningPolicy

    PruningPolicy(PolicyConfig(token_width=8, query_width=8)).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    for kind in (PruningPolicy, TokenAutoencoder):
        with pytest.raises((FileNotFoundError, ValueError)):
            kind.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(ValueError, match=r"safetensors|damaged|weights"):
        PruningPolicy.from_pretrained(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_code_in_a_models_folder_is_never_run(tmp_path: Path, monkeypatch):
    from lvlm_fixtures import save_llava

    from tprl_env.lvlm import load_lvlm

    monkeypatch.setenv("HF_HUB_TRUST_REMOTE_CODE", "1")
    folder = save_llava(tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Config: pass\n")
    table = json.loads((folder / "config.json").read_text())
    table["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Config"}
    (folder / "config.json").write_text(json.dumps(table))
    load_lvlm(folder)  # its known family is loaded, its code is not
    table["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="cannot be run"):
        load_lvlm(folder)
    assert not ran.exists()


def test_no_config_reaches_remote_code():
    pytest.importorskip("ray")
    from tprl_env.cli.commands import main
    from tprl_env.rllib.config import TrainConfig, load_config
    from tprl_env.scoring.spec import ScorerSpec

    for kind in (TrainConfig, ScorerSpec):
        assert not [f.name for f in fields(kind) if re.search("trust|remote_code|pickle", f.name)]
    with pytest.raises(ValueError, match="no field 'trust_remote_code'"):
        load_config("smoke", {"trust_remote_code": "True"})
    assert main(["train", "smoke", "--trust-remote-code", "True"]) == 2


def test_a_local_config_folder_of_code_is_not_imported(tmp_path: Path):
    """Python does not look for modules in the folder of a store or a model."""
    (tmp_path / "torch.py").write_text("raise SystemExit('hijacked')\n")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "tprl"), "evaluate", str(tmp_path), "--lvlm", "x"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2 and "LVLM folder 'x' does not exist" in done.stderr, done.stderr
