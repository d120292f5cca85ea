"""Data sources as extensions: one of a user's own, torchvision's classes by name, settings and what refuses them."""

from __future__ import annotations

import bz2
import importlib.util
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from impactx.configuration import ConfigurationError, load_settings
from impactx.datasets import DataError, load_dataset, locate, without_downloads
from impactx.datasets.remote import addresses
from impactx.datasets.sources import torchvision as ours
from impactx.datasets.sources.base import Location, Source, finder_of
from impactx.settings import DatasetSettings
from impactx.settings.extensions import SourceSettings, source

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "tests/extensions/toy_source.py"


@pytest.fixture
def registered(monkeypatch):
    """The registry, from which what a test adds is taken again."""
    source.names()  # the built-in ones are there
    monkeypatch.setattr(source, "_classes", dict(source._classes))
    return source


def imported(path, name="toy_source"):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def toy(registered):
    yield imported(TOY)
    del sys.modules["toy_source"]


# A source of one's own ----------------------------------------------------------------------------------


def test_a_source_of_ones_own_is_one_file(tmp_path, toy):
    assert "shapes" in source.names() and source.get("shapes") is toy.Shapes
    settings = DatasetSettings(name="mine", source={"kind": "shapes", "count": 40})
    assert settings.source == toy.Shapes(count=40) and DatasetSettings.model_validate(
        settings.model_dump(mode="json")) == settings
    assert locate(settings, tmp_path) == "40 drawn squares and crosses (seed 0)"
    lines = []
    data = load_dataset(settings, tmp_path, progress=lines.append)
    assert data.class_names == ("square", "cross") and data.image_size == (16, 16)
    assert (len(data.train), len(data.load_test())) == (32, 8) and np.bincount(data.load_test().labels).tolist() == [4, 4]
    assert any("8 images drawn by split_seed 0" in note for note in data.notes)
    corners = data.train.images[:, 4, 4].any(axis=1)
    assert np.array_equal(corners, data.train.labels == 0)
    assert len(lines) == 2 and (again := load_dataset(settings, tmp_path, progress=lines.append)).folder == data.folder
    assert len(lines) == 2 and again.fingerprint == data.fingerprint  # it was decoded once
    other = load_dataset(DatasetSettings(name="mine", source={"kind": "shapes", "count": 40, "seed": 1}), tmp_path)
    assert other.fingerprint != data.fingerprint


def test_an_edited_source_is_decoded_anew(tmp_path, registered):
    file = tmp_path / "toy_source.py"
    folders = []
    for text in (TOY.read_text(), TOY.read_text(), TOY.read_text().replace("4:12, 4:12", "3:13, 3:13")):
        file.write_text(text)
        registered._classes.pop("shapes", None)
        imported(file)
        folders.append(load_dataset(DatasetSettings(name="mine", source="shapes"), tmp_path).folder)
    del sys.modules["toy_source"]
    assert folders[0] == folders[1] != folders[2]


def faulty(registered, **methods):
    """A source whose labels or images are not what the contract says."""
    def labels(self, part):
        return np.arange(40) % 2

    def images(self, part, rows):
        return (np.zeros((8, 8, 3), np.uint8) for _ in rows)

    body = {"__module__": __name__, "__annotations__": {"kind": Literal["faulty"]}, "kind": "faulty",
            "describe": lambda self: "faulty images", "identity": lambda self: 0, "labels": labels, "images": images}
    registered(type("Faulty", (Source,), body | methods))
    return DatasetSettings(name="faulty", source="faulty")


@pytest.mark.parametrize("methods, words", [
    ({"labels": lambda self, part: np.arange(40) / 2}, "labels of the train part must be integers .* float64"),
    ({"labels": lambda self, part: np.zeros((40, 2), int)}, "integers of shape .*not int64 of shape"),
    ({"labels": lambda self, part: []}, "the train part holds no image"),
    ({"images": lambda self, part, rows: (np.zeros((8, 8, 3)) for _ in rows)}, r"image \d+ is an array of float64"),
    ({"images": lambda self, part, rows: (np.zeros((8, 8), np.uint8) for _ in rows)}, r"shape \(8, 8\)"),
    ({"images": lambda self, part, rows: (np.zeros((8, 8, 3), np.uint8) for _ in rows[1:])}, "gave 31 images where 32"),
    ({"images": lambda self, part, rows: [np.zeros((8, 8, 3), np.uint8)] * 99}, "gave 99 images where 32"),
])
def test_a_source_that_breaks_its_contract_is_named(tmp_path, registered, methods, words):
    assert len(load_dataset(faulty(registered), tmp_path).train) == 32
    registered._classes.pop("faulty")
    with pytest.raises(DataError, match=f"faulty images.*{words}"):
        load_dataset(faulty(registered, **methods), tmp_path / "bad")
    assert not [p for p in (tmp_path / "bad/.cache").iterdir() if p.is_dir()]


