"""MLflow tracking against real sqlite files, real processes and a real `mlflow server` on loopback."""

import contextlib
import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from services import MlflowServer, free_ports, until

from impactx.run.tracker import RunIdentity, TrackingError
from impactx.settings import TrackingSettings
from impactx.tracking import MlflowTracker

PLATFORM = Path(__file__).parents[2] / "platform"


def child(script, *arguments):
    """A Python process that runs a script, with its pipes."""
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": str(PLATFORM)})


class Store:
    """What MLflow holds at an address, asked past our own code."""

    def __init__(self, uri):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)

    @property
    def experiment(self):
        return self.client.get_experiment_by_name("impactx")

    def runs(self, root):
        """All runs of a job by their keys; fails on a key that is there twice."""
        found = self.client.search_runs([self.experiment.experiment_id], f"tags.`impactx.root` = '{root}'",
                                        max_results=1000)
        keys = [run.data.tags["impactx.key"] for run in found]
        assert len(keys) == len(set(keys)), f"duplicates: {sorted(keys)}"
        return dict(zip(keys, found, strict=True))

    def statuses(self, root):
        return {key: run.info.status for key, run in self.runs(root).items()}

    def points(self, run, metric):
        """(step, value) of a curve in the order of the steps."""
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run.info.run_id, metric))

    def text(self, run, path, tmp_path):
        return Path(self.client.download_artifacts(run.info.run_id, path, str(tmp_path))).read_text()


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The output folder of a prepared sqlite database. Each test has its own job key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        folder = tmp_path_factory.mktemp("tracking") / "with space"
        MlflowTracker(TrackingSettings(), str(folder)).prepare()
        yield folder


