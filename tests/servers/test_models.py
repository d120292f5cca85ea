"""Final models in MLflow's registry: signature, loading without Ray, a request to a real `mlflow models serve`."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from impactx.api import TrainedModel, load_model
from impactx.approaches.impactx import Impactx
from impactx.models import build_classifier, weights_fingerprint
from impactx.prediction import ModelChoice
from impactx.run.tracker import FinalModel, RunIdentity, TrackingError
from impactx.settings import ModelSettings, TrackingSettings
from impactx.tracking import MlflowTracker
from impactx.tracking.checkpoints import fetch_checkpoint

LENET, NAMES = ModelSettings(name="lenet5", architecture="lenet5"), ("a", "b", "c")
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)


def trained(seed: int, *, maps: bool = True) -> TrainedModel:
    a = build_classifier(LENET, len(NAMES), (32, 32), seed=seed)
    if not maps:
        return TrainedModel(a.eval(), LENET, NAMES)
    settings = Impactx()
    return TrainedModel(settings.build(LENET, a, seed=seed, channels=3).eval(), LENET, NAMES, settings, 0.01)


class Shelf:
    """A job's tracker on a sqlite database, and checkpoints to register with it."""

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        """uri: of a server; None: the database in the folder."""
        self.folder, self.uri = folder, uri or f"sqlite:///{folder}/mlflow.db"
        self.tracker = MlflowTracker(TrackingSettings(uri=uri), str(folder), flush_seconds=0.05, patience_seconds=5)
        self.tracker.prepare()

    def register(self, approach: str, *models: TrainedModel) -> None:
        """One run each, as a job does it."""
        with self.tracker.run(RunIdentity("job", "job")):
            for number, model in enumerate(models):
                key = f"job/{approach}-{number}"
                with self.tracker.run(RunIdentity(key, key, parent="job")):
                    pass
                path = self.folder / f"{approach}-{number}.pt"
                model.save(path)
                self.tracker.register_model(FinalModel(
                    key, ("pets", "lenet5", approach), weights_fingerprint(model.model), path.read_bytes,
                    {"test_accuracy": 0.5}))
            self.tracker.close_unfinished("job")

    def versions(self, approach: str):
        from mlflow import MlflowClient

        found = MlflowClient(tracking_uri=self.uri).search_model_versions(f"name = 'impactx.pets.lenet5.{approach}'")
        return sorted(found, key=lambda v: int(v.version))

    def logged(self, approach: str):
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        found = client.search_logged_models([client.get_experiment_by_name("impactx").experiment_id])
        mine = [m for m in found if f"impactx.pets.lenet5.{approach}" in m.tags.get("mlflow.modelVersions", "")]
        return sorted(mine, key=lambda m: m.creation_timestamp)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        made = Shelf(tmp_path_factory.mktemp("shelf"))
        made.register("impactx", trained(0), trained(1))
        made.register("baseline", trained(2, maps=False))
        yield made


def test_a_version_for_each_model_and_one_only(shelf, caplog):
    before = [v.version for v in shelf.versions("impactx")], [m.model_id for m in shelf.logged("impactx")]
    assert list(map(int, before[0])) == [1, 2] and len(before[1]) == 2
    with caplog.at_level(logging.WARNING, "impactx"):
        shelf.register("impactx", trained(0), trained(1))  # the job is started again
    assert ([v.version for v in shelf.versions("impactx")], [m.model_id for m in shelf.logged("impactx")]) == before
    assert not caplog.records
    first = shelf.versions("impactx")[0]
    assert first.tags["impactx.weights"] == weights_fingerprint(trained(0).model)
    assert first.tags["test_accuracy"] == "0.5" and first.run_id
    assert "models:/impactx.pets.lenet5" in shelf.tracker.describe()[-1]


def test_a_model_whose_run_is_not_there_is_warned_of(shelf, caplog):
    caplog.set_level(logging.WARNING, "impactx")
    shelf.tracker.register_model(FinalModel("job/absent", ("pets", "lenet5", "none"), "x", lambda: b""))
    shelf.tracker.close_unfinished("job")
    assert "job/absent" in caplog.text and "impactx.pets.lenet5.none" in caplog.text
    assert shelf.versions("none") == []


@pytest.mark.parametrize("address", [
    "models:/impactx.pets.lenet5.impactx/1", "models:/impactx.pets.lenet5.impactx@best",
    "models:/impactx.pets.lenet5.impactx/latest", "models:/{id}"])
def test_the_checkpoint_comes_back(shelf, address):
    from mlflow import MlflowClient

    MlflowClient(tracking_uri=shelf.uri).set_registered_model_alias("impactx.pets.lenet5.impactx", "best", "1")
    address = address.format(id=shelf.logged("impactx")[1].model_id)
    number = 1 if "latest" in address or "m-" in address else 0
    assert fetch_checkpoint(address, shelf.uri) == (shelf.folder / f"impactx-{number}.pt").read_bytes()
    assert weights_fingerprint(ModelChoice(address, tracking=shelf.uri).load().model) == weights_fingerprint(
        trained(number).model)


