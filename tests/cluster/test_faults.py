"""What a lab's cluster does to a job: nodes, processes, drivers and disks that fail. In the end the table is the same.

Each test starts nodes of its own on this machine and the job's command as a process of its own; `make chaos`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from lab import descendants, fill, small_disk, until
from test_job import Job, check_runs

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "servers"))
from services import MlflowServer  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STAGES = {"stage 1": lambda job: job.running(1, "trials"), "maps": Job.explaining,
          "stage 2": lambda job: job.running(2), "A's final training": lambda job: job.running(1, "models")}


class Nodes:
    """A head without CPUs, and workers with one CPU each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        how = {"include_dashboard": False, "object_store_memory": 128 * 2**20}
        self._cluster = Cluster(initialize_head=True, head_node_args=how | {"num_cpus": 0})
        self.address = self._cluster.address
        self.workers = [self.add(), self.add()]

    def add(self):
        """One more worker."""
        return self._cluster.add_node(num_cpus=1, object_store_memory=128 * 2**20)

    def kill(self) -> None:
        """The last worker's machine is gone, with everything on it."""
        self._cluster.remove_node(self.workers.pop(), allow_graceful=False)

    def work(self) -> dict[int, str]:
        """The processes that work for a job, on any node."""
        return {pid: line for pid, line in descendants(os.getpid()).items()
                if line.startswith(("ray::TrialActor", "ray::MapWorker", "ray::RayTrainWorker", "ray::work"))}

    def end(self) -> None:
        """All machines are gone."""
        self._cluster.shutdown()


@pytest.fixture
def nodes():
    """Two workers."""
    running = Nodes()
    yield running
    running.end()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    """What the job comes to where nothing happens."""
    job = Job(tmp_path_factory.mktemp("undisturbed") / "out", cache)
    assert job.end() == 0, job.log
    return job


def as_undisturbed(job: Job, undisturbed: Job, nodes: Nodes | None = None) -> None:
    """The same table, each unit tracked once and finished, no half file, nobody left at work."""
    assert job.results() == undisturbed.results()
    assert check_runs(job) == check_runs(undisturbed)
    half = [p for p in job.output.rglob("*") if p.name.startswith(".partial-") or p.name in (
        "running.pt", "owner.json", "driver.json", "stopped.json")]
    assert half == []
    if nodes is not None:
        until(lambda: not nodes.work(), "the end of the job's processes", 60)


@pytest.mark.parametrize("stage", STAGES)
def test_a_worker_node_dies(nodes, undisturbed, tmp_path, cache, stage):
    job = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}")
    job.meet(lambda: STAGES[stage](job), stage)
    nodes.kill()
    nodes.workers.append(nodes.add())
    assert job.end() == 0, job.log
    as_undisturbed(job, undisturbed, nodes)


def test_a_worker_node_dies_and_none_comes_for_it(nodes, undisturbed, tmp_path, cache):
    job = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}")
    job.meet(lambda: job.running(1, "trials"), "stage 1")
    nodes.kill()
    assert job.end() == 0, job.log
    as_undisturbed(job, undisturbed, nodes)


def test_a_trials_process_is_killed(nodes, undisturbed, tmp_path, cache):
    job = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}")
    job.meet(lambda: job.running(1, "trials"), "stage 1")
    killed = [pid for pid, line in nodes.work().items() if line.startswith("ray::TrialActor")]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    assert killed
    assert job.end() == 0, job.log
    as_undisturbed(job, undisturbed, nodes)


def test_a_trial_whose_process_always_dies_fails_alone(nodes, tmp_path, cache):
    job = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}", "cluster.max_failures=0", "approach=[]")
    job.meet(lambda: job.running(1, "trials"), "stage 1")
    for pid, line in nodes.work().items():
        if line.startswith("ray::TrialActor"):
            os.kill(pid, signal.SIGKILL)
            break
    assert job.end() == 0, job.log
    runs = job.tracked("select runs.name, runs.status, error.value from runs join tags role on role.run_uuid = "
                       "runs.run_uuid and role.key = 'impactx.role' and role.value = 'trial' left join tags error "
                       "on error.run_uuid = runs.run_uuid and error.key = 'impactx.error'")
    assert sorted(status for _, status, _ in runs) == ["FAILED", "FINISHED"], runs
    assert [bool(error) for _, status, error in runs if status == "FAILED"] == [True], runs
    assert ("RUNNING",) not in job.tracked("select distinct status from runs")


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_command_while_orphans_of_a_killed_driver_still_work(nodes, undisturbed, tmp_path, cache, stage):
    first = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}")
    first.meet(lambda: STAGES[stage](first), stage)
    stopped = list(nodes.work())
    for pid in stopped:  # they neither die with their driver nor notice that it is gone, as behind a cut network
        os.kill(pid, signal.SIGSTOP)
    first.process.kill()
    first.process.wait()
    nodes.workers.append(nodes.add())  # or nobody could work beside them
    nodes.workers.append(nodes.add())
    second = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}")
    second.meet(lambda: STAGES[stage](second), stage)
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert second.end() == 0, second.log
    as_undisturbed(second, undisturbed, nodes)


