"""`ray job submit` to a real cluster with a dashboard: from a laptop to bare nodes, and the bare command."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from http.client import HTTPResponse
from pathlib import Path

import pytest
from lab import descendants, gone, until
from test_job import TINY, Job, check_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ROOT = Path(__file__).resolve().parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
QUICK = [setting for setting in TINY if not setting.startswith("cluster.")]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Head:
    """`ray start --head` with a dashboard, in a folder of its own."""

    def __init__(self, folder: Path, started_in: Path, python: Path = Path(sys.executable)) -> None:
        self.address = f"http://127.0.0.1:{free_port()}"
        self._agent = free_port()  # the usual port may be another cluster's
        self.folder = Path(tempfile.mkdtemp(prefix="ix-"))  # short: Ray puts sockets below it
        keep = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_")
                or not k.startswith(("RAY_", "MLFLOW_")) and k != "PYTHONPATH"}
        self.environment = keep | {"RAY_USAGE_STATS_ENABLED": "0",
                                   "PATH": f"{python.parent}:{os.environ['PATH']}"}
        with open(folder / "head.log", "wb") as log:
            self.process = subprocess.Popen(
                [python, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={free_port()}",
                 "--num-cpus=2", "--dashboard-host=127.0.0.1",
                 f"--dashboard-port={self.address.rpartition(':')[2]}", "--object-store-memory=200000000",
                 f"--dashboard-agent-listen-port={self._agent}", f"--temp-dir={self.folder}"],
                cwd=started_in, env=self.environment, stdout=log, stderr=log)
        until(self._answers, "the dashboard, and the agent that starts jobs", 120)

    def _answers(self) -> bool:
        places = f"{self.address}/api/version", f"http://127.0.0.1:{self._agent}/api/healthz"
        try:
            return all(self._open(place).status == 200 for place in places)
        except OSError:
            return False

    def _open(self, address: str) -> HTTPResponse:
        """Get an address as somebody who has the token."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"})
        return urllib.request.urlopen(request, timeout=30)

    def submit(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
        """`ray job submit`; waits for the job."""
        return subprocess.run([RAY, "job", "submit", f"--address={self.address}", *arguments], cwd=cwd,
                              env=self.environment, capture_output=True, text=True, timeout=900)

    def jobs(self) -> list[dict]:
        """What the dashboard knows of the submitted jobs."""
        with self._open(f"{self.address}/api/jobs/") as answer:
            return [job for job in json.load(answer) if job["type"] == "SUBMISSION"]

    def end(self) -> None:
        """Stop it, and what it started."""
        left = descendants(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        finally:
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            shutil.rmtree(self.folder, ignore_errors=True)


def python_without_the_package(folder: Path) -> Path:
    """An environment with everything that is installed here, but for the package itself."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    place, = folder.glob("lib/python*/site-packages")
    # Of a folder that such a file names, its own such files are not read: among them is the one of this package.
    (place / "others.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    asked = subprocess.run([python, "-c", "import ray, impactx"], cwd=folder, capture_output=True, text=True,
                           env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    assert "No module named 'impactx'" in asked.stderr
    return python


@pytest.fixture(params=["without the package", "in the repository"])
def head(request, tmp_path):
    """A running head; where it was started, and so where a bare command runs."""
    if request.param == "in the repository":
        running = Head(tmp_path, ROOT)
    else:
        empty = tmp_path / "empty"
        empty.mkdir()
        running = Head(tmp_path, empty, python_without_the_package(tmp_path / "venv"))
    yield running, request.param
    running.end()


def finished(output: Path) -> Job:
    """A job's output, to be looked at as that of a command."""
    job = Job.__new__(Job)
    job.output = output
    return job


def test_a_submitted_job_runs_and_its_log_can_be_read(head, tmp_path):
    cluster, kind = head
    output = tmp_path / "out"
    command = ["--", "python", "jobs/full_grid.py", "--preset", "demo", *QUICK, f"output={output}",
               f"cache={tmp_path / 'cache'}"]
    laptop = ["--working-dir", "."] if kind == "without the package" else []
    done = cluster.submit(*laptop, *command, cwd=ROOT if laptop else tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_runs(finished(output))
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    ours = [line for line in lines if re.match(r"\d\d:\d\d:\d\d ", line)]
    trials = [line for line in ours if re.search(r"stage \d.*: \d+ of \d+ trials, ", line)]
    assert len(trials) == 4 and len(ours) < 40, done.stdout
    table = next(k for k, line in enumerate(lines) if line.startswith("data set  model"))
    after = [line for line in lines[table:] if line.startswith(("results:", "maps:", "all runs:", "comparison:"))]
    assert after[-1] == f"results: {next(output.glob('jobs/*/results.csv'))}"
    if laptop:
        sent, = cluster.folder.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
        assert {path.name for path in sent.iterdir()} >= {"jobs", "platform", "configs", "pyproject.toml"}
        assert not {path.name for path in sent.iterdir()} & {".venv", ".git", "data", "results", "tests", "docs"}
        assert sum(path.stat().st_size for path in sent.rglob("*") if "__pycache__" not in path.parts) < 3 * 2**20
    assert cluster.jobs()[-1]["status"] == "SUCCEEDED"

    wrong = cluster.submit(*laptop, *command, "training.epochs=none", cwd=ROOT if laptop else tmp_path)
    assert wrong.returncode != 0 and "training.epochs" in wrong.stdout + wrong.stderr
    assert cluster.jobs() and "FAILED" in {job["status"] for job in cluster.jobs()}


def test_a_stopped_job_ends_and_goes_on_when_submitted_again(tmp_path):
    cluster = Head(tmp_path, ROOT)
    try:
        output = tmp_path / "out"
        command = ["--", "python", "jobs/full_grid.py", "--preset", "demo", *QUICK, f"output={output}",
                   f"cache={tmp_path / 'cache'}"]
        begun = cluster.submit("--no-wait", "--submission-id=first", *command, cwd=tmp_path)
        assert begun.returncode == 0, begun.stdout + begun.stderr
        job = finished(output)
        until(lambda: job.running(1, "trials"), "the search", 300)
        work = {pid: line for pid, line in descendants(cluster.process.pid).items() if "full_grid" in line
                or line.startswith(("ray::TrialActor", "ray::MapWorker", "ray::RayTrainWorker", "ray::work"))}
        assert len(work) > 1
        stopped = subprocess.run([RAY, "job", "stop", f"--address={cluster.address}", "first"],
                                 env=cluster.environment, capture_output=True, text=True, timeout=120)
        assert stopped.returncode == 0, stopped.stdout + stopped.stderr
        until(lambda: cluster.jobs()[-1]["status"] in ("STOPPED", "FAILED"), "the end of the job", 60)
        until(lambda: gone(work), "the end of its processes", 60)
        states = dict(job.tracked("select status, count(*) from runs group by status"))
        assert "RUNNING" not in states and states["KILLED"] >= 2, states
        again = cluster.submit(*command, cwd=tmp_path)
        assert again.returncode == 0, again.stdout + again.stderr
        check_runs(job)
    finally:
        cluster.end()
