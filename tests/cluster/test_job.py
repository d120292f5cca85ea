"""The whole job by its command line: undisturbed, killed and started again, interrupted, and with an error."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab import descendants, gone, until

from impactx.cluster.access import SEVERAL_MACHINES

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "jobs" / "full_grid.py"), "--preset", "demo"]
# Steps long enough to be met under way; on an idle machine each is a second or two.
TINY = ["datasets.digits.subset=120", "training.epochs=50", "training.patience=50", "attribution.max_evals=150",
        "maps.shard_size=6", "grid.learning_rate=[0.004,0.002]", "grid.validation_fraction=[0.2]", "approach=[impactx]",
        "evaluation.map_images=12", "evaluation.resamples=200", "cluster.num_cpus=2"]
UNITS = 2 + 1 + 1 + 2 + 1 + 2 + 2  # trials, A, maps, trials, IMPACTX, tests, judgements of maps
NOISE = ("Traceback", "core_worker", "DeprecationWarning", "FutureWarning", "Progress bar", "INFO", "(pid=", "it/s")


class Job:
    """A command under way, and what it has left in its output."""

    def __init__(self, output: Path, cache: Path, *more: str, log: Path | None = None) -> None:
        self.output = output
        output.mkdir(parents=True, exist_ok=True)
        self._log = log or output.parent / f"{output.name}-{time.monotonic_ns()}.log"
        environment = {k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH_") or k == SEVERAL_MACHINES
                       or not k.startswith(("RAY_", "MLFLOW_"))}
        with open(self._log, "w", encoding="utf8") as stream:
            self.process = subprocess.Popen(
                [*COMMAND, f"output={output}", f"cache={cache}", *TINY, *more], stdout=stream, stderr=subprocess.STDOUT,
                env=environment, cwd=output.parent,
                # A shell's background job ignores Ctrl-C, and so would whatever the tests start there.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))

    @property
    def log(self) -> str:
        """Everything that it printed."""
        return self._log.read_text(encoding="utf8")

    def found(self, pattern: str) -> list[Path]:
        """Files of the output."""
        return sorted(self.output.glob(pattern))

    def meet(self, condition, what: str):
        """Wait for a condition of a job that must not be over by then."""
        return until(lambda: self.process.poll() is None and condition() or self._must_run(what), what, 300)

    def _must_run(self, what: str) -> bool:
        assert self.process.poll() is None, f"over before {what}:\n{self.log}"
        return False

    def end(self) -> int:
        """Wait for its end; the exit status."""
        return self.process.wait(timeout=560)

    def kill(self, number: int = signal.SIGKILL) -> dict[int, str]:
        """Send a signal; the processes that it had started."""
        below = descendants(self.process.pid)
        assert any("raylet" in line for line in below.values())
        self.process.send_signal(number)
        return below

    def running(self, stage: int, role: str = "*") -> bool:
        """Whether a training of a stage has done an epoch and is not finished."""
        explained = bool(self.found("maps/*/result.json"))
        return explained == (stage == 2) and bool(self.found(f"{role}/*/running.pt"))

    def explaining(self) -> bool:
        """Whether some maps are there, and some are not."""
        shards = self.found("maps/*/shard-*.parquet")
        return 0 < len(shards) < 20

    def finished(self) -> dict[Path, int]:
        """The artifacts of finished units and the shards, with the time of their last change."""
        folders = [p.parent for p in self.found("*/*/result.json")]
        files = [p for folder in folders for p in folder.iterdir()] + self.found("maps/*/shard-*.parquet")
        return {p: p.stat().st_mtime_ns for p in files if not p.name.startswith((".", "running"))}

    def results(self) -> list[dict[str, str]]:
        """The table, without times and places."""
        (path,) = self.found("jobs/*/results.csv")
        rows = list(csv.DictReader(io.StringIO(path.read_text())))
        return [{k: v for k, v in row.items() if k not in (
            "train_seconds", "seconds_in_all", "checkpoint", "test", "map_quality")} for row in rows]

    def tracked(self, query: str) -> list[tuple]:
        """Rows of MLflow's database."""
        with contextlib.closing(sqlite3.connect(self.output / "mlflow.db")) as database:
            return database.execute(query).fetchall()


def check_runs(job: Job) -> set[tuple[str, str]]:
    """Every unit has one run, all are finished, no value is doubled. Returns (name, role) of all."""
    runs = job.tracked("select key.value, role.value, runs.name, runs.status from runs "
                       "join tags key on key.run_uuid = runs.run_uuid and key.key = 'impactx.key' "
                       "join tags role on role.run_uuid = runs.run_uuid and role.key = 'impactx.role'")
    assert len(runs) == len({key for key, *_ in runs}) == UNITS + 2, runs
    assert {status for *_, status in runs} == {"FINISHED"}, runs
    assert sorted(role for _, role, *_ in runs).count("job") == 1
    assert job.tracked("select count(*) from runs") == [(UNITS + 2,)]
    points = job.tracked("select run_uuid, key, step, count(*) from metrics group by run_uuid, key, step")
    assert len(points) > 50 * 6
    assert [row for row in points if row[3] != 1] == []
    return {(name, role) for _, role, name, _ in runs}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """A job that nothing happened to."""
    job = Job(tmp_path_factory.mktemp("undisturbed") / "out", cache)
    assert job.end() == 0, job.log
    return job


