"""Build the image, start the whole cluster, run the demo, lose a worker half-way, read the results back, clean up.

  make cluster-check

Uses the engine that is there (DOCKER_HOST). Where there is none and this is root, it starts a dockerd of its own for
the time of the check. Images that cannot be pulled are replaced by stand-ins (docker/stand_in.py). Needs 25 GB of disk
space, 16 GB of memory and the packages of the `test` extra (Compose), and takes 10 minutes, and 5 more for
images that have to be made.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stand_in

ROOT = Path(__file__).resolve().parents[1]
STARTED = time.monotonic()
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
KILL_AT = re.compile(r"\b\d+ of \d+ maps")  # the first shards are there, most are not


def say(text: str) -> None:
    """One line of the protocol, with the minutes since the start."""
    minutes, seconds = divmod(int(time.monotonic() - STARTED), 60)
    print(f"[{minutes:02d}:{seconds:02d}] {text}", flush=True)


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """A command that must succeed; what it printed. Its output is shown only where it fails."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT, env=env)
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\nfailed with status {done.returncode}: {' '.join(command)}")
    return done.stdout


def must(condition: Any, what: str) -> None:
    """A promise that is kept, or the end of the check."""
    if not condition:
        raise SystemExit(f"NOT SO: {what}")
    say(f"  ok: {what}")


def program(*names: str) -> str:
    """The first of these programs that is there."""
    for name in names:
        if found := shutil.which(name):
            return found
    sys.exit(f"needs one of these programs: {', '.join(names)}")


def free_port() -> str:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def engine(docker: str) -> Iterator[None]:
    """The engine that answers, or one of our own."""
    if subprocess.run([docker, "info"], capture_output=True).returncode == 0:
        yield
        return
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        sys.exit("no container engine answers; start one (or, as root: apt-get install docker.io iptables debootstrap)")
    folder = Path(tempfile.mkdtemp(prefix="impactx-engine-", dir="/var/tmp"))
    os.environ["DOCKER_HOST"] = f"unix://{folder}/docker.sock"
    with open(folder / "log", "wb") as log:
        daemon = subprocess.Popen(
            ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec", "--pidfile", folder / "pid",
             "--host", os.environ["DOCKER_HOST"]], stdout=log, stderr=log)
    try:
        for _ in range(60):
            if subprocess.run([docker, "info"], capture_output=True).returncode == 0:
                break
            time.sleep(1)
        else:
            sys.exit(f"dockerd does not start:\n{(folder / 'log').read_text()[-3000:]}")
        say("started an engine of our own")
        yield
    finally:
        daemon.terminate()
        daemon.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def provide_images(docker: str) -> None:
    """The public images, pulled, or stood in for."""
    for name, make in stand_in.IMAGES.items():
        if subprocess.run([docker, "image", "inspect", name], capture_output=True).returncode == 0:
            say(f"{name}: there")
        elif subprocess.run([docker, "pull", "--quiet", name], capture_output=True, timeout=900).returncode == 0:
            say(f"{name}: pulled")
        else:
            make(run, docker)
            say(f"{name}: no registry answers, a stand-in was made")


def status(url: str, token: str | None = None) -> int:
    """The HTTP status of a GET."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """JSON from MLflow's REST API."""
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None,
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


