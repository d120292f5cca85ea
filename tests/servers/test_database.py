"""MLflow's SQLite file is created whole or not at all, whenever a process that creates it is killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from services import until

from impactx.run.tracker import RunIdentity
from impactx.settings import TrackingSettings
from impactx.tracking import MlflowTracker
from impactx.tracking.database import CREATING, locked_database

KILLS = 12


def prepare(folder, ready=None):
    """What a driver does first; `ready` is set when all that comes is the creation."""
    if ready is not None:
        ready.set()
    MlflowTracker(TrackingSettings(), str(folder), flush_seconds=0.05).prepare()


@pytest.fixture(scope="module")
def start():
    """Starts a process that prepares a folder: start(folder) returns the process, once it has begun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([
            "mlflow.store.tracking.sqlalchemy_store", "impactx.tracking"])  # one import for all processes
        processes = []

        def start(folder):
            ready = context.Event()
            process = context.Process(target=prepare, args=(folder, ready))
            processes.append(process)
            process.start()
            assert ready.wait(60)
            return process

        yield start
        for process in processes:
            if process.is_alive():
                process.kill()


def incomplete(folder):
    return [name for name in os.listdir(folder) if name.startswith(CREATING)]


def check_usable(folder):
    """A later start works: it logs a run, and leaves nothing but the database."""
    tracker = MlflowTracker(TrackingSettings(), str(folder), flush_seconds=0.05)
    tracker.prepare()
    with tracker.run(RunIdentity("job", "job")) as run:
        run.log_metrics({"acc": 0.5})
    with contextlib.closing(sqlite3.connect(folder / "mlflow.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
        assert database.execute("SELECT value FROM latest_metrics").fetchall() == [(0.5,)]
        names = sorted(row[0] for row in database.execute("SELECT name FROM experiments"))
        assert names == ["Default", "impactx"]
    assert sorted(os.listdir(folder)) == ["mlflow.db", "mlflow.db.lock"]


@pytest.fixture(scope="module")
def seconds(start, tmp_path_factory):
    """How long the creation takes, from the first file to the whole one."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    until(lambda: incomplete(folder))
    began = time.monotonic()
    until(lambda: (folder / "mlflow.db").exists())
    seconds = time.monotonic() - began
    process.join(60)
    check_usable(folder)
    return seconds


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_start_after_a_kill_during_the_creation_works(number, start, seconds, tmp_path):
    moments, cut_off = random.Random(int(number)), 0
    for kill in range(KILLS):
        folder = tmp_path / str(kill)
        folder.mkdir()
        process = start(folder)
        until(lambda: incomplete(folder))  # noqa: B023
        time.sleep(seconds * (kill + moments.random()) / KILLS)  # one moment in each twelfth
        with contextlib.suppress(ProcessLookupError):  # it may be done by now
            os.kill(process.pid, number)
        process.join(60)
        cut_off += not (folder / "mlflow.db").exists()
        check_usable(folder)
    assert cut_off >= KILLS // 3, "hardly a kill came during the creation"


def test_a_file_that_a_living_process_creates_is_left_alone(start, tmp_path):
    first = start(tmp_path)
    until(lambda: incomplete(tmp_path))
    os.kill(first.pid, signal.SIGSTOP)
    before = {name for name in incomplete(tmp_path) if name.endswith(".db")}
    second = start(tmp_path)
    time.sleep(1)
    assert second.is_alive() and before <= set(incomplete(tmp_path))
    assert not (tmp_path / "mlflow.db").exists()
    os.kill(first.pid, signal.SIGCONT)
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    check_usable(tmp_path)


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    stem = f"{CREATING}{'0' * 32}-"
    mine = [f"{stem}mlflow.db", f"{stem}mlflow.db-journal"]
    others = [f"{stem}mlflow.db2", f"{stem}other-mlflow.db", f"{CREATING}notes-mlflow.db", "mlflow.db-journal.txt"]
    for name in (*mine, *others, "mlflow.db"):
        (tmp_path / name).write_bytes(b"kept")
    with locked_database(tmp_path / "mlflow.db"):
        assert sorted(os.listdir(tmp_path)) == sorted([*others, "mlflow.db", "mlflow.db.lock"])
    assert (tmp_path / "mlflow.db").read_bytes() == b"kept"


def test_a_link_to_a_database_that_is_not_there_yet_stays_a_link(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "mlflow.db").symlink_to(Path("..") / "disk" / "real.db")
    with locked_database(tmp_path / "output" / "mlflow.db"):
        assert (tmp_path / "output" / "mlflow.db").is_symlink()
    assert sorted(os.listdir(tmp_path / "disk")) == ["real.db", "real.db.lock"]