@pytest.fixture
def tracker(output, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return MlflowTracker(TrackingSettings(), str(output), flush_seconds=0.05, patience_seconds=2)


@pytest.fixture(scope="module")
def store(output):
    return Store(f"sqlite:///{output}/mlflow.db")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = MlflowServer(tmp_path_factory.mktemp("server"))
    running.start()
    yield running
    running.kill()


def test_nested_runs_hold_everything(tracker, store, output, tmp_path):
    file = tmp_path / "split.json"
    file.write_text("[1, 2]")
    settings = {"grid": {"lr": [0.1]}}
    with tracker.run(RunIdentity("nested", "the job", parameters=settings, tags={"impactx.code": "abc"})) as job:
        job.log_text("seed: 0", "config/config.yaml")
        job.log_bytes(b"\x89PNG", "report/map.png")
        with tracker.run(RunIdentity("nested/cell", "the cell", parent="nested")), tracker.run(RunIdentity(
                "nested/cell/t", "lr=0.1", parent="nested/cell", parameters={"lr": 0.1})) as trial:
            trial.log_metrics({"acc": 0.25, "loss": 2}, step=1)
            trial.log_metrics({"acc": 0.5, "loss": 1}, step=2)
            trial.log_metrics({"best_acc": 0.5})
            trial.set_tags({"note": "good"})
            trial.log_file(file, "splits")
    runs = store.runs("nested")
    job, cell, trial = runs["nested"], runs["nested/cell"], runs["nested/cell/t"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"} and len(runs) == 3
    assert cell.data.tags["mlflow.parentRunId"] == job.info.run_id
    assert trial.data.tags["mlflow.parentRunId"] == cell.info.run_id
    assert "mlflow.parentRunId" not in job.data.tags
    assert (job.info.run_name, trial.info.run_name) == ("the job", "lr=0.1")
    assert job.data.params == {"grid.lr": "[0.1]"} and job.data.tags["impactx.code"] == "abc"
    assert trial.data.params == {"lr": "0.1"} and trial.data.tags["note"] == "good"
    assert trial.data.metrics == {"acc": 0.5, "loss": 1, "best_acc": 0.5}
    assert store.points(trial, "acc") == [(1, 0.25), (2, 0.5)]
    assert store.text(job, "config/config.yaml", tmp_path) == "seed: 0"
    assert store.text(trial, "splits/split.json", tmp_path) == "[1, 2]"
    assert Path(store.client.download_artifacts(job.info.run_id, "report/map.png", tmp_path)).read_bytes() == b"\x89PNG"
    assert (output / "mlartifacts").is_dir()


def test_describe_names_the_command_and_opens_the_comparison(tracker, store, output):
    tracker.run(RunIdentity("described", "job")).finish()
    lines = tracker.describe()
    assert f"--backend-store-uri 'sqlite:///{output}/mlflow.db'" in lines[0]
    key = lines[-1].partition("viewStateShareKey=")[2].partition("&")[0]
    view = json.loads(store.experiment.tags[f"mlflow.sharedViewState.{key}"])
    state = json.loads(view["state"])
    store.client.search_runs([store.experiment.experiment_id], state["searchFilter"])  # refuses nonsense
    assert "'described'" in state["searchFilter"]
    assert "metrics.`best_val_accuracy`" in state["selectedColumns"]


TRAINING = """
import sys
from impactx.run.tracker import RunIdentity
from impactx.settings import TrackingSettings
from impactx.tracking import MlflowTracker
tracker = MlflowTracker(TrackingSettings(), sys.argv[1], flush_seconds=0.05)
first, last, value = int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with tracker.run(RunIdentity("killed", "job")):
    with tracker.run(RunIdentity("killed/t", "trial", parent="killed", parameters={"lr": 0.1, "threads": first})) as run:
        run.log_history([{"acc": value + i} for i in range(1, first)])
        for epoch in range(first, last + 1):
            run.log_metrics({"acc": value + epoch}, step=epoch)
        if last < 10:
            print("logged", flush=True)
            sys.stdin.readline()
    tracker.close_unfinished("killed")
"""


def test_a_run_killed_with_9_goes_on_without_doubles_or_gaps(store, output):
    dead = child(TRAINING, output, 1, 5, 0)
    assert dead.stdout.readline() == "logged\n", dead.stderr.read()
    until(lambda: "killed/t" in store.runs("killed")
          and len(store.points(store.runs("killed")["killed/t"], "acc")) >= 5)
    dead.kill()
    dead.wait()
    run_id = store.runs("killed")["killed/t"].info.run_id
    assert set(store.statuses("killed").values()) == {"RUNNING"}
    # The point of epoch 4 as if it had still been in the buffer of the killed process.
    import sqlite3
    with contextlib.closing(sqlite3.connect(output / "mlflow.db")) as database:
        database.execute("DELETE FROM metrics WHERE run_uuid = ? AND step = 4", [run_id])
        database.commit()

    again = child(TRAINING, output, 5, 10, 100)  # from epoch 4's checkpoint; other values tell them apart
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0 and errors == "", errors
    assert store.statuses("killed") == {"killed": "FINISHED", "killed/t": "FINISHED"}
    run = store.runs("killed")["killed/t"]
    assert run.info.run_id == run_id
    assert store.points(run, "acc") == [(e, float(e)) for e in (1, 2, 3)] + [(4, 104.0), (5, 5.0)] + [
        (e, 100.0 + e) for e in range(6, 11)]
    assert run.data.params == {"lr": "0.1", "threads": "1"}
    assert run.data.tags["impactx.changed.threads"] == "5"


def test_sigterm_leaves_the_runs_killed_and_with_their_metrics(store, output):
    process = child(TRAINING.replace('"killed', '"terminated'), output, 1, 5, 0)
    assert process.stdout.readline() == "logged\n", process.stderr.read()
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert set(store.statuses("terminated").values()) == {"KILLED"}
    assert len(store.points(store.runs("terminated")["terminated/t"], "acc")) == 5


def test_an_exception_fails_the_run_with_its_traceback_until_it_succeeds(tracker, store, tmp_path):
    with pytest.raises(ZeroDivisionError), tracker.run(RunIdentity("failed", "job")) as run:
        run.log_metrics({"acc": 0.5}, step=1)
        raise ZeroDivisionError("in epoch 2")
    failed = store.runs("failed")["failed"]
    assert failed.info.status == "FAILED" and failed.data.metrics == {"acc": 0.5}
    assert failed.data.tags["impactx.error"] == "ZeroDivisionError: in epoch 2"
    assert "Traceback" in store.text(failed, "error.txt", tmp_path)
    tracker.run(RunIdentity("failed", "job")).finish()
    again = store.runs("failed")["failed"]
    assert again.info.status == "FINISHED" and "impactx.error" not in again.data.tags


def test_replay_makes_completes_or_leaves_a_run(tracker, store, tmp_path):
    history, final = [{"acc": 0.1 * e} for e in range(1, 6)], {"best_acc": 0.5}
    with tracker.run(RunIdentity("replayed", "job")):
        half = tracker.run(RunIdentity("replayed/half", "half", parent="replayed"))
        half.log_metrics({"acc": 0.1}, step=1)
        half.log_metrics({"acc": 0.2}, step=2)
        half.finish("KILLED")
        done = tracker.run(RunIdentity("replayed/done", "done", parent="replayed"))
        done.finish()
        asked = []

        def files(folder):
            asked.append(folder)
            (folder / "split.npz").write_text("the split")
            return [folder / "split.npz"]

        for _ in range(2):
            for key in ("new", "half", "done"):
                tracker.replay(RunIdentity(f"replayed/{key}", key, parent="replayed", parameters={"lr": 1}),
                               history=history, final=final, files=files)
        assert tracker.close_unfinished("replayed") == 0
    runs = store.runs("replayed")
    assert len(asked) == 2, "files are made only for runs that are made"
    assert store.text(runs["replayed/new"], "split.npz", tmp_path) == "the split"
    assert set(store.statuses("replayed").values()) == {"FINISHED"} and len(runs) == 4
    for key in ("new", "half"):
        assert [step for step, _ in store.points(runs[f"replayed/{key}"], "acc")] == [1, 2, 3, 4, 5]
        assert runs[f"replayed/{key}"].data.metrics["best_acc"] == 0.5
        assert runs[f"replayed/{key}"].data.params == {"lr": "1"}
        assert runs[f"replayed/{key}"].data.tags["mlflow.parentRunId"] == runs["replayed"].info.run_id
    assert runs["replayed/done"].data.metrics == {}


def test_close_unfinished_ends_what_was_left_and_nothing_else(tracker, store):
    other = tracker.run(RunIdentity("other", "another job"))
    with tracker.run(RunIdentity("left", "job")):
        tracker.run(RunIdentity("left/1", "1", parent="left")).finish()
        tracker.run(RunIdentity("left/2", "2", parent="left"))
        tracker.run(RunIdentity("left/3", "3", parent="left"))
        assert tracker.close_unfinished("left") == 2
    assert store.statuses("left") == {"left": "FINISHED", "left/1": "FINISHED", "left/2": "KILLED",
                                      "left/3": "KILLED"}
    assert store.statuses("other") == {"other": "RUNNING"}
    other.finish()


def test_a_run_whose_process_died_has_failed_and_one_that_ended_stays(tracker, store, tmp_path):
    with tracker.run(RunIdentity("j", "job")):
        tracker.run(RunIdentity("j/died", "died", parent="j"))
        tracker.run(RunIdentity("j/ended", "ended", parent="j")).finish()
        for name in ("died", "ended", "not begun"):
            tracker.died(RunIdentity(f"j/{name}", name, parent="j", parameters={"learning_rate": 0.1}),
                         "Traceback\nWorkError: its process died")
        assert tracker.close_unfinished("j") == 0
    assert store.statuses("j") == {"j": "FINISHED", "j/died": "FAILED", "j/ended": "FINISHED", "j/not begun": "FAILED"}
    for key in ("j/died", "j/not begun"):
        failed = store.runs("j")[key]
        assert failed.data.tags["impactx.error"] == "WorkError: its process died"
        assert failed.data.params == {"learning_rate": "0.1"}
        assert store.text(failed, "error.txt", tmp_path).startswith("Traceback")


def test_params_beyond_mlflows_limits_arrive_whole(tracker, store, tmp_path):
    params = {f"p{i}": i for i in range(250)} | {"long": "x" * 10_000, "odd+name": 1}
    params["nested"] = {"a": [1, {"b": 2}]}
    with tracker.run(RunIdentity("params", "job", parameters=params)) as run:
        run.log_params(params)  # the same again is no conflict
    run = store.runs("params")["params"]
    assert {k: v for k, v in run.data.params.items() if k[1:].isdigit()} == {
        f"p{i}": str(i) for i in range(250)}
    assert run.data.params["nested.a.0"] == "1" and run.data.params["nested.a.1.b"] == "2"
    assert len(run.data.params["long"]) <= 6000 and "params/long.txt" in run.data.params["long"]
    assert store.text(run, "params/long.txt", tmp_path) == "x" * 10_000
    assert [v for k, v in run.data.params.items() if k.startswith("odd_name")] == ["1"]
    assert not [tag for tag in run.data.tags if "changed" in tag]


def test_values_that_are_not_finite_are_told_and_spoil_no_axis(tracker, store):
    with tracker.run(RunIdentity("nan", "job")) as run:
        run.log_metrics({"loss": 1.0, "acc": 0.1}, step=1)
        run.log_metrics({"loss": math.inf, "acc": math.nan}, step=2)
    run = store.runs("nan")["nan"]
    assert math.isnan(store.points(run, "loss")[1][1]) and store.points(run, "loss")[0] == (1, 1.0)
    assert run.data.tags["impactx.nonfinite"] == "first loss=inf at step 2; acc=nan at step 2"
    assert run.info.status == "FINISHED"


def test_a_step_is_logged_once(tracker, store):
    for value in (0.0, 10.0):
        with tracker.run(RunIdentity("steps", "job")) as run:
            run.log_metrics({"acc": value + 1}, step=1)
            run.log_metrics({"acc": value + 1}, step=1)
            run.log_metrics({"acc": value + 2}, step=2)
            run.log_metrics({"best": 2.0})
    run = store.runs("steps")["steps"]
    assert store.points(run, "acc") == [(1, 1.0), (2, 2.0)] and store.points(run, "best") == [(0, 2.0)]


def test_more_metrics_than_a_batch_holds(tracker, store):
    with tracker.run(RunIdentity("many", "job")) as run:
        run.log_history([{f"m{i}": e for i in range(7)} for e in range(300)])
    run = store.runs("many")["many"]
    assert [step for step, _ in store.points(run, "m6")] == list(range(1, 301))


def test_an_orphan_does_not_disturb_the_process_that_took_its_run_over(tracker, store, caplog):
    orphan = tracker.run(RunIdentity("taken", "job"))
    successor = tracker.run(RunIdentity("taken", "job"))
    successor.log_metrics({"acc": 0.5}, step=1)
    orphan.log_metrics({"acc": 0.1}, step=7)
    orphan.finish("FAILED", "killed late")
    assert store.statuses("taken") == {"taken": "RUNNING"}
    assert "another process continues this run" in caplog.text
    successor.finish()
    run = store.runs("taken")["taken"]
    assert run.info.status == "FINISHED" and store.points(run, "acc") == [(1, 0.5)]


def test_a_missing_artifact_is_told_and_costs_nothing_else(tracker, store, caplog, tmp_path):
    with tracker.run(RunIdentity("artifact", "the run", parameters={"a": 1})) as run:
        run.log_file(tmp_path / "nowhere.bin")
        run.log_metrics({"acc": 1.0}, step=1)
    run.log_metrics({"acc": 2.0}, step=2)
    assert "not logged of the run 'the run': the artifact nowhere.bin" in caplog.text
    assert "after the end of the run 'the run', not logged: metrics" in caplog.text
    run = store.runs("artifact")["artifact"]
    assert run.info.status == "FINISHED" and run.data.metrics == {"acc": 1.0}


def test_a_machine_without_the_database_says_so_and_makes_none(tmp_path, caplog, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = MlflowTracker(TrackingSettings(), str(tmp_path / "elsewhere"), flush_seconds=0.05)
    with tracker.run(RunIdentity("nowhere", "trial")) as run:
        run.log_metrics({"acc": 1.0}, step=1)
    assert "MLFLOW_TRACKING_URI" in caplog.text and "1 metric values" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_deleted_experiment_is_named(store, output):
    settings = TrackingSettings(uri=f"sqlite:///{output}/mlflow.db", experiment="gone")
    tracker = MlflowTracker(settings, "unused")
    tracker.prepare()
    client = store.client
    client.delete_experiment(client.get_experiment_by_name("gone").experiment_id)
    with pytest.raises(TrackingError, match="'gone' was deleted.*restore -x"):
        tracker.prepare()


def test_a_server_that_is_away_loses_nothing_and_stalls_nothing(server, caplog, tmp_path):
    caplog.set_level(logging.INFO, "impactx.tracking")
    tracker = MlflowTracker(TrackingSettings(uri=server.uri), "unused", flush_seconds=0.05)
    tracker.prepare()
    store = Store(server.uri)
    with tracker.run(RunIdentity("away", "job")):
        with tracker.run(RunIdentity("away/before", "begun before", parent="away")) as run:
            run.log_metrics({"acc": 1.0}, step=1)
            until(lambda: store.runs("away").get("away/before") and store.points(
                store.runs("away")["away/before"], "acc"))
            server.kill()
            began = time.monotonic()
            for epoch in range(2, 40):
                run.log_metrics({"acc": float(epoch)}, step=epoch)
            run.log_text("written meanwhile", "note.txt")
            during = tracker.run(RunIdentity("away/during", "begun during", parent="away", parameters={"lr": 1}))
            during.log_metrics({"acc": 1.0}, step=1)
            assert time.monotonic() - began < 1.0, "a training would have been stalled"
            until(lambda: "cannot be reached" in caplog.text)
            server.start()
        during.finish()
    runs = store.runs("away")
    assert {run.info.status for run in runs.values()} == {"FINISHED"} and len(runs) == 3
    assert store.points(runs["away/before"], "acc") == [(e, float(e)) for e in range(1, 40)]
    assert store.text(runs["away/before"], "note.txt", tmp_path) == "written meanwhile"
    assert runs["away/during"].data.params == {"lr": "1"}
    assert caplog.text.count("cannot be reached") == 1 and "can be reached again" in caplog.text
    assert "not logged" not in caplog.text


def test_a_server_that_stays_away_is_given_up_with_a_warning_and_only_once(caplog):
    uri = f"http://127.0.0.1:{free_ports(1)[0]}"
    tracker = MlflowTracker(TrackingSettings(uri=uri), "unused", flush_seconds=0.05, patience_seconds=1)
    run = tracker.run(RunIdentity("gone", "lonely"))
    for epoch in range(3):
        run.log_metrics({"acc": 1.0, "loss": 2.0}, step=epoch)
    began = time.monotonic()
    run.finish()
    assert time.monotonic() - began < 10
    assert "not logged of the run 'lonely'" in caplog.text and "6 metric values" in caplog.text
    assert tracker.describe() == [f"runs:       {uri}"]


@pytest.mark.parametrize("password", ["s3cret-word", "p%40ss%2Fword"])
def test_the_password_of_the_address_is_never_shown(password, caplog, capfd):
    uri = f"http://user:{password}@127.0.0.1:{free_ports(1)[0]}/mlflow?token=t0ken-value"
    tracker = MlflowTracker(TrackingSettings(uri=uri), "unused", flush_seconds=0.05, patience_seconds=0.5)
    with pytest.raises(TrackingError) as error:
        tracker.prepare()
    with pytest.raises(RuntimeError), tracker.run(RunIdentity("secret", "job")) as run:
        raise RuntimeError(f"could not reach {uri}")
    shown = " ".join([repr(tracker), *tracker.describe(), str(error.value), caplog.text, *capfd.readouterr(),
                      str(run._record.tags), str(run._record.lost)])
    assert "127.0.0.1" in shown
    for secret in (password, "p@ss/word", "t0ken-value"):
        assert secret not in shown


def test_a_password_in_a_database_address_is_not_shown_either():
    tracker = MlflowTracker(TrackingSettings(uri="postgresql://me:hidden-word@127.0.0.1:1/db"), "unused")
    with pytest.raises(TrackingError) as error:
        tracker.prepare()
    assert "hidden-word" not in " ".join([*tracker.describe(), repr(tracker), str(error.value)])
    assert '"$MLFLOW_TRACKING_URI"' in tracker.describe()[0]


def work(tracker, number):
    """What a worker does with a tracker that travelled to it."""
    tracker.prepare()
    for i in range(3):
        with tracker.run(RunIdentity(f"eight/{number}-{i}", "trial", parent="eight", parameters={"i": i})) as run:
            for epoch in range(1, 11):
                run.log_metrics({"acc": epoch / 10, "loss": 1 / epoch}, step=epoch)


def test_eight_processes_share_a_fresh_sqlite_file(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    tracker = MlflowTracker(TrackingSettings(), str(tmp_path))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "impactx.tracking"])  # one import instead of eight
    workers = [context.Process(target=work, args=(tracker, i)) for i in range(8)]
    for worker in workers:
        worker.start()  # they make the database, all at once
    tracker.prepare()
    with tracker.run(RunIdentity("eight", "job")):
        for worker in workers:
            worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert capfd.readouterr().err == ""  # no noise of alembic or mlflow, no warning of ours
    store = Store(f"sqlite:///{tmp_path}/mlflow.db")
    runs = store.runs("eight")
    assert len(runs) == 25 and {run.info.status for run in runs.values()} == {"FINISHED"}
    for key, run in runs.items():
        if key != "eight":
            assert run.data.tags["mlflow.parentRunId"] == runs["eight"].info.run_id
            assert [step for step, _ in store.points(run, "acc")] == list(range(1, 11))


def test_tracking_costs_a_training_less_than_two_percent(tracker, capsys):
    """One log of 8 metrics a second, sent every 5 s: what is spent in the caller and in the thread behind."""
    with tracker.run(RunIdentity("cost", "job")) as run:
        until(lambda: run._record.run_id)
        rounds, logged, behind = 20, 0.0, 0.0
        for i in range(rounds):
            whole, own = time.process_time(), time.thread_time()
            for j in range(5):
                began = time.perf_counter()
                run.log_metrics({f"m{k}": float(j) for k in range(8)}, step=5 * i + j)
                logged += time.perf_counter() - began
            own = time.thread_time() - own
            seen = time.thread_time()
            until(lambda: not run._record.pending)
            behind += time.process_time() - whole - own - (time.thread_time() - seen)
    began = time.perf_counter()
    for i in range(10):
        with tracker.run(RunIdentity(f"cost/{i}", "trial", parent="cost", parameters={"lr": i})) as run:
            run.log_metrics({"acc": 1.0}, step=1)
    trial = (time.perf_counter() - began) / 10
    share = (logged + behind) / (5 * rounds)
    with capsys.disabled():
        print(f"\ntracking: a log call {logged / rounds / 5 * 1e6:.0f} us, sending "
              f"{behind / rounds * 1e3:.1f} ms of CPU every 5 s: {share:.2%} of a training with one log a "
              f"second; {trial * 1e3:.0f} ms a trial")
    assert share < 0.02
    assert trial < 1.0
