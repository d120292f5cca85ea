"""Real servers as plain processes on loopback: S3 (SeaweedFS), MLflow, PostgreSQL, Ray nodes."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
WEED = shutil.which("weed") or str(BIN / "weed")
INITDB = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parents[1].name))


def until(condition: Callable[[], Any], seconds: float = 60.0, what: str = "") -> Any:
    """Wait until a condition holds and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} not within {seconds} s"
        time.sleep(0.02)
    return value


def free_ports(count: int) -> list[int]:
    """Ports p such that p + 10000, which SeaweedFS takes as well, is free too."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if port > 55000 or port in found:
                continue
            try:
                two.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            found.append(port)
    return found


def answers(url: str) -> bool:
    """Whether a server says that it is well."""
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return answer.status == 200
    return False


@contextlib.contextmanager
def s3_server(folder: Path, config: Path) -> Iterator[tuple[str, Path]]:
    """SeaweedFS with the users of a configuration file; its endpoint and its log."""
    (folder / "data").mkdir()
    s3, master, volume, filer = free_ports(4)
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            [WEED, "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3",
             f"-s3.port={s3}", f"-s3.config={config}", "-s3.port.iceberg=0", "-s3.port.lance=0",
             f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
             "-master.volumeSizeLimitMB=64", "-volume.max=30"],
            stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{s3}", folder / "log"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # it does not leave promptly on SIGTERM
        process.wait()


class MlflowServer:
    """`mlflow server` on loopback; it can be killed and started again on the same database."""

    def __init__(self, folder: Path, backend: str | None = None, artifacts: str | None = None,
                 environment: dict[str, str] | None = None) -> None:
        (self.port,) = free_ports(1)
        self.uri, self.log, self.process = f"http://127.0.0.1:{self.port}", folder / "mlflow.log", None
        self.stores = ["--backend-store-uri", backend or f"sqlite:///{folder}/server.db",
                       "--artifacts-destination", artifacts or f"{folder}/artifacts"]
        self.environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true"} | (environment or {})

    def start(self) -> None:
        """Start it, and wait until it answers."""
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
                 "--port", str(self.port), *self.stores], start_new_session=True, env=self.environment,
                stdout=log, stderr=log)
        until(self.answers, 120, "an answer of mlflow server")

    def answers(self) -> bool:
        """Whether it is up; fails where it ended."""
        assert self.process.poll() is None, f"the server ended:\n{self.log.read_text()[-3000:]}"
        return answers(f"{self.uri}/health")

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # of its own session, started above
        self.process.wait()


@contextlib.contextmanager
def postgres(password: str) -> Iterator[tuple[int, Path]]:
    """A PostgreSQL server whose only user is mlflow, by password; its port and the folder of its programs."""
    if not INITDB:
        reason = "needs PostgreSQL's programs in /usr/lib/postgresql (Debian's package postgresql)"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    programs = INITDB[-1].parent
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else None  # it refuses to run as root
    become = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if user else {}
    folder = Path(tempfile.mkdtemp(prefix="impactx-postgres-"))  # not below pytest's folder: that is root's alone
    (folder / "password").write_text(password)
    if user:
        for path in (folder, folder / "password"):
            os.chown(path, user.pw_uid, user.pw_gid)
    (port,) = free_ports(1)
    try:
        subprocess.run([programs / "initdb", f"--pgdata={folder}/data", "--username=mlflow", "--auth=scram-sha-256",
                        f"--pwfile={folder}/password", "--encoding=UTF8", "--no-sync"], check=True,
                       capture_output=True, cwd=folder, **become)
        with open(folder / "log", "wb") as log:
            process = subprocess.Popen(
                [programs / "postgres", "-D", f"{folder}/data", "-h", "127.0.0.1", "-p", str(port), "-k", folder],
                stdout=log, stderr=log, cwd=folder, **become)
        try:
            until(lambda: subprocess.run([programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)],
                                         capture_output=True).returncode == 0, 60, "PostgreSQL")
            yield port, programs
        finally:
            process.send_signal(signal.SIGINT)  # its fast shutdown
            process.wait(60)
    finally:
        shutil.rmtree(folder)


def processes() -> dict[int, str]:
    """The command lines of all processes of this machine, as everybody on it can read them."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # it ended meanwhile
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


@contextlib.contextmanager
def ray_nodes(environment: dict[str, str], cpus: int = 2) -> Iterator[tuple[str, str, Path]]:
    """A head without CPUs of its own and a worker node, started from the repository's root.

    Yields the cluster's address, its dashboard's, and the folder of its logs.
    """
    folder = Path(tempfile.mkdtemp(prefix="ix-"))  # short: Ray puts sockets below it
    gcs, dashboard, *others = free_ports(12)
    ray = [BIN / "ray", "start", "--block", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    starts = [[*ray, "--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
               f"--temp-dir={folder}", f"--ray-client-server-port={others.pop()}", "--num-cpus=0",
               "--object-store-memory=100000000"],
              [*ray, f"--address=127.0.0.1:{gcs}", f"--num-cpus={cpus}", "--object-store-memory=200000000"]]
    nodes: list[subprocess.Popen] = []
    try:
        for number, command in enumerate(starts):
            agent, grpc, metrics = (others.pop() for _ in range(3))
            with open(folder / f"node-{number}.log", "wb") as log:
                nodes.append(subprocess.Popen(
                    [*command, f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}",
                     f"--metrics-export-port={metrics}"], stdout=log, stderr=log, cwd=ROOT, env=environment,
                    start_new_session=True))
            health = environment | {"RAY_AGENT_HEALTH": f"http://127.0.0.1:{agent}/api/healthz"}

            def healthy(node: subprocess.Popen = nodes[-1], number: int = number, health: dict = health) -> bool:
                assert node.poll() is None, (folder / f"node-{number}.log").read_text()
                return subprocess.run([sys.executable, ROOT / "docker" / "health.py"], env=health,
                                      capture_output=True).returncode == 0

            until(healthy, 120, f"Ray node {number}")
        yield f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", folder
    finally:
        for node in reversed(nodes):
            node.terminate()
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)  # of its own session, started above
                node.wait()
        for pid, line in processes().items():  # what a node has left: its processes name its folder
            if str(folder) in line and pid != os.getpid():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