def test_an_absent_model_is_one_message(shelf):
    for address in ("models:/impactx.pets.lenet5.none/1", "models:/impactx.pets.lenet5.impactx/9", "models:/m-0",
                    "runs:/0123"):
        with pytest.raises(TrackingError, match=f"{address} cannot be had.*MLFLOW_TRACKING_URI"):
            fetch_checkpoint(address, shelf.uri)


LOADS = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "ray":
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Blocked())
import mlflow, numpy as np
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(sys.argv[2])
found = model.predict(np.load(sys.argv[3]))
import impactx
print(json.dumps({"from": impactx.__file__, "signature": str(model.metadata.signature), "names":
      model.metadata.metadata["class_names"], **{k: v.tolist() for k, v in found.items()}}))
try:
    model.predict(np.zeros((1, 8, 8, 3), np.uint8))
except Exception as error:
    print(error)
"""


def outside() -> dict[str, str]:
    """An environment in which neither this repository nor Ray is found."""
    keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
    return keep | {"PATH": f"{Path(sys.executable).parent}:{keep['PATH']}", "MLFLOW_DISABLE_TELEMETRY": "true",
                   "PYTHONDONTWRITEBYTECODE": "1"}


def test_loads_on_a_machine_without_ray_and_without_this_package(shelf, tmp_path):
    """In a process with Ray blocked, from another folder; where the package is not installed, the model brings it."""
    np.save(tmp_path / "images.npy", IMAGES)
    done = subprocess.run([sys.executable, "-P", "-c", LOADS, shelf.uri, "models:/impactx.pets.lenet5.impactx/1",
                           tmp_path / "images.npy"], capture_output=True, text=True, cwd=tmp_path, env=outside())
    assert done.returncode == 0, done.stderr
    first, refused = done.stdout.strip().splitlines()[0], done.stdout.strip().splitlines()[1:]
    found = json.loads(first)
    expected = load_model(shelf.folder / "impactx-0.pt").predict(IMAGES)
    assert found["label"] == expected.labels.tolist() and found["names"] == list(NAMES)
    np.testing.assert_allclose(found["scores"], expected.probabilities, rtol=1e-5)
    np.testing.assert_allclose(found["map"], expected.maps, atol=1e-6)
    for part in ("uint8", "(-1, 32, 32, 3)", "'label'", "'scores'", "(-1, 3)", "'map'", "(-1, -1, 32, 32)"):
        assert part in found["signature"]
    assert any("(-1, 32, 32, 3)" in line for line in refused), "a wrong shape must be refused by the signature"


def test_nothing_in_the_model_is_a_pickled_object(shelf):
    location = shelf.logged("impactx")[0].artifact_location.removeprefix("file://")
    files = {p.relative_to(location).as_posix() for p in Path(location).rglob("*") if p.is_file()}
    assert "data/checkpoint.pt" in files and "code/impactx/serving.py" in files
    assert not [f for f in files if f.endswith((".pkl", ".pickle", ".pyc"))]
    assert "mlflow==" in Path(location, "requirements.txt").read_text() and "ray" not in Path(
        location, "requirements.txt").read_text()


def test_serves_http_requests(shelf, tmp_path):
    port = free_port()
    server = subprocess.Popen([Path(sys.executable).parent / "mlflow", "models", "serve", "-m",
                               "models:/impactx.pets.lenet5.impactx/1", "--env-manager", "local", "--port", str(port)],
                              cwd=tmp_path, env=outside() | {"MLFLOW_TRACKING_URI": shelf.uri},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/ping", server)
        found = json.loads(asked(address, {"inputs": IMAGES.tolist()}))["predictions"]
        expected = load_model(shelf.folder / "impactx-0.pt").predict(IMAGES)
        assert found["label"] == expected.labels.tolist()
        np.testing.assert_allclose(found["scores"], expected.probabilities, rtol=1e-5)
        np.testing.assert_allclose(found["map"], expected.maps, atol=1e-6)
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(address, {"inputs": IMAGES[:, :8].tolist()})
        assert refused.value.code == 400
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def test_through_a_tracking_server(tmp_path):
    """Model files go to the server and come back from it; another machine has no path in common with ours."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1",
                               "--port", str(port), "--backend-store-uri", f"sqlite:///{tmp_path}/server.db",
                               "--artifacts-destination", f"{tmp_path}/artifacts"], env=outside(), cwd=tmp_path,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", server)
        shelf = Shelf(tmp_path, address)
        shelf.register("impactx", trained(3))
        assert fetch_checkpoint("models:/impactx.pets.lenet5.impactx/1", address) == (
            tmp_path / "impactx-0.pt").read_bytes()
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address: str, server: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not answers(address):
        assert server.poll() is None and time.monotonic() < end, server.communicate()[0]
        time.sleep(0.3)


def asked(address: str, body: dict) -> bytes:
    request = urllib.request.Request(f"{address}/invocations", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