def test_a_class_that_reads_nothing_is_no_source(tmp_path, registered):
    registered(type("Empty", (SourceSettings,), {
        "__module__": __name__, "__annotations__": {"kind": Literal["empty"]}, "kind": "empty"}))
    with pytest.raises(TypeError, match="'empty' must be a subclass of impactx.datasets.sources.base.Source"):
        load_dataset(DatasetSettings(name="x", source="empty"), tmp_path)
    with pytest.raises(RuntimeError, match="'digits' was not opened"):
        source.parse({"kind": "digits"}).describe()


# Settings -----------------------------------------------------------------------------------------------


def test_a_bare_name_is_the_source_with_its_defaults():
    for name in ("auto", "parquet", "folder", "digits"):
        assert DatasetSettings(name="x", source=name) == DatasetSettings(name="x", source={"kind": name})
    assert DatasetSettings(name="x").source == source.parse({"kind": "auto"})
    assert DatasetSettings(name="x", source="auto").model_dump()["source"] == {
        "kind": "auto", "torchvision": None, "download": True}


@pytest.mark.parametrize("override, words", [
    ("datasets.digits.source=digit", ["no such data source", "did you mean 'digits'?"]),
    ("datasets.digits.source=torchvision", ["datasets.digits.source.dataset is missing"]),
    ("datasets.digits.source={kind: torchvision, dataset: cifar-10}",
     ["datasets.digits.source.dataset = 'cifar-10'", "no such class", "did you mean CIFAR10 or CIFAR100"]),
    ("datasets.digits.source={kind: auto, torchvision: 7}", ["datasets.digits.source.torchvision = 7", "string"]),
    ("datasets.digits.source={kind: folder, recursive: true}", ["datasets.digits.source.recursive = True",
                                                                "no such setting"]),
    ("datasets.digits.source=[]", ["datasets.digits.source = []"]),
])
def test_wrong_sources_are_named_before_anything_starts(override, words):
    with pytest.raises(ConfigurationError) as caught:
        load_settings("demo", [override], ROOT / "configs")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_without_downloads():
    for name in ("auto", "digits", "folder"):  # they download nothing anyhow, and remote.py relies on that
        assert without_downloads(DatasetSettings(name="x", source=name)) == DatasetSettings(name="x", source=name)
    assert not without_downloads(
        DatasetSettings(name="x", source={"kind": "auto", "torchvision": "MNIST"})).source.download
    assert without_downloads(DatasetSettings(name="x", source={"kind": "torchvision", "dataset": "MNIST"})) \
        == DatasetSettings(name="x", source={"kind": "torchvision", "dataset": "MNIST", "download": False})


# Torchvision --------------------------------------------------------------------------------------------


def test_the_layouts_that_stand_here_are_torchvisions_own():
    import torchvision.datasets

    assert set(ours.class_names()) == set(torchvision.datasets.__all__)
    for name, layout in ours.LAYOUTS.items():
        with pytest.MonkeyPatch.context() as patched:
            patched.delitem(ours.LAYOUTS, name)
            assert ours._layout.__wrapped__(name) == layout


