"""The files of cluster/: as far as they can be checked without a cloud, Kubernetes or Slurm."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from tprl_env.cli.parsing import overrides

CLUSTER = Path(__file__).parents[2] / "cluster"
RAY = "2.60.0"


def load(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text())


def test_every_yaml_is_known_here():
    found = {str(path.relative_to(CLUSTER)) for path in CLUSTER.rglob("*.yaml")}
    kuberay = ("kustomization", "networkpolicy", "storage", "raycluster", "rayjob")
    assert found == {
        *("aws.yaml", "gcp.yaml"),
        *(f"kuberay/{name}.yaml" for name in kuberay),
        *(f"kuberay-{cloud}-spot/kustomization.yaml" for cloud in ("gke", "eks")),
    }


# ray up --------------------------------------------------------------------------------------


@pytest.fixture(params=["aws.yaml", "gcp.yaml"])
def launcher(request) -> dict[str, Any]:
    return load(request.param)


def accepted(raw: dict[str, Any]) -> dict[str, Any]:
    """What the launcher makes of a file; raises for what it refuses."""
    util = pytest.importorskip("ray.autoscaler._private.util")
    config = util.prepare_config(copy.deepcopy(raw))
    config.setdefault("cluster_synced_files", [])
    util.validate_config(config)
    return config


def test_the_launcher_accepts_the_file(launcher):
    config = accepted(launcher)
    assert config["max_workers"] == 12 and config["head_node_type"] == "head"
    assert config["docker"]["image"].endswith("/tprl:0.1")


@pytest.mark.parametrize(
    "change",
    [{"idle_timeout": 3}, {"available_node_types": {"head": {"resources": {}, "node_conf": {}}}}],
)
def test_the_launcher_would_refuse_unknown_keys(launcher, change):
    from jsonschema import ValidationError

    with pytest.raises(ValidationError):
        accepted({**launcher, **change})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"head_node_type": "haed"}, ValueError),
        ({"provider": {"type": "awz"}}, NotImplementedError),
    ],
)
def test_the_launcher_would_refuse_unknown_names(launcher, change, error):
    with pytest.raises(error):
        accepted({**launcher, **change})


def test_no_actor_on_the_head_and_scorers_fill_their_nodes(launcher):
    nodes = launcher["available_node_types"]
    assert set(nodes) == {"head", "scorer", "runner"}
    assert nodes["head"]["resources"] == {"CPU": 0} and nodes["head"]["max_workers"] == 0
    assert nodes["scorer"]["resources"] == {"CPU": 8, "GPU": 1, "scorer": 1}
    assert "GPU" not in nodes["runner"]["resources"]
    assert all(nodes[name]["min_workers"] == 0 for name in nodes)
    most = nodes["scorer"]["max_workers"] + nodes["runner"]["max_workers"]
    assert most == launcher["max_workers"] and launcher["idle_timeout_minutes"] <= 15


def test_only_the_scorers_are_spot_nodes(launcher):
    def is_spot(node: dict[str, Any]) -> bool:
        config = node["node_config"]
        market = config.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
        rules = [rule for rule in config.get("scheduling", []) if rule.get("preemptible")]
        return market or bool(rules)

    nodes = launcher["available_node_types"]
    assert [name for name, node in nodes.items() if is_spot(node)] == ["scorer"]


def test_launched_nodes_have_the_fields_that_the_clouds_know(launcher):
    """The launcher passes node_config on unseen, so a misspelt key shows only in the cloud."""
    known = {
        "aws": {"InstanceType", "ImageId", "InstanceMarketOptions", "BlockDeviceMappings"},
        "gcp": {"machineType", "disks", "scheduling", "guestAccelerators", "metadata"},
    }[launcher["provider"]["type"]]
    for node in launcher["available_node_types"].values():
        assert set(node["node_config"]) <= known
    assert launcher["auth"] == {"ssh_user": "ubuntu"}
    if launcher["provider"]["type"] == "aws":
        assert launcher["provider"]["cache_stopped_nodes"] is False  # spot nodes cannot stop


def test_the_token_travels_as_a_private_file(launcher):
    assert launcher["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token" in launcher["setup_commands"]
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert any("export RAY_AUTH_MODE=token" in c for c in launcher["initialization_commands"])
    for kind in ("head", "worker"):
        (start,) = [c for c in launcher[f"{kind}_start_ray_commands"] if "ray start" in c]
        assert "RAY_AUTH_MODE=token ray start" in start and "0.0.0.0" not in start
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][1]


def test_shell_commands_parse(launcher):
    names = ("initialization", "setup", "head_start_ray", "worker_start_ray")
    for command in [c for name in names for c in launcher[f"{name}_commands"]]:
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# KubeRay: the fields we use, strictly --------------------------------------------------------


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _quantity(text: str) -> str:
    assert text.rstrip("KMGTim").replace(".", "").isdigit(), text
    return text


Quantity = Annotated[str, AfterValidator(_quantity)]
Metadata = dict[Literal["name", "namespace", "labels"], Any]


class Capabilities(Strict):
    drop: list[Literal["ALL"]]


class SecurityContext(Strict):
    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class Seccomp(Strict):
    type: Literal["RuntimeDefault"]


class PodSecurityContext(Strict):
    runAsNonRoot: Literal[True]
    runAsUser: Annotated[int, Field(ge=1000)]
    runAsGroup: int
    fsGroup: int | None = None
    seccompProfile: Seccomp


class Resources(Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class EnvVar(Strict):
    name: str
    value: str


class Port(Strict):
    containerPort: int
    name: str


class Mount(Strict):
    name: str
    mountPath: str


class Container(Strict):
    name: str
    image: str
    securityContext: SecurityContext
    resources: Resources
    env: list[EnvVar] = []
    ports: list[Port] = []
    volumeMounts: list[Mount] = []


class Claim(Strict):
    claimName: Literal["tprl-shared"]


class Volume(Strict):
    name: str
    persistentVolumeClaim: Claim


class Toleration(Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule"]
    value: str | None = None


class PodSpec(Strict):
    restartPolicy: Literal["Never"]
    securityContext: PodSecurityContext
    containers: Annotated[list[Container], Field(min_length=1, max_length=1)]
    automountServiceAccountToken: bool = True
    tolerations: list[Toleration] = []
    nodeSelector: dict[str, str] = {}
    volumes: list[Volume] = []


class PodTemplate(Strict):
    metadata: Metadata = {}
    spec: PodSpec


class HeadGroup(Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    replicas: Annotated[int, Field(ge=0)]
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def in_order(self) -> WorkerGroup:
        assert self.minReplicas <= self.replicas <= self.maxReplicas
        return self


class AuthOptions(Strict):
    mode: Literal["token"]


class AutoscalerOptions(Strict):
    version: Literal["v2"]
    upscalingMode: Literal["Default", "Aggressive", "Conservative"]
    idleTimeoutSeconds: Annotated[int, Field(ge=60)]
    resources: Resources
    securityContext: SecurityContext


class RayClusterSpec(Strict):
    rayVersion: Literal["2.60.0"]
    authOptions: AuthOptions
    enableInTreeAutoscaling: Literal[True]
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayCluster(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayJobSpec(Strict):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "SidecarMode"]
    backoffLimit: Annotated[int, Field(ge=1)]
    activeDeadlineSeconds: Annotated[int, Field(ge=3600)]
    shutdownAfterJobFinishes: Literal[True]
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    submitterPodTemplate: PodTemplate
    rayClusterSpec: RayClusterSpec


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


def cluster_specs() -> list[RayClusterSpec]:
    cluster = RayCluster.model_validate(load("kuberay/raycluster.yaml"))
    return [cluster.spec, RayJob.model_validate(load("kuberay/rayjob.yaml")).spec.rayClusterSpec]


@pytest.mark.parametrize("spec", cluster_specs(), ids=["raycluster", "rayjob"])
def test_a_kuberay_cluster_is_what_we_mean(spec: RayClusterSpec):
    assert spec.headGroupSpec.rayStartParams["num-cpus"] == "0"
    groups = {group.groupName: group for group in spec.workerGroupSpecs}
    assert set(groups) == {"scorer", "runner"}
    for group in groups.values():
        (container,) = group.template.spec.containers
        asked, params = container.resources, group.rayStartParams
        assert asked.requests == asked.limits  # guaranteed: never evicted for memory
        assert params["num-cpus"] == asked.limits["cpu"]
        assert params.get("num-gpus", "0") == asked.limits.get("nvidia.com/gpu", "0")
        assert group.template.spec.automountServiceAccountToken is False
    scorer = groups["scorer"]
    assert json.loads(json.loads(scorer.rayStartParams["resources"])) == {"scorer": 1}
    assert [t.key for t in scorer.template.spec.tolerations] == ["nvidia.com/gpu"]
    pods = [spec.headGroupSpec.template.spec, *(g.template.spec for g in groups.values())]
    for pod in pods:
        (container,) = pod.containers
        assert [v.name for v in pod.volumes] == [m.name for m in container.volumeMounts]
        assert {"HF_HUB_OFFLINE": "1"}.items() <= {e.name: e.value for e in container.env}.items()
        assert not [e.name for e in container.env if "TOKEN" in e.name]


def test_job_and_cluster_describe_the_same_cluster():
    job, cluster = load("kuberay/rayjob.yaml"), load("kuberay/raycluster.yaml")
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.workerGroupSpecs.0.maxReplica", 3),
        ("spec.workerGroupSpecs.0.minReplicas", 5),
        ("spec.authOptions.mode", "disabled"),
        ("spec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.headGroupSpec.template.spec.containers.0.imagee", "x"),
        ("spec.headGroupSpec.template.spec.securityContext.runAsNonRoot", False),
        ("spec.workerGroupSpecs.1.template.spec.containers.0.securityContext.privileged", True),
        ("apiVersion", "ray.io/v1alpha1"),
    ],
)
def test_the_model_refuses_mistakes(path: str, value: Any):
    table = load("kuberay/raycluster.yaml")
    table = json.loads(json.dumps(table))  # anchors would change several places at once
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = table
    for part in way:
        place = place[part]
    place[last] = value
    with pytest.raises(ValueError, match=r"validation error"):
        RayCluster.model_validate(table)


def test_the_network_policy_lets_only_ray_and_its_operator_in():
    policy = load("kuberay/networkpolicy.yaml")
    assert policy["apiVersion"] == "networking.k8s.io/v1" and policy["kind"] == "NetworkPolicy"
    spec = policy["spec"]
    assert spec["policyTypes"] == ["Ingress"]
    assert spec["podSelector"] == {"matchLabels": {"ray.io/is-ray-node": "yes"}}
    inside, control = spec["ingress"]
    assert inside == {"from": [{"podSelector": spec["podSelector"]}]}
    assert [port["port"] for port in control["ports"]] == [8265]
    operator, submitter = [source["podSelector"]["matchLabels"] for source in control["from"]]
    assert operator == {"app.kubernetes.io/name": "kuberay-operator"}
    job = RayJob.model_validate(load("kuberay/rayjob.yaml")).spec
    assert submitter == job.submitterPodTemplate.metadata["labels"]


def test_the_jobs_command_is_one_that_we_understand():
    from tprl_env.rllib.config import load_config

    words = shlex.split(RayJob.model_validate(load("kuberay/rayjob.yaml")).spec.entrypoint)
    assert words[:2] == ["tprl", "train"]
    at = words.index("--resume")
    assert words[at : at + 2] == ["--resume", "auto"]  # a retry must go on
    assert words[3] == "--out" and words[4].startswith("/shared/")
    config = load_config(words[2], overrides(words[at + 2 :]))
    groups = {g.groupName: g for g in cluster_specs()[1].workerGroupSpecs}
    assert config.resources.scorer_resources == {"scorer": 1.0}
    assert config.resources.scorer_cpus == float(groups["scorer"].rayStartParams["num-cpus"])
    assert config.resources.num_scorers <= groups["scorer"].maxReplicas
    runners = int(groups["runner"].rayStartParams["num-cpus"]) * groups["runner"].maxReplicas
    assert config.resources.num_env_runners <= runners and config.resources.start_timeout >= 1200


def test_manifests_fit_the_operators_own_schema():
    """Full check against KubeRay's definitions: KUBERAY_CRD_DIR=ray-operator/config/crd/bases."""
    folder = os.environ.get("KUBERAY_CRD_DIR")
    if not folder:
        pytest.skip("KUBERAY_CRD_DIR is not set")
    from jsonschema import Draft202012Validator

    for name, crd in (("raycluster", "rayclusters"), ("rayjob", "rayjobs")):
        definition = yaml.safe_load((Path(folder) / f"ray.io_{crd}.yaml").read_text())
        (version,) = [v for v in definition["spec"]["versions"] if v["name"] == "v1"]
        schema = strict_schema(version["schema"]["openAPIV3Schema"])
        problems = Draft202012Validator(schema).iter_errors(load(f"kuberay/{name}.yaml"))
        assert [f"{list(p.absolute_path)}: {p.message}" for p in problems] == []