def test_the_same_job_twice_at_once_ends_the_older_one(undisturbed, tmp_path, cache):
    older = Job(tmp_path / "out", cache)
    older.meet(lambda: older.running(1, "trials"), "stage 1")
    newer = Job(tmp_path / "out", cache)
    assert newer.end() == 0, newer.log
    assert older.end() == 2, older.log
    assert "running twice?" in older.log and "Traceback" not in older.log
    as_undisturbed(newer, undisturbed)


@pytest.fixture
def disk(tmp_path):
    """Twice what a job leaves: two trials of stage 2 keep their states (21 MB each), and write the next beside them."""
    with small_disk(tmp_path / "disk", 192) as place:
        yield place


def test_the_disk_is_full_for_a_while(nodes, undisturbed, disk, tmp_path, cache):
    job = Job(disk / "out", cache, f"cluster.address={nodes.address}", "cluster.storage_patience=300",
              log=tmp_path / "log")
    job.meet(lambda: job.running(1, "trials"), "stage 1")
    filler = fill(disk)
    before = job.finished()
    until(lambda: "no space is left" in job.log, "a word about it", 90)
    assert job.process.poll() is None, job.log
    assert job.finished() == before, "the disk was not full"
    filler.unlink()
    assert job.end() == 0, job.log
    assert "what is under way waits, up to 300 s" in job.log
    as_undisturbed(job, undisturbed, nodes)


def test_the_mlflow_server_is_away_for_a_minute(nodes, undisturbed, tmp_path, cache):
    output = tmp_path / "out"
    output.mkdir()
    server = MlflowServer(tmp_path, backend=f"sqlite:///{output}/mlflow.db")
    server.start()
    try:
        job = Job(output, cache, f"cluster.address={nodes.address}", f"tracking.uri={server.uri}")
        job.meet(lambda: job.running(1, "trials"), "stage 1")
        server.kill()
        time.sleep(75)  # once a minute the job itself logs how far it is; trainings that end wait two minutes for it
        assert job.process.poll() is None, job.log
        assert "MLflow: the server cannot be reached, what is logged is kept and sent later" in job.log
        server.start()
        assert job.end() == 0, job.log
        assert "MLflow: the server can be reached again" in job.log
        as_undisturbed(job, undisturbed, nodes)
        assert job.tracked("select distinct value from tags where key = 'impactx.progress'") == [("done",)]
    finally:
        server.kill()


def test_one_configuration_that_diverges(tmp_path, cache):
    job = Job(tmp_path / "out", cache, "approach=[]", "training.optimizer=sgd", "training.weight_decay=1e4",
              "grid.learning_rate=[10,1e-5]")
    assert job.end() == 0, job.log
    assert "diverged at epoch" in job.log and [row["learning_rate"] for row in job.results()] == ["1e-05"]
    assert set(job.tracked("select status from runs")) == {("FINISHED",)}
    diverged = job.tracked("select max(value) from metrics where key = 'diverged'")
    assert diverged == [(1.0,)]


def test_asha_goes_on_after_its_driver_was_killed(tmp_path, cache):
    """Which trials are stopped depends on their pace; but each is tried, once, and the best of them is chosen."""
    asha = ["approach=[]", "grid.strategy=asha", "grid.grace_epochs=4", "grid.reduction=2",
            "grid.learning_rate=[0.004,0.002,1e-6,2e-6]"]
    first = Job(tmp_path / "out", cache, *asha)
    first.meet(lambda: first.running(1, "trials"), "stage 1")
    first.kill()
    first.process.wait()
    job = Job(tmp_path / "out", cache, *asha)
    assert job.end() == 0, job.log
    assert "stopped early" in job.log
    assert [float(row["learning_rate"]) in (0.004, 0.002) for row in job.results()] == [True]
    runs = job.tracked("select role.value, runs.name, runs.status from runs join tags role "
                       "on role.run_uuid = runs.run_uuid and role.key = 'impactx.role'")
    trials = [name for role, name, _ in runs if role == "trial"]
    assert len(trials) == len(set(trials)) == 4 and {status for *_, status in runs} == {"FINISHED"}, runs
    points = job.tracked("select run_uuid, key, step, count(*) from metrics group by run_uuid, key, step")
    assert [row for row in points if row[3] != 1] == []


def test_sigterm_ends_everything_on_every_node(nodes, undisturbed, tmp_path, cache):
    job = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}")
    job.meet(lambda: job.running(1, "trials"), "stage 1")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 143, job.log
    until(lambda: not nodes.work(), "the end of the job's processes", 60)
    states = dict(job.tracked("select status, count(*) from runs group by status"))
    assert "RUNNING" not in states, states
    again = Job(tmp_path / "out", cache, f"cluster.address={nodes.address}")
    assert again.end() == 0, again.log
    as_undisturbed(again, undisturbed, nodes)


def test_two_cells_and_a_node_that_dies(nodes, tmp_path, cache):
    """One cell's work is lost with the node, and the other's as well; both end as on an idle cluster."""
    cells = ["datasets.more.name=more", "datasets.more.source=digits", "datasets.more.subset=60"]
    here = Job(tmp_path / "one", cache, *cells)
    assert here.end() == 0, here.log
    job = Job(tmp_path / "out", cache, *cells, f"cluster.address={nodes.address}")
    job.meet(lambda: job.running(1, "trials"), "stage 1")
    nodes.kill()
    nodes.workers.append(nodes.add())
    assert job.end() == 0, job.log
    assert job.results() == here.results() and len(job.results()) == 4
    until(lambda: not nodes.work(), "the end of the job's processes", 60)

