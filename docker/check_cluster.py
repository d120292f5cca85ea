"""Check the whole cluster: build, start, run the demo, kill a worker, read the results, clean up.

  make cluster-check

It uses the engine that answers (DOCKER_HOST). If none does and this is root, it starts a dockerd of
its own for the time of the check. Images that cannot be pulled are replaced by stand-ins
(docker/stand_in.py). It needs 25 GB of disk space, 16 GB of memory and the packages of the `test`
extra (Compose). It takes 10 minutes, and 5 more for images that have to be made.
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
KILL_AT = re.compile(r"\b\d+ of \d+ maps")  # the first shards are made, most are not


def say(text: str) -> None:
    """Print one line of the protocol, with the minutes since the start."""
    minutes, seconds = divmod(int(time.monotonic() - STARTED), 60)
    print(f"[{minutes:02d}:{seconds:02d}] {text}", flush=True)


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """Run a command that must succeed and return its output, which is printed only if it fails."""
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          cwd=ROOT, env=env)
    if done.returncode:
        sys.exit(f"{done.stdout[-6000:]}\n"
                 f"failed with status {done.returncode}: {' '.join(command)}")
    return done.stdout


def must(condition: Any, promise: str) -> None:
    """Note that a promise is kept; end the check if it is not."""
    if not condition:
        raise SystemExit(f"NOT SO: {promise}")
    say(f"  ok: {promise}")


def program(*names: str) -> str:
    """Return the path of the first of these programs that is installed."""
    for name in names:
        if path := shutil.which(name):
            return path
    sys.exit(f"needs one of these programs: {', '.join(names)}")


def free_port() -> str:
    """Return a free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextlib.contextmanager
def engine(docker: str) -> Iterator[None]:
    """Use the engine that answers, or one that is started for the time of the check."""
    if subprocess.run([docker, "info"], capture_output=True).returncode == 0:
        yield
        return
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        sys.exit("no container engine answers; start one (or, as root: apt-get install docker.io "
                 "iptables debootstrap)")
    folder = Path(tempfile.mkdtemp(prefix="impactx-engine-", dir="/var/tmp"))
    os.environ["DOCKER_HOST"] = f"unix://{folder}/docker.sock"
    with open(folder / "log", "wb") as log:
        daemon = subprocess.Popen(
            ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec",
             "--pidfile", folder / "pid", "--host", os.environ["DOCKER_HOST"]],
            stdout=log, stderr=log)
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
    """Pull the public images, or make stand-ins for them."""
    for name, make in stand_in.IMAGES.items():
        inspected = subprocess.run([docker, "image", "inspect", name], capture_output=True)
        if inspected.returncode == 0:
            say(f"{name}: there")
        elif subprocess.run([docker, "pull", "--quiet", name], capture_output=True,
                            timeout=900).returncode == 0:
            say(f"{name}: pulled")
        else:
            make(run, docker)
            say(f"{name}: no registry answers, a stand-in was made")