def strict_schema(node: Any) -> Any:
    """Kubernetes' schema dialect as JSON Schema that refuses unknown fields."""
    if isinstance(node, list):
        return [strict_schema(part) for part in node]
    if not isinstance(node, dict):
        return node
    table = {name: strict_schema(part) for name, part in node.items()}
    if table.pop("x-kubernetes-int-or-string", False):
        table.pop("type", None)
        table["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    open_ended = table.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(table.get("properties"), dict) and not open_ended:
        table.setdefault("additionalProperties", False)
        if table["additionalProperties"] is False and "metadata" in table["properties"]:
            table["properties"] = {**table["properties"], "metadata": {"type": "object"}}
    return table


def kustomized(name: str) -> list[dict[str, Any]]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", str(CLUSTER / name)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("name", ["kuberay", "kuberay-gke-spot", "kuberay-eks-spot"])
def test_kustomize_builds_the_same_cluster(name: str):
    parts = {part["kind"]: part for part in kustomized(name)}
    assert set(parts) == {"NetworkPolicy", "PersistentVolumeClaim", "RayCluster"}
    assert {part["metadata"]["namespace"] for part in parts.values()} == {"tprl"}
    cluster = RayCluster.model_validate(parts["RayCluster"])
    selectors = [len(g.template.spec.nodeSelector) for g in cluster.spec.workerGroupSpecs]
    assert selectors == ([0, 0] if name == "kuberay" else [1, 0])  # scorers only
    assert parts["PersistentVolumeClaim"]["metadata"]["name"] == "tprl-shared"
    assert parts["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


# Dockerfile ----------------------------------------------------------------------------------


def test_the_image_is_pinned_and_ends_as_an_ordinary_user():
    lines = [
        line.strip()
        for line in (CLUSTER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    assert lines[0] == f"ARG BASE=rayproject/ray:{RAY}-py311-gpu" and lines[1] == "FROM ${BASE}"
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users and all(user == "1000" for user in users)
    assert any("--constraint constraints.txt" in line for line in lines)
    assert "RAY_AUTH_MODE=token" in next(line for line in lines if line.startswith("ENV"))
    root = CLUSTER.parent
    for line in lines:
        if line.startswith("COPY"):
            *sources, _ = [word for word in line.split()[1:] if not word.startswith("--")]
            assert all((root / source).exists() for source in sources), line
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().split()
    assert ignored[0] == "*"  # only what is named travels to the builder
    assert f"ray=={RAY}" in (root / "constraints.txt").read_text().split()


# Slurm ---------------------------------------------------------------------------------------

SBATCH = CLUSTER / "slurm" / "train.sbatch"

FAKES = {
    "scontrol": '[[ $1 == show && $2 == hostnames ]] && printf "node7\\nnode8\\n"',
    "srun": 'while [[ $1 == --* ]]; do shift; done\nexec "$@"',
    "hostname": 'echo "${FAKE_IP-10.1.2.3 10.9.9.9}"',
    "ray": 'echo "$@" > "$LOG/ray"\n[[ -n ${NO_RAY-} ]] && exit 0\n'
    'while [[ $1 != -- ]]; do shift; done\nshift\nexec "$@"',
    "tprl": 'if [[ $1 == token ]]; then echo secret > "$2"; exit; fi\n'
    'printf "%s\\n" "$@" > "$LOG/tprl"\nenv > "$LOG/env"\n'
    'stat -c "%a" "$RAY_AUTH_TOKEN_PATH" > "$LOG/mode"\nexit "${CODE-0}"',
}


@pytest.fixture
def slurm(tmp_path: Path):
    """Run the batch script with stand-ins for Slurm, Ray and tprl."""
    (tmp_path / "bin").mkdir()
    for name, body in FAKES.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def run(*words: str, **more: str) -> subprocess.CompletedProcess:
        environment = {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "HOME": str(tmp_path),
            "LOG": str(tmp_path), "SLURM_JOB_ID": "45678", "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]", **more,
        }  # fmt: skip
        return subprocess.run(
            ["bash", str(SBATCH), *words], env=environment, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip

    return run


def test_the_batch_script_parses():
    done = subprocess.run(["bash", "-n", str(SBATCH)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shellcheck = shutil.which("shellcheck")
    if shellcheck:
        done = subprocess.run([shellcheck, str(SBATCH)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    header = [line for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --exclusive" in header and "#SBATCH --ntasks-per-node=1" in header


def test_the_batch_script_starts_the_training_with_a_private_token(slurm, tmp_path: Path):
    done = slurm("smoke", "/shared/my run", "--scoring.options", '{"a": "b c"}')
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tprl").read_text().splitlines() == [
        "train", "smoke", "--out", "/shared/my run", "--resume", "auto",
        "--scoring.options", '{"a": "b c"}',
    ]  # fmt: skip
    started = (tmp_path / "ray").read_text().split()
    assert started[:5] == ["symmetric-run", "--address", "10.1.2.3:25678", "--min-nodes", "2"]
    assert "--dashboard-host" in started and "0.0.0.0" not in started
    environment = dict(
        line.partition("=")[::2] for line in (tmp_path / "env").read_text().splitlines()
    )
    assert environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in environment
    assert environment["RAY_ADDRESS"] == "10.1.2.3:25678"  # else a local Ray would be started
    assert (tmp_path / "mode").read_text() == "600\n"
    state = tmp_path / ".tprl-jobs" / "45678"
    assert Path(environment["RAY_AUTH_TOKEN_PATH"]) == state / "auth_token"
    assert not (state / "auth_token").exists()  # ends with the job
    assert stat.S_IMODE(state.stat().st_mode) == 0o700


def test_the_batch_script_ends_with_the_trainings_code(slurm):
    assert slurm("smoke", "/shared/run", CODE="7").returncode == 7
    assert slurm("smoke", "/shared/run").returncode == 0  # a requeue forgets the old status
    done = slurm("smoke", "/shared/run", NO_RAY="1")
    assert done.returncode == 1 and "Ray did not start on all nodes" in done.stderr
    assert slurm("smoke").returncode == 2
    done = slurm("smoke", "/shared/run", FAKE_IP="127.0.1.1")
    assert done.returncode == 1 and "which other nodes cannot reach" in done.stderr