def test_an_undisturbed_job(undisturbed):
    rows = undisturbed.results()
    assert [(row["approach"], row["repeat"]) for row in rows] == [("baseline", "0"), ("impactx", "0")]
    assert all(0 < float(row["test_accuracy"]) <= 1 and row["test_images"] == "359" for row in rows)
    assert len(undisturbed.found("maps/*/shard-*.parquet")) == 20
    assert len(undisturbed.found("map_quality/*/map_scores.npz")) == 2
    check_runs(undisturbed)
    log = undisturbed.log
    assert "stage 1: 2 of 2 trials" in log and "120 of 120 maps" in log and "results.csv" in log
    assert "no control was run" in log and "Noise on the 16 %" in log
    assert [line for line in log.splitlines() if any(word in line for word in NOISE)] == []
    assert "reused" not in log


def test_the_same_command_again_only_reads(undisturbed, cache):
    before = undisturbed.finished()
    again = Job(undisturbed.output, cache)
    assert again.end() == 0, again.log
    assert again.finished() == before
    assert "stage 1: 2 of 2 trials reused" in again.log and "starts" not in again.log
    check_runs(again)


@pytest.mark.slow
def test_killed_in_stage_1_in_the_maps_and_in_stage_2(undisturbed, tmp_path, cache):
    output, below, kept, log = tmp_path / "out", {}, {}, ""
    stops = [("stage 1", lambda job: job.running(1)), ("the maps", Job.explaining),
             ("stage 2", lambda job: job.running(2))]
    for what, condition in stops:
        job = Job(output, cache)
        job.meet(lambda job=job, condition=condition: condition(job), what)
        kept |= job.finished()
        below |= job.kill()
        assert job.process.wait() == -signal.SIGKILL
        log += job.log
    assert "reused" in log
    last = Job(output, cache)
    assert last.end() == 0, last.log
    assert last.results() == undisturbed.results()
    after = last.finished()
    assert {p: after.get(p) for p in kept} == kept, "something finished was computed again"
    for what in ("stage 1: 2 of 2 trials reused", "A repeat 0: reused", "maps repeat 0: reused"):
        assert what in last.log
    for shard in undisturbed.found("maps/*/shard-*.parquet"):
        assert (output / shard.relative_to(undisturbed.output)).read_bytes() == shard.read_bytes()
    assert check_runs(last) == check_runs(undisturbed)
    until(lambda: gone(below), "the end of the killed jobs' processes", 120)


def interrupted(output: Path, cache: Path, number: int, what: str, condition) -> Job:
    """A job that was asked to end; what must hold afterwards."""
    job = Job(output, cache)
    job.meet(lambda: condition(job), what)
    below = job.kill(number)
    assert job.end() == 128 + number, job.log
    assert "the same command goes on" in job.log and "Traceback" not in job.log, job.log
    until(lambda: gone(below), "the end of the interrupted job's processes", 60)
    states = dict(job.tracked("select status, count(*) from runs group by status"))
    assert "RUNNING" not in states and states["KILLED"] >= 2, states
    return job


@pytest.mark.slow
def test_interrupted_in_the_search_and_in_a_training(tmp_path, cache):
    output = tmp_path / "out"
    first = interrupted(output, cache, signal.SIGTERM, "the search", lambda job: job.running(1, "trials"))
    assert "selected" not in first.log, "the search went on with what was there"
    second = interrupted(output, cache, signal.SIGINT, "the training", lambda job: job.running(1, "models"))
    assert "maps" not in second.log


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_anywhere_else(undisturbed, tmp_path, cache, number):
    output = tmp_path / "out"
    interrupted(output, cache, number, "the search", lambda job: job.running(1, "trials"))
    interrupted(output, cache, number, "the maps", Job.explaining)
    interrupted(output, cache, number, "stage 2", lambda job: job.running(2, "trials"))
    last = Job(output, cache)
    assert last.end() == 0, last.log
    assert last.results() == undisturbed.results()
    assert check_runs(last) == check_runs(undisturbed)


def test_errors_of_the_command_are_one_message(tmp_path):
    done = subprocess.run([*COMMAND, f"output={tmp_path / 'out'}", "training.epochs=none", "grid.learning_rat=[0.1]"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert "training.epochs" in done.stderr and "grid.learning_rat" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_too_small_is_one_message(tmp_path, cache):
    job = Job(tmp_path / "out", cache, "models.lenet5.resources.training={workers: 9, gpus: 1}")
    assert job.end() == 2
    assert job.log.count("error:") == 1 and "Traceback" not in job.log
    assert "models.lenet5.resources.training: workers = 9, each with cpus = 1" in job.log and "there is room for 2" in job.log


@pytest.mark.slow
def test_a_job_all_of_whose_trials_fail_says_why(tmp_path, cache):
    job = Job(tmp_path / "out", cache)
    job.meet(lambda: len(job.found("trials/*/running.pt")) == 2, "both trials")
    below = job.kill()
    job.process.wait()
    until(lambda: gone(below), "the end of the killed job's processes")
    torn = job.found("trials/*/running.pt")
    for path in torn:
        path.write_bytes(b"torn")
    again = Job(tmp_path / "out", cache)
    assert again.end() == 2, again.log
    assert again.log.count("error:") == 1 and "Traceback" not in again.log
    assert torn and all(again.log.count(str(path)) >= 1 for path in torn) and "delete the file" in again.log
