"""The cluster that a job starts for itself: what listens, and who is let in. The demo's command and real requests."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from lab import descendants, gone, kill, task, until
from test_job import Job

from impactx.cluster.access import SEVERAL_MACHINES

DRIVER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
print("it", "ran", ray.get(ray.remote(num_cpus=0)(lambda: 6 * 7).remote()))
"""


def listening(pids: set[int]) -> dict[tuple[str, int], int]:
    """The TCP sockets on which these processes listen: (address in hexadecimal, port) -> pid."""
    inodes = {}
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link)):
                    inodes[found[1]] = pid
            except OSError:  # the process or the file is gone
                continue
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                address, _, port = fields[1].partition(":")
                found[address, int(port, 16)] = inodes[fields[9]]
    return found


def is_loopback(address: str) -> bool:
    """127.0.0.0/8, the same written as IPv6, or ::1; the kernel prints words of four bytes backwards."""
    return address.endswith("7F") and len(address) == 8 or address == "0" * 24 + "01000000" or (
        address.startswith("0" * 16 + "FFFF0000") and address.endswith("7F"))


class Demo(Job):
    """The demo's command under way, from a shell that switches authentication off."""

    def __init__(self, output: Path, cache: Path) -> None:
        with pytest.MonkeyPatch.context() as shell:
            shell.setenv("RAY_AUTH_MODE", "disabled")
            shell.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
            super().__init__(output, cache, "training.epochs=5000", "training.patience=5000")

    def environment(self, pid: int) -> dict[str, str]:
        """The environment of one of its processes."""
        pairs = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


@pytest.fixture(scope="module")
def demo(tmp_path_factory, cache):
    job = Demo(tmp_path_factory.mktemp("demo") / "out", cache)
    job.meet(lambda: job.running(1), "the search")
    yield job
    if job.process.poll() is None:
        job.kill()
        job.process.wait()


@pytest.fixture(scope="module")
def raylet(demo):
    """(pid, command line) of the cluster's raylet."""
    return next((pid, line) for pid, line in descendants(demo.process.pid).items() if "raylet/raylet" in line)


@pytest.fixture(scope="module")
def drawn(demo, raylet) -> str:
    """The cluster's token."""
    environment = demo.environment(raylet[0])
    assert environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN" not in environment
    path = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert path.stat().st_mode & 0o777 == 0o600 and path.parent.stat().st_mode & 0o777 == 0o700
    return path.read_text()


def test_everything_listens_on_loopback(demo):
    sockets = listening({demo.process.pid, *descendants(demo.process.pid)})
    assert len(sockets) > 5, "these are not the cluster's processes"
    assert [(address, port, pid) for (address, port), pid in sockets.items() if not is_loopback(address)] == []


def post(port: int, token: str | None) -> tuple[int, str]:
    """Ask the agent to run a command, as its job port does; status and text of the answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/job_agent/jobs/", json.dumps({"entrypoint": "echo it ran"}).encode(),
        {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_an_http_request_without_the_token_is_refused(demo, raylet, drawn):
    port = int(re.search(r"--listen-port=(\d+)", raylet[1])[1])
    assert port in {port for _, port in listening(set(descendants(demo.process.pid)))}, "another cluster has the port"
    assert post(port, None)[0] == 401
    assert post(port, "f" * 64)[0] == 403
    assert post(port, drawn)[0] == 200, "refused for another reason than the token"


@pytest.mark.parametrize("who", ["without", "with another", "with the"])
def test_a_driver_without_the_token_is_refused(demo, raylet, drawn, tmp_path, who):
    address = re.search(r"--gcs-address=(\S+)", raylet[1])[1]
    (tmp_path / "token").write_text(drawn if who == "with the" else "f" * 64)
    access = {"RAY_AUTH_MODE": "disabled"} if who == "without" else {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    keep = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    keep |= {SEVERAL_MACHINES: "0"}  # or Ray would look for the cluster on the machine's own address
    done = subprocess.run([sys.executable, "-c", DRIVER, address], env=keep | access, cwd=tmp_path, timeout=120,
                          capture_output=True, text=True)
    assert (done.returncode == 0, "it ran 42" in done.stdout) == ((who == "with the",) * 2), done.stderr


def test_the_token_is_written_nowhere_and_dies_with_the_cluster(demo, raylet, drawn):
    below = descendants(demo.process.pid)
    assert not [line for line in below.values() if drawn in line]
    environment = demo.environment(raylet[0])
    session = Path(re.search(r"--session[_-]dir=(\S+)", " ".join(below.values()))[1])
    demo.kill(signal.SIGINT)
    assert demo.end() == 128 + signal.SIGINT, demo.log
    until(lambda: gone(below), "the end of the cluster", 60)
    assert not Path(environment["RAY_AUTH_TOKEN_PATH"]).parent.exists()
    places = [path for folder in (demo.output, session) for path in folder.rglob("*") if path.is_file()]
    assert (demo.output / "mlflow.db") in places and any("raylet" in path.name for path in places)
    assert [path for path in places if drawn.encode() in path.read_bytes()] == []
    assert drawn not in demo.log


def test_a_training_by_one_worker_listens_on_loopback_too(cluster, lab):
    """A process group of torch would listen on every address, while the training runs."""
    long = lab(training={"epochs": 5000, "patience": 5000, "memory_mb": 64})
    seen = {}

    def look(unit, row):
        if not seen:
            seen.update(listening(set(descendants(os.getpid()))))
            seen.update(trained_by=kill("RayTrainWorker"))

    with pytest.raises(Exception, match="worker"):
        long.ray(max_failures=0).train(task(long.a()), look)
    (worker,) = seen.pop("trained_by")  # it was there when the sockets were read
    assert worker in seen.values()
    assert [(address, port, pid) for (address, port), pid in seen.items() if not is_loopback(address)] == []