class Cluster:
    """The compose project under test."""

    def __init__(self, docker: str, compose: str, folder: Path) -> None:
        self.docker, self.folder = docker, folder
        self.ray, self.mlflow = free_port(), free_port()
        self.env = os.environ | {
            "DOCKER": docker, "COMPOSE": compose, "COMPOSE_PROJECT_NAME": "impactx-check", "SECRETS": str(folder),
            "RAY_PORT": self.ray, "MLFLOW_PORT": self.mlflow, "WORKERS": "2", "WORKER_CPUS": "1",
            "IMAGE": "impactx:check"}
        self.compose_file = [*compose.split(), "--file", str(ROOT / "docker" / "compose.yaml")]

    def make(self, target: str) -> str:
        """A make target, as a user calls it."""
        return run("make", "--no-print-directory", target, env=self.env)

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A compose command."""
        return subprocess.run([*self.compose_file, *arguments], text=True, env=self.env, cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def containers(self) -> dict[str, dict[str, Any]]:
        """What the engine knows of each container, by its name."""
        names = self.compose("ps", "--all", "--quiet").stdout.split()
        return {c["Name"].removeprefix("/impactx-check-"): c for c in json.loads(run(self.docker, "inspect", *names))}

    def words(self) -> set[str]:
        """Every secret."""
        return {word for file in self.folder.iterdir() for word in re.findall(r"[0-9a-f]{40,}", file.read_text())}


def check_security(cluster: Cluster) -> None:
    """Nobody without the token, nothing beyond loopback, no root where we wrote the image."""
    token = (cluster.folder / "ray_token").read_text()
    jobs = f"http://127.0.0.1:{cluster.ray}/api/jobs/"
    must((status(jobs), status(jobs, "f" * 64), status(jobs, token)) == (401, 403, 200),
         "the dashboard's API answers 401 without a token, 403 to a wrong one, 200 to the right one")
    done = cluster.compose("exec", "-T", "-e", "RAY_AUTH_MODE=disabled", "head", "ray", "job", "submit", "--", "true")
    must(done.returncode != 0 and "succeeded" not in done.stdout, "a submit without the token is refused")
    containers = cluster.containers()
    published = {p["HostIp"] for c in containers.values() for ports in c["NetworkSettings"]["Ports"].values()
                 for p in ports or []}
    must(published == {"127.0.0.1"}, "nothing is published beyond 127.0.0.1")
    users = {name: container["Config"]["User"] for name, container in containers.items()}
    must({user for name, user in users.items() if name.startswith(("head", "worker", "mlflow"))} == {"1000:1000"},
         "head, workers and MLflow do not run as root")
    listed = "".join(run(cluster.docker, "top", c["Id"], "-eo", "pid,args") for c in containers.values())
    must(not [w for w in cluster.words() if w in listed], "no secret in the process list")
    inspected = json.dumps(containers)
    must(not [w for w in cluster.words() if w in inspected], "no secret in what the engine tells of its containers")


def run_demo(cluster: Cluster) -> str:
    """The bare submit; the second worker is killed when some maps are there. What the job printed."""
    victim = "impactx-check-worker-2"
    job = subprocess.Popen(["make", "--no-print-directory", "cluster-demo"], text=True, env=cluster.env, cwd=ROOT,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    printed, killed = [], False
    assert job.stdout is not None
    for line in job.stdout:
        line = COLOUR.sub("", line)
        printed.append(line)
        if line.strip():
            say(f"  | {line.rstrip()}")
        if ": A repeat 0: starts" in line:
            used = run(cluster.docker, "stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}")
            say("  memory: " + ", ".join(used.replace("impactx-check-", "").split("\n")).rstrip(", "))
        if not killed and KILL_AT.search(line):
            run(cluster.docker, "kill", "--signal", "KILL", victim)
            killed = True
            say(f"  {victim} was killed")
    must(job.wait() == 0, "the job succeeded")
    must(killed, "it had lost a worker half-way")
    return "".join(printed)


def read_back(cluster: Cluster) -> None:
    """The finished runs and the table, by MLflow's API: PostgreSQL has the runs, S3 the table."""
    base = f"http://127.0.0.1:{cluster.mlflow}/api/2.0"
    experiment = ask(f"{base}/mlflow/experiments/get-by-name?experiment_name=impactx")["experiment"]
    must(experiment["artifact_location"].startswith("mlflow-artifacts:"), "artifacts go through the server")
    wanted = {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}
    runs = ask(f"{base}/mlflow/runs/search", wanted)["runs"]
    states = Counter(r["info"]["status"] for r in runs)
    keys = [tag["value"] for r in runs for tag in r["data"]["tags"] if tag["key"] == "impactx.key"]
    must(states == {"FINISHED": len(runs)} and len(set(keys)) == len(runs) > 10,
         f"{len(runs)} runs, all FINISHED, each once")
    for one in sorted(runs, key=lambda r: r["info"]["start_time"]):
        metrics = {m["key"]: m["value"] for m in one["data"].get("metrics", [])}
        found = [f"{name} {metrics[name]:.4f}" for name in ("test_accuracy", "best_val_accuracy") if name in metrics]
        say(f"  run {one['info']['run_name']:<40} {one['info']['status']:<9} {''.join(found[:1])}")
    (whole,) = [r for r in runs if {"key": "impactx.role", "value": "job"} in r["data"]["tags"]]
    path = whole["info"]["artifact_uri"].removeprefix("mlflow-artifacts:").lstrip("/")
    with urllib.request.urlopen(f"{base}/mlflow-artifacts/artifacts/{path}/results.csv", timeout=60) as answer:
        table = answer.read().decode()
    must(table.count("\n") >= 4, "results.csv, read through MLflow from S3, has a row for each final model")


def main() -> None:
    """All of it, in order."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    docker = os.environ.get("DOCKER") or program("/usr/bin/docker", "docker")
    os.environ["PATH"] += os.pathsep + str(ROOT / ".venv" / "bin")
    compose = os.environ.get("COMPOSE") or program("docker-compose")
    with engine(docker), tempfile.TemporaryDirectory(prefix="impactx-secrets-") as secrets:
        say(f"engine {run(docker, 'version', '--format', '{{.Server.Version}}').strip()}, "
            f"{run(*compose.split(), 'version').strip()}")
        provide_images(docker)
        cluster = Cluster(docker, compose, Path(secrets))
        try:
            cluster.make("cluster-image")
            size = int(run(docker, "image", "inspect", "--format", "{{.Size}}", "impactx:check"))
            say(f"make cluster-image: {size / 1e9:.1f} GB")
            cluster.make("cluster-up")
            say("make cluster-up:")
            for name, container in cluster.containers().items():
                must(container["State"]["Health"]["Status"] == "healthy", f"{name} is healthy")
            check_security(cluster)
            say("make cluster-demo:")
            printed = run_demo(cluster)
            read_back(cluster)
            logs = cluster.compose("logs", "--no-color").stdout + printed
            must(not [w for w in cluster.words() if w in logs], "no secret in any log")
            say("make cluster-down:")
            cluster.make("cluster-down")
            must(not cluster.compose("ps", "--all", "--quiet").stdout.split(), "no container is left")
        except BaseException:
            print(cluster.compose("ps", "--all").stdout, cluster.compose("logs", "--no-color", "--tail", "40").stdout)
            raise
        finally:
            cluster.make("cluster-purge")
        must("impactx-check" not in run(docker, "volume", "ls"), "no volume is left")
    say("the cluster does what it says")


if __name__ == "__main__":
    main()
