"""What is said of s3:// addresses before anything is fetched; the fetching itself is in tests/servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from impactx.configuration import load_settings
from impactx.datasets.remote import addresses
from impactx.experiment.preparation import workplace
from impactx.fetching import is_remote, node_cache
from impactx.settings import DatasetSettings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_an_address_stays_an_address():
    settings = load_settings("full_grid", ["data_root=s3://bucket/data", "dataset=cifar10", "model=lenet5"], CONFIGS)
    assert workplace(settings).data_root == "s3://bucket/data"
    assert is_remote("s3://bucket/data") and not is_remote("/data") and not is_remote(None)


@pytest.mark.parametrize("source, wanted", [
    ({"kind": "auto", "torchvision": "CIFAR10"}, ["s3://b/d/cifar10", "s3://b/d/torchvision/cifar-10-batches-py"]),
    ({"kind": "torchvision", "dataset": "CIFAR10"}, ["s3://b/d/torchvision/cifar-10-batches-py"]), ("parquet", ["s3://b/d/cifar10"]), ("digits", [])])
def test_where_a_data_set_may_lie(source, wanted):
    found = addresses(DatasetSettings(name="cifar10", source=source), "s3://b/d/")
    assert [address for address, _ in found] == wanted


def test_the_nodes_cache(tmp_path, monkeypatch):
    assert node_cache(tmp_path) == tmp_path
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert node_cache() == tmp_path / "cache" / "impactx"
