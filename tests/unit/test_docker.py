"""What docker/ promises, as far as it can be seen without an engine: by hadolint, Compose and the manifest."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from impactx.configuration import load_settings

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
BIN = Path(sys.executable).parent


def module(name: str) -> Any:
    """One of the programs in docker/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCKER / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def composed(*more: str, **environment: str) -> dict[str, Any]:
    """The compose file as Compose itself understands it; fails on anything that it warns of."""
    files = [part for name in ("compose.yaml", *more) for part in ("--file", DOCKER / name)]
    done = subprocess.run([BIN / "docker-compose", *files, "config", "--format", "json"], text=True,
                          capture_output=True, env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    """With every default."""
    return composed()


def test_hadolint_finds_nothing():
    done = subprocess.run([BIN / "hadolint", "--no-color", DOCKER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout


def test_hadolint_would_find_something():
    done = subprocess.run([BIN / "hadolint", "-"], input="FROM python\nRUN pip install ray\n", capture_output=True,
                          text=True)
    assert done.returncode == 1 and "DL3006" in done.stdout


def test_services_start_in_order_and_say_when_they_are_well(cluster):
    services = cluster["services"]
    assert set(services) == {"postgres", "s3", "mlflow", "head", "worker"}
    waits = {name: set(service.get("depends_on", {})) for name, service in services.items()}
    assert waits == {"postgres": set(), "s3": set(), "mlflow": {"postgres", "s3"}, "head": {"mlflow"},
                     "worker": {"head"}}
    for service in services.values():
        assert {d["condition"] for d in service.get("depends_on", {}).values()} <= {"service_healthy"}
    assert all("healthcheck" in services[name] for name in ("postgres", "s3", "mlflow"))
    assert "HEALTHCHECK" in (DOCKER / "Dockerfile").read_text()  # of the head and the workers


def test_every_service_is_limited_and_rotates_its_log(cluster):
    for name, service in cluster["services"].items():
        limits = service["deploy"]["resources"]["limits"]
        assert float(limits["cpus"]) > 0 and int(limits["memory"]) >= 2**30, name
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "3"}, name
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged") and service["restart"] == "unless-stopped" and service["init"], name
        assert ":" in service["image"], f"{name}: an image without a version"
        assert service["read_only"] and int(limits["pids"]) >= 1024, name
        assert any(place.startswith("/tmp:size=") for place in service["tmpfs"]), name
    for name in ("head", "worker"):
        service = cluster["services"][name]
        assert int(service["shm_size"]) >= 512 * 2**20, "Ray's objects do not fit Docker's 64 MB"
        assert object_store(service) * 1.5 < int(service["shm_size"]), name


def object_store(service: dict[str, Any]) -> int:
    """The bytes of a node's object store."""
    return int(re.search(r"--object-store-memory=(\d+)(\s|$)", service["command"][-1])[1])


def test_the_object_store_and_the_memory_that_holds_it_are_settings():
    services = composed(SHM_SIZE="3g", HEAD_OBJECT_STORE="700000000", WORKER_OBJECT_STORE="2000000000")["services"]
    assert {int(services[name]["shm_size"]) for name in ("head", "worker")} == {3 * 2**30}
    assert [object_store(services[name]) for name in ("head", "worker")] == [700_000_000, 2_000_000_000]


def test_images_may_be_named_by_their_digest():
    digest = f"sha256:{'0123456789abcdef' * 4}"
    services = composed(POSTGRES_IMAGE=f"postgres:15@{digest}", S3_IMAGE=f"chrislusf/seaweedfs@{digest}")["services"]
    assert {name for name, service in services.items() if service["image"].endswith(digest)} == {"postgres", "s3"}
    assert f"--build-arg BASE=python:3.11-slim@{digest} " in printed("cluster-image", f"BASE=python:3.11-slim@{digest}")
    assert "BASE" not in printed("cluster-image")  # the Dockerfile's own default
    assert re.search(r"^FROM \$\{BASE\}", (DOCKER / "Dockerfile").read_text(), re.M)


def printed(*arguments: str) -> str:
    """The commands that make would run."""
    done = subprocess.run(["make", "--no-print-directory", "--dry-run", *arguments], cwd=ROOT, text=True,
                          capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
    return done.stdout.replace("\\\n", "")


def test_every_variable_of_the_compose_file_is_in_the_guide():
    text = "".join(path.read_text() for path in DOCKER.glob("compose*.yaml"))
    names = set(re.findall(r"\$\{([A-Z0-9_]+)", re.sub("^#.*", "", text, flags=re.M)))
    guide = (ROOT / "docs" / "cluster.md").read_text()
    assert len(names) > 12 and not [name for name in names if not re.search(f"`{name}[`=]", guide)]


def test_the_guide_names_the_containers_that_begin_as_root(cluster):
    root = {name for name, service in cluster["services"].items() if service.get("cap_add") or service.get("user")}
    (line,) = re.findall(r"^\* \*\*Containers\*\* .*(?:\n  .*)*", (ROOT / "docs" / "cluster.md").read_text(), re.M)
    assert root == {"postgres", "s3"} and {name for name in cluster["services"] if f"`{name}`" in line} == root
    for capability in {name for service in cluster["services"].values() for name in service.get("cap_add", [])}:
        assert capability in line


def test_nothing_is_published_beyond_this_machine_unless_asked(cluster):
    ports = {(name, port["host_ip"], port["target"]) for name, service in cluster["services"].items()
             for port in service.get("ports", [])}
    assert ports == {("mlflow", "127.0.0.1", 5000), ("head", "127.0.0.1", 8265)}
    assert cluster["networks"]["database"]["internal"]
    assert list(cluster["services"]["postgres"]["networks"]) == ["database"]
    asked = composed(PUBLISH_ON="192.0.2.7")["services"]["head"]["ports"]
    assert [port["host_ip"] for port in asked] == ["192.0.2.7"]


def test_secrets_are_files_and_each_service_sees_its_own(cluster):
    seen = {name: {s["source"] for s in service.get("secrets", [])} for name, service in cluster["services"].items()}
    jobs = {"ray_token", "s3_impactx"}
    assert seen == {"postgres": {"postgres_password"}, "s3": {"s3.json"}, "mlflow": {"pgpass", "s3_mlflow"},
                    "head": jobs, "worker": jobs}
    assert {Path(s["file"]).parent for s in cluster["secrets"].values()} == {DOCKER / "secrets"}
    for service in cluster["services"].values():
        for name, value in service.get("environment", {}).items():
            if re.search("(?i)password|token|secret|credential|passfile", name):
                assert name == "RAY_AUTH_TOKEN_PATH" or value.startswith(("/run/secrets/", "/tmp/pgpass")), name
        assert service.get("environment", {}).get("RAY_AUTH_MODE", "token") == "token"
    assert all(cluster["services"][name]["environment"]["RAY_AUTH_MODE"] == "token" for name in ("head", "worker"))


def test_workers_scale_by_one_number_and_get_gpus_by_a_second_file():
    services = composed("compose.gpu.yaml", WORKERS="7", WORKER_CPUS="4")["services"]
    worker = services["worker"]["deploy"]
    assert worker["replicas"] == 7 and worker["resources"]["limits"]["cpus"] == 4
    assert services["worker"]["environment"]["WORKER_CPUS"] == "4"
    assert worker["resources"]["reservations"]["devices"] == [
        {"capabilities": ["gpu"], "driver": "nvidia", "count": -1}]
    assert all("reservations" not in services[name]["deploy"]["resources"] for name in set(services) - {"worker"})


def made(*variables: str) -> list[str]:
    """WORKERS and WORKER_CPUS as the Makefile sets them here."""
    done = subprocess.run(["make", "--no-print-directory", "--eval", "show: ; @echo $(WORKERS) $(WORKER_CPUS)", "show",
                           *variables], cwd=ROOT, text=True, capture_output=True, check=True,
                          env={"PATH": os.environ["PATH"]})
    return done.stdout.split()


def test_workers_that_see_the_gpus_are_one_a_machine_unless_asked():
    assert made()[0] == "2" and made("GPU=1")[0] == "1" and made("GPU=1", "WORKERS=3")[0] == "3"


def test_more_workers_leave_those_that_run_as_they_are():
    def worker(*variables: str) -> str:
        workers, cpus = made(*variables)
        return subprocess.run([BIN / "docker-compose", "--file", DOCKER / "compose.yaml", "config", "--hash", "worker"],
                              text=True, capture_output=True, check=True, env={
                                  "PATH": os.environ["PATH"], "HOME": "/nonexistent", "WORKERS": workers,
                                  "WORKER_CPUS": cpus}).stdout

    # Compose starts a container anew where this differs.
    assert worker("WORKERS=2", "WORKER_CPUS=3") == worker("WORKERS=4", "WORKER_CPUS=3")
    assert worker("WORKERS=4", "WORKER_CPUS=3") != worker("WORKERS=4", "WORKER_CPUS=2")
    assert "WORKERS=4 WORKER_CPUS=" in (ROOT / "docs" / "cluster.md").read_text(), "the guide says both"


SECRETS = ["pgpass", "postgres_password", "ray_token", "s3.json", "s3_impactx", "s3_mlflow"]


def test_a_purge_removes_only_the_secrets_that_were_drawn(tmp_path):
    def make(target: str, folder: Path) -> str:
        # Neither an engine nor a cluster: only what is done to the folder.
        done = subprocess.run(["make", target, f"SECRETS={folder}", "DOCKER=true", f"PYTHON={sys.executable}"],
                              cwd=ROOT, text=True, capture_output=True, check=True, env={"PATH": os.environ["PATH"]})
        return done.stdout

    own, foreign, mixed = (tmp_path / name for name in ("own", "foreign", "mixed"))
    make("cluster-secrets", own)
    (own / "ray_token").unlink()
    make("cluster-secrets", own)  # drawn a second time
    assert "removed" in make("cluster-purge", own) and not own.exists()
    assert "no secrets are there" in make("cluster-purge", own)
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("three years")
    assert "is kept" in make("cluster-purge", foreign) and (foreign / "thesis.tex").exists()
    mixed.mkdir()
    (mixed / "thesis.tex").write_text("three years")
    (mixed / "ray_token").write_text("of another cluster")
    make("cluster-secrets", mixed)
    assert set(SECRETS) <= {path.name for path in mixed.iterdir()}
    assert "kept are ray_token, thesis.tex" in make("cluster-purge", mixed)
    assert sorted(path.name for path in mixed.iterdir()) == ["ray_token", "thesis.tex"]


def test_the_demo_installs_nothing_that_only_tests_need(tmp_path):
    def installed(target: str) -> list[str]:
        return [line for line in printed(target, f"VENV={tmp_path}").splitlines() if " pip install " in line]

    demo = installed("demo")
    assert len(demo) == 1 and "'.[cluster,explain]'" in demo[0]
    for target in ("test", "lint", "unit", "test-servers", "cluster-check"):
        first, *more = installed(target)
        assert [first] == demo and "test]'" in more[0], "what the demo installs, and then the rest"
        assert all("--constraint constraints.txt" in line for line in [first, *more])


def test_secrets_are_drawn_anew_kept_and_closed_to_others(tmp_path):
    make = module("make_secrets").make_secrets
    one, two = tmp_path / "one", tmp_path / "two"
    assert sorted(make(one)) == sorted(path.name for path in one.glob("[!.]*")) == SECRETS
    make(two)
    before = {path.name: path.read_text() for path in one.glob("[!.]*")}
    assert all(text != (two / name).read_text() for name, text in before.items())
    assert stat.S_IMODE(one.stat().st_mode) == 0o700
    (one / "ray_token").unlink()
    assert make(one) == ["ray_token"]
    assert {n: t for n, t in before.items() if n != "ray_token"} == {
        path.name: path.read_text() for path in one.glob("[!.]*") if path.name != "ray_token"}
    assert before["postgres_password"] in before["pgpass"] and len(before["ray_token"]) == 64
    for bucket in json.loads(before["s3.json"])["identities"]:
        assert {action.partition(":")[2] for action in bucket["actions"]} == {bucket["name"]}
        (keys,) = bucket["credentials"]
        assert {keys["accessKey"], keys["secretKey"]} <= set(before[f"s3_{bucket['name']}"].split())
    ignored = subprocess.run(["git", "check-ignore", "docker/secrets/ray_token"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in (0, 128)  # 128: not a git checkout
    assert "secrets" not in (ROOT / ".dockerignore").read_text().replace("# Only", "").split("*", 1)[1]


def test_every_package_of_the_image_is_pinned_and_torch_has_a_layer_of_its_own():
    constraints = (ROOT / "constraints.txt").read_text()
    lists = module("pins").lists((ROOT / "pyproject.toml").read_text(), constraints)
    pins = dict(line.split("==") for line in constraints.splitlines() if "==" in line and not line.startswith("#"))
    assert lists["torch-cpu.txt"] == [f"torch=={pins['torch']}", f"torchvision=={pins['torchvision']}"]
    assert set(lists["torch-cpu.txt"]) < set(lists["torch.txt"])
    assert {line.partition("==")[0] for line in lists["torch.txt"]} == {
        name for name in pins if name.startswith(("torch", "nvidia", "cuda", "triton"))}
    names = {re.split(r"[^\w.-]", line)[0] for line in lists["requirements.txt"]}
    assert {"ray", "mlflow", "psycopg2-binary", "timm"} <= names <= set(pins)
    assert not names & {"torch", "torchvision", "pytest"}
    changed = module("pins").lists((ROOT / "pyproject.toml").read_text(), constraints.replace("ray==", "ray==9"))
    assert changed["torch.txt"] == lists["torch.txt"]


def test_code_comes_after_every_download():
    steps = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if re.match("[A-Z]+ ", line)]
    code = steps.index("COPY . .")
    assert max(i for i, line in enumerate(steps) if "pip install --constraint" in line) < code
    assert "USER 1000:1000" in steps[code:] and "root" not in steps[-1]


def test_the_kuberay_manifest_runs_the_same_command_with_a_token():
    documents = list(yaml.safe_load_all((DOCKER / "kuberay" / "rayjob.yaml").read_text()))
    (job,) = [d for d in documents if d["kind"] == "RayJob"]
    spec = job["spec"]
    assert spec["entrypoint"].startswith("python jobs/full_grid.py ")
    assert "gpus=" not in spec["entrypoint"].replace("grows_to_gpus=", ""), "GPUs are used by themselves"
    settings = load_settings("full_grid", spec["entrypoint"].split()[2:], ROOT / "configs").cluster
    cluster = spec["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    most = [group["maxReplicas"] * int(limits[name]) for name in ("cpu", "nvidia.com/gpu")]
    assert cluster["enableInTreeAutoscaling"] and [settings.grows_to_cpus, settings.grows_to_gpus] == most
    assert settings.device == "auto"
    assert cluster["authOptions"] == {"mode": "token"}
    pins = (ROOT / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}\n" in pins
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = set()
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        images.add(container["image"])
        assert container["readinessProbe"]["exec"]["command"] == ["python", "/opt/impactx/docker/health.py"]
        assert set(container["resources"]["limits"]) >= {"cpu", "memory"}
        assert all("value" not in e for e in container["env"] if re.search("SECRET|PASSWORD|TOKEN", e["name"]))
    assert len(images) == 1 and cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_pods_are_as_restricted_as_the_containers(cluster):
    """Of the user, the capabilities, further privileges, the root file system, and the folders that are written."""
    spec = yaml.safe_load((DOCKER / "kuberay" / "rayjob.yaml").read_text())["spec"]
    ray = spec["rayClusterSpec"]
    head, workers = ray["headGroupSpec"]["template"]["spec"], ray["workerGroupSpecs"][0]["template"]["spec"]
    submitter = spec["submitterPodTemplate"]["spec"]
    for pod in (head, workers, submitter):
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 1000, "fsGroup": 1000,
                                          "seccompProfile": {"type": "RuntimeDefault"}}
    assert "USER 1000:1000\n" in (DOCKER / "Dockerfile").read_text()
    containers = [pod["containers"][0] for pod in (head, workers, submitter)]
    for container in (*containers, ray["autoscalerOptions"]):
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True,
                                                "capabilities": {"drop": ["ALL"]}}
        assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert {c["image"] for c in containers} == {containers[0]["image"]}
    assert not workers["automountServiceAccountToken"] and not submitter["automountServiceAccountToken"]
    for pod, name in ((head, "head"), (workers, "worker")):
        service = cluster["services"][name]
        written = {volume["target"] for volume in service["volumes"]} | {"/dev/shm"} | {
            place.partition(":")[0] for place in service["tmpfs"]}
        mounts = pod["containers"][0]["volumeMounts"]
        assert {mount["mountPath"] for mount in mounts if not mount.get("readOnly")} == written
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in pod["volumes"]}
