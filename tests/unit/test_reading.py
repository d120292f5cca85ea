"""A store as a torch dataset, and the documented lines of pyarrow, pandas and DuckDB, as they stand in the module."""

from __future__ import annotations

import glob
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.dataset
import pytest
import torch

from impactx.datasets import load_dataset
from impactx.explain.attribution import Explanations
from impactx.explain.maps import reading
from impactx.explain.maps.reading import MapDataset
from impactx.explain.maps.store import MapStore, StoreError, StoreSpec
from impactx.settings import DatasetSettings
from impactx.storage import Storage


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return load_dataset(DatasetSettings(name="digits", source="digits", subset=50), tmp_path_factory.mktemp("data"))


@pytest.fixture
def store(tmp_path, data):
    """50 maps in shards of 20, whose every value is known; a result file lies beside them, as a job leaves it."""
    every = np.random.default_rng(0).normal(size=(50, 3, *data.image_size)).astype(np.float32)
    spec = StoreSpec("a" * 32, 50, (3, *data.image_size), 20, {"data": data.fingerprint})
    made = MapStore.create(Storage(tmp_path), "maps/a", spec)
    for shard in range(3):
        rows = made.shard_indices(shard)
        made.write_shard(shard, data.train.labels[rows], Explanations(every[rows], rows * 1.0, rows * 0.0))
    made.storage.write_json("maps/a/result.json", {"images": 50})
    return made, every


def blocks() -> list[str]:
    """The indented code of the docstring."""
    text = (reading.__doc__ or "").split("\n\n")
    return ["\n".join(line[4:] for line in part.splitlines()) for part in text if part.startswith("    ")]


def ran(number: int, **names) -> dict:
    assert len(blocks()[number].splitlines()) == 3
    exec(blocks()[number], names)
    return names


def test_pyarrow(store):
    made, every = store
    names = ran(1, folder=made.storage.uri(made.folder), pyarrow=pyarrow, json=json, np=np)
    np.testing.assert_array_equal(names["maps"], every[names["table"]["index"].to_numpy()])


def test_pandas(store):
    pandas = pytest.importorskip("pandas")
    made, every = store
    names = ran(2, folder=made.storage.uri(made.folder), pandas=pandas, json=json, np=np, glob=glob)
    np.testing.assert_array_equal(names["maps"], every)
    assert names["frame"]["index"].tolist() == list(range(50))


def test_duckdb(store, data):
    duckdb = pytest.importorskip("duckdb")
    made, every = store
    found = ran(3, folder=made.storage.uri(made.folder), duckdb=duckdb)["found"]
    assert [label for label, _, _ in found] == list(range(10))
    for label, count, size in found:
        mine = every[data.train.labels == label]
        assert count == len(mine) and size == pytest.approx(np.abs(mine).mean(), rel=1e-4)


def test_torch_dataset(store, data, tmp_path):
    made, every = store
    maps = MapDataset.open(made.storage.uri(made.folder), data, cache=tmp_path / "cache")
    image, label, values = maps[7]
    assert len(maps) == 50 and label == data.train.labels[7] and image.dtype == values.dtype == torch.float32
    np.testing.assert_array_equal(values, every[7])
    np.testing.assert_allclose(image.permute(1, 2, 0) * 255, data.train.images[7], atol=1e-4)
    images, labels, stacked = next(iter(torch.utils.data.DataLoader(maps, batch_size=8)))
    assert images.shape == stacked.shape == (8, 3, 32, 32)
    assert labels.tolist() == data.train.labels[:8].tolist()
    assert len(list(maps)) == 50 and torch.equal(maps[-43][2], values)
    for index in (50, -51):
        with pytest.raises(IndexError, match=f"training image {index}: there are 0 to 49"):
            maps[index]


def test_other_images_are_refused(store, tmp_path):
    other = load_dataset(DatasetSettings(name="digits", source="digits", subset=60), tmp_path)
    made, _ = store
    with pytest.raises(StoreError, match="fingerprint .* load the data set with the settings"):
        MapDataset.open(made.storage.uri(made.folder), other)
    with pytest.raises(StoreError, match="no store of maps"):
        MapDataset.open(Path(made.storage.root), other)
    with pytest.raises(StoreError, match="do not belong together"):
        MapDataset(other.train.images, other.train.labels, np.zeros((50, 3, 32, 32), np.float32))