def status(url: str, token: str | None = None) -> int:
    """Return the HTTP status of a GET."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Return JSON of MLflow's REST API."""
    request = urllib.request.Request(url, json.dumps(body).encode() if body else None,
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


class Cluster:
    """The compose project under test.

    Args:
        docker: The engine's client.
        compose: The command of Compose.
        folder: The folder of the secrets.
    """

    def __init__(self, docker: str, compose: str, folder: Path) -> None:
        self.docker, self.folder = docker, folder
        self.ray, self.mlflow = free_port(), free_port()
        self.env = os.environ | {
            "DOCKER": docker, "COMPOSE": compose, "COMPOSE_PROJECT_NAME": "impactx-check",
            "SECRETS": str(folder), "RAY_PORT": self.ray, "MLFLOW_PORT": self.mlflow,
            "WORKERS": "2", "WORKER_CPUS": "1", "IMAGE": "impactx:check"}
        self.compose_file = [*compose.split(), "--file", str(ROOT / "docker" / "compose.yaml")]

    def make(self, target: str) -> str:
        """Run a make target, as a user does, and return its output."""
        return run("make", "--no-print-directory", target, env=self.env)

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of Compose, which may fail."""
        return subprocess.run([*self.compose_file, *arguments], text=True, env=self.env, cwd=ROOT,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def containers(self) -> dict[str, dict[str, Any]]:
        """Return what the engine tells of each container, by the container's name."""
        names = self.compose("ps", "--all", "--quiet").stdout.split()
        return {container["Name"].removeprefix("/impactx-check-"): container
                for container in json.loads(run(self.docker, "inspect", *names))}

    def words(self) -> set[str]:
        """Return every secret."""
        return {word for file in self.folder.iterdir()
                for word in re.findall(r"[0-9a-f]{40,}", file.read_text())}


def check_security(cluster: Cluster) -> None:
    """Check the token, the ports, the users, and that secrets are shown nowhere."""
    token = (cluster.folder / "ray_token").read_text()
    jobs = f"http://127.0.0.1:{cluster.ray}/api/jobs/"
    must((status(jobs), status(jobs, "f" * 64), status(jobs, token)) == (401, 403, 200),
         "the dashboard's API answers 401 without a token, 403 to a wrong one, 200 to the right "
         "one")
    done = cluster.compose("exec", "-T", "-e", "RAY_AUTH_MODE=disabled", "head", "ray", "job",
                           "submit", "--", "true")
    must(done.returncode != 0 and "succeeded" not in done.stdout,
         "a submit without the token is refused")
    containers = cluster.containers()
    published = {port["HostIp"] for container in containers.values()
                 for ports in container["NetworkSettings"]["Ports"].values()
                 for port in ports or []}
    must(published == {"127.0.0.1"}, "nothing is published beyond 127.0.0.1")
    users = {container["Config"]["User"] for name, container in containers.items()
             if name.startswith(("head", "worker", "mlflow"))}
    must(users == {"1000:1000"}, "head, workers and MLflow do not run as root")
    for name, container in containers.items():
        inside = run(cluster.docker, "exec", "--user", "0:0", container["Id"], "sh", "-c",
                     "cat /sys/fs/cgroup/pids.max || cat /sys/fs/cgroup/pids/pids.max; "
                     "touch /etc/written || true")
        limit = str(container["HostConfig"]["PidsLimit"])
        must("Read-only file system" in inside and limit in inside.splitlines(),
             f"{name}: even root cannot write its file system; at most {limit} threads")
    listed = "".join(run(cluster.docker, "top", container["Id"], "-eo", "pid,args")
                     for container in containers.values())
    must(not [w for w in cluster.words() if w in listed], "no secret in the process list")
    inspected = json.dumps(containers)
    must(not [w for w in cluster.words() if w in inspected],
         "no secret in what the engine tells of its containers")


def run_demo(cluster: Cluster) -> str:
    """Submit the demo, kill the second worker once some maps are made, and return the output."""
    victim = "impactx-check-worker-2"
    job = subprocess.Popen(["make", "--no-print-directory", "cluster-demo"], text=True,
                           env=cluster.env, cwd=ROOT, stdout=subprocess.PIPE,
                           stderr=subprocess.STDOUT)
    printed, killed = [], False
    assert job.stdout is not None
    for line in job.stdout:
        line = COLOUR.sub("", line)
        printed.append(line)
        if line.strip():
            say(f"  | {line.rstrip()}")
        if ": A repeat 0: starts" in line:
            used = run(cluster.docker, "stats", "--no-stream", "--format",
                       "{{.Name}} {{.MemUsage}} {{.PIDs}} threads")
            lines = used.replace("impactx-check-", "").split("\n")
            say("  memory: " + ", ".join(lines).rstrip(", "))
        if not killed and KILL_AT.search(line):
            run(cluster.docker, "kill", "--signal", "KILL", victim)
            killed = True
            say(f"  {victim} was killed")
    must(job.wait() == 0, "the job succeeded")
    must(killed, "it had lost a worker half-way")
    return "".join(printed)


def read_back(cluster: Cluster) -> None:
    """Read the runs (from PostgreSQL) and the table (from S3) through MLflow's API."""
    base = f"http://127.0.0.1:{cluster.mlflow}/api/2.0"
    experiment = ask(f"{base}/mlflow/experiments/get-by-name?experiment_name=impactx")["experiment"]
    must(experiment["artifact_location"].startswith("mlflow-artifacts:"),
         "artifacts go through the server")
    wanted = {"experiment_ids": [experiment["experiment_id"]], "max_results": 1000}
    runs = ask(f"{base}/mlflow/runs/search", wanted)["runs"]
    states = Counter(r["info"]["status"] for r in runs)
    keys = [tag["value"] for r in runs for tag in r["data"]["tags"]
            if tag["key"] == "impactx.key"]
    must(states == {"FINISHED": len(runs)} and len(set(keys)) == len(runs) > 10,
         f"{len(runs)} runs, all FINISHED, each once")
    for one in sorted(runs, key=lambda r: r["info"]["start_time"]):
        metrics = {m["key"]: m["value"] for m in one["data"].get("metrics", [])}
        accuracies = [f"{name} {metrics[name]:.4f}"
                      for name in ("test_accuracy", "best_val_accuracy") if name in metrics]
        say(f"  run {one['info']['run_name']:<40} {one['info']['status']:<9} "
            f"{''.join(accuracies[:1])}")
    (job,) = [r for r in runs if {"key": "impactx.role", "value": "job"} in r["data"]["tags"]]
    path = job["info"]["artifact_uri"].removeprefix("mlflow-artifacts:").lstrip("/")
    address = f"{base}/mlflow-artifacts/artifacts/{path}/results.csv"
    with urllib.request.urlopen(address, timeout=60) as answer:
        table = answer.read().decode()
    must(table.count("\n") >= 4,
         "results.csv, read through MLflow from S3, has a row for each final model")


def main() -> None:
    """Run the whole check."""
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
                must(container["State"]["Health"]["Status"] == "healthy",
                     f"{name} is healthy")
            check_security(cluster)
            say("make cluster-demo:")
            printed = run_demo(cluster)
            read_back(cluster)
            logs = cluster.compose("logs", "--no-color").stdout + printed
            must(not [w for w in cluster.words() if w in logs], "no secret in any log")
            say("make cluster-down:")
            cluster.make("cluster-down")
            must(not cluster.compose("ps", "--all", "--quiet").stdout.split(),
                 "no container is left")
        except BaseException:
            print(cluster.compose("ps", "--all").stdout,
                  cluster.compose("logs", "--no-color", "--tail", "40").stdout)
            raise
        finally:
            cluster.make("cluster-purge")
        must("impactx-check" not in run(docker, "volume", "ls"), "no volume is left")
        must(not cluster.folder.exists(), "no secret is left")
    say("the cluster does what it says")


if __name__ == "__main__":
    main()