def idx(path, array):
    """Write an array as MNIST's files are written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


def mnist(raw):
    """Write a tiny data set in the form of MNIST; returns its images."""
    rng, images = np.random.default_rng(0), {}
    for part, prefix, count in (("train", "train", 40), ("test", "t10k", 20)):
        images[part] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        idx(raw / f"{prefix}-images-idx3-ubyte", images[part])
        idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    return images


@pytest.mark.parametrize("named, path", [
    ({"kind": "torchvision", "dataset": "FashionMNIST"}, ""),
    ({"kind": "torchvision", "dataset": "FashionMNIST"}, "torchvision"),
    ({"kind": "torchvision", "dataset": "FashionMNIST"}, "torchvision/FashionMNIST"),
    ({"kind": "auto", "torchvision": "FashionMNIST"}, "")])
def test_any_class_of_torchvision_is_used_by_its_name(tmp_path, named, path):
    """The package has no line for FashionMNIST."""
    images = mnist(tmp_path / "torchvision/FashionMNIST/raw")
    settings = DatasetSettings(name="fashion", source=named | {"download": False},
                               path=str(tmp_path / path) if path else None)
    data = load_dataset(settings, tmp_path)
    assert locate(settings, tmp_path) == f"torchvision's FashionMNIST in {tmp_path}/torchvision/FashionMNIST"
    assert data.class_names[9] == "Ankle boot" and data.train.labels.tolist() == [i % 10 for i in range(40)]
    assert np.array_equal(data.train.images, np.repeat(images["train"][..., None], 3, axis=3))
    assert np.array_equal(data.load_test().images[..., 0], images["test"])
    assert finder_of(settings).published_as() == "FashionMNIST"
    assert addresses(settings, "s3://b/d")[-1][0] == "s3://b/d/torchvision/FashionMNIST"
    (tmp_path / "torchvision/FashionMNIST/raw/t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="absent: raw/t10k-labels-idx1-ubyte"):
        locate(settings, tmp_path)


def test_a_class_without_a_list_of_files_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch):
    """USPS: its two files lie in the very folder that torchvision is given, and it does not list them."""
    import torchvision.datasets.usps as usps

    settings = DatasetSettings(name="usps", source={"kind": "torchvision", "dataset": "USPS"})
    calls = []

    def download(url, root, filename, md5):
        calls.append(filename)
        Path(root).mkdir(parents=True, exist_ok=True)
        pixels = " ".join(f"{i}:{-1 if i <= 128 else 1}" for i in range(1, 257))
        lines = "".join(f"{label} {pixels}\n" for label in range(1, 11))
        Path(root, filename).write_bytes(bz2.compress(lines.encode()))
        if len(calls) == 2:
            raise RuntimeError("the network is gone")

    monkeypatch.setattr(usps, "download_url", download)
    assert locate(settings, tmp_path).endswith("/torchvision/USPS, to be downloaded")
    with pytest.raises(DataError, match="could not be downloaded: the network is gone.*Ways to provide it"):
        load_dataset(settings, tmp_path)
    with pytest.raises(DataError, match="`download` is false"):
        locate(without_downloads(settings), tmp_path)
    data = load_dataset(settings, tmp_path)
    assert calls == ["usps.bz2", "usps.t.bz2"] * 2 and data.class_names == tuple("0123456789")
    assert data.train.images.shape == (10, 16, 16, 3) and data.train.images[3, 7:9, 0].tolist() == [[0] * 3, [255] * 3]
    assert [p.name for p in (tmp_path / "torchvision").iterdir() if p.is_dir()] == ["USPS"]
    assert load_dataset(without_downloads(settings), tmp_path).folder == data.folder


@pytest.mark.parametrize("name, words", [
    ("FakeData", "does not take root, download and train"), ("EMNIST", "does not take root, download")])
def test_a_class_of_another_interface_is_refused(tmp_path, name, words):
    with pytest.raises(DataError, match=f"torchvision's {name} {words}"):
        locate(DatasetSettings(name="x", source={"kind": "torchvision", "dataset": name}), tmp_path)


@pytest.mark.parametrize("given, shape", [
    (np.zeros((5, 8, 8, 3), np.uint8), (5, 8, 8, 3)), (np.zeros((5, 3, 8, 8), np.uint8), (5, 8, 8, 3)),
    (np.zeros((5, 8, 8), np.uint8), (5, 8, 8)), (np.zeros((5, 3, 3, 3), np.uint8), (5, 3, 3, 3)),
    (None, "no array"), (np.zeros((5, 8, 8), np.float32), "float32"), (np.zeros((5, 64), np.uint8), "(5, 64)"),
    (np.zeros((5, 8, 8, 4), np.uint8), "(5, 8, 8, 4)")])
def test_torchvisions_arrays(given, shape):
    if isinstance(shape, tuple):
        assert ours._channels_last(given, "X").shape == shape
        return
    with pytest.raises(DataError) as caught:
        ours._channels_last(given, "X")
    assert f"torchvision's X has {shape}" in str(caught.value) or shape in str(caught.value)


def test_opening_keeps_the_configured_source_as_it_is(tmp_path):
    (tmp_path / "x/train/a").mkdir(parents=True)
    (tmp_path / "x/train/a/1.png").write_bytes(b"")
    folder = source.parse({"kind": "folder"})
    opened = folder.open(Location("x", tmp_path / "x", tmp_path))
    assert opened is not folder and opened.location.folder == tmp_path / "x" and hash(opened) == hash(folder)
    with pytest.raises(RuntimeError, match="was not opened"):
        assert folder.location
