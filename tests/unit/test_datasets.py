"""Data sets from real files: what is loaded, what is cached, what is refused and how that is said."""

import functools
import hashlib
import http.server
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from impactx.datasets import DataError, load_dataset, locate, without_downloads
from impactx.datasets.decoding import decode
from impactx.settings import DatasetSettings

PLATFORM = Path(__file__).resolve().parents[2] / "platform"


def image(index, size=(12, 10)):
    """A distinct RGB image for each index."""
    pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels[0, 0] = index // 256, index % 256, 7
    return pixels


def encode(pixels, mode=None, kind="PNG"):
    out = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(out, kind)
    return out.getvalue()


def write_parquet(file, cells, labels, *, names=None, image_column="img", label_column="label", struct=True,
                  row_group_size=8):
    file.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array([{"bytes": c, "path": None} for c in cells] if struct else cells,
                      pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if struct else pa.binary())
    table = pa.table({image_column: column, label_column: labels})
    if names:
        features = {image_column: {"_type": "Image"}, label_column: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=row_group_size)


def pets(root, count=60, names=("cat", "dog", "owl")):
    """root/pets with two train files and a test file; image i has the label i % 3."""
    half = count // 2
    for name, rows in (("train-00000-of-00002", range(half)), ("train-00001-of-00002", range(half, count)),
                       ("test-00000-of-00001", range(1000, 1012))):
        write_parquet(root / "pets" / f"{name}.parquet", [encode(image(i)) for i in rows],
                      [i % 3 for i in rows], names=list(names) if names else None)
    return root / "pets"


def folders(root, per_class=8, parts=("train", "test")):
    """root/pets/<part>/<class>/<n>.png; without parts root/pets/<class>/<n>.png."""
    number = 0
    for part in parts:
        for name in ("cat", "dog"):
            for i in range(per_class):
                file = root / "pets" / part / name / f"{i:02d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image(number)).save(file)
                number += 1
    return root / "pets"


def load(root, cache=None, progress=None, **settings):
    return load_dataset(DatasetSettings(**{"name": "pets", **settings}), root, cache=cache, progress=progress)


def refused(root, *words, **settings):
    """load_dataset raises a DataError that holds all the words; no half-made entry stays in the cache."""
    with pytest.raises(DataError) as caught:
        load(root, **settings)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    left = [p.name for p in (root / ".cache").iterdir() if p.is_dir()] if (root / ".cache").exists() else []
    assert left == []


# What is loaded -----------------------------------------------------------------------------------------


def test_parquet_gives_the_rows_in_order_with_names_and_labels(tmp_path):
    pets(tmp_path)
    data = load(tmp_path)
    assert (data.name, data.class_names, data.num_classes) == ("pets", ("cat", "dog", "owl"), 3)
    assert (data.image_size, data.channels, data.notes) == ((12, 10), 3, [])
    assert data.train.images.dtype == np.uint8 and data.train.labels.dtype == np.int64
    assert np.array_equal(data.train.images, np.stack([image(i) for i in range(60)]))
    assert np.array_equal(data.train.labels, np.arange(60) % 3)
    test = data.load_test()
    assert np.array_equal(test.images, np.stack([image(i) for i in range(1000, 1012)]))
    assert np.array_equal(test.labels, np.arange(1000, 1012) % 3) and len(test) == 12
    assert isinstance(data.train.images, np.memmap)
    for array in (data.train.images, data.train.labels, test.images, test.labels):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("where", ["pets/data", "pets/plain_text"])
@pytest.mark.parametrize("columns", [("img", "label"), ("image", "fine_label"), ("image", "labels")])
@pytest.mark.parametrize("struct", [True, False])
def test_the_layouts_of_the_hub(tmp_path, where, columns, struct):
    for part, rows in (("train", range(40)), ("test", range(40, 50))):
        write_parquet(tmp_path / where / f"{part}.parquet", [encode(image(i)) for i in rows],
                      [i % 2 for i in rows], image_column=columns[0], label_column=columns[1], struct=struct)
    data = load(tmp_path)
    assert data.class_names == ("0", "1")
    assert np.array_equal(data.train.images[39], image(39))
    assert np.array_equal(data.load_test().images[0], image(40))
    assert where in locate(DatasetSettings(name="pets"), tmp_path)


@pytest.mark.parametrize("train, test, other", [
    (["data/train-00000-of-00002-1359597a978bc4fa.parquet", "data/train-00001-of-00002-0b2c46a7f8e4d1aa.parquet"],
     "data/test-00000-of-00001-ffe2b63b6a3a2b17.parquet", "data/train-00000-of-00002-4cc1df67a978bc4f.parquet"),
    (["default/train/0000.parquet", "default/train/0001.parquet"], "default/test/0000.parquet",
     "default/train-00000-of-00001.parquet"),
    (["train/0000.parquet", "train/0001.parquet"], "test/0000.parquet", "train.parquet")])
def test_older_and_converted_exports_of_the_hub(tmp_path, train, test, other):
    place = tmp_path / "pets"
    for number, name in enumerate([*train, test]):
        write_parquet(place / name, [encode(image(10 * number + i)) for i in range(10)], [i % 2 for i in range(10)])
    (place / test).with_name("README.md").write_text("not of the data")
    data = load(tmp_path, cache=tmp_path / "cache")
    assert np.array_equal(data.train.images, np.stack([image(i) for i in range(20)])) and data.notes == []
    assert np.array_equal(data.load_test().images[0], image(20))
    first = place / train[0]
    (place / other).write_bytes(first.read_bytes())
    refused(tmp_path, "mixes files of several exports", Path(other).name)
    (place / other).unlink()
    first.unlink()
    refused(tmp_path, f"{first.parent} lacks {first.name[:5]}", "1 of 2 files")


def test_parquet_files_of_other_names_are_named(tmp_path):
    for name in ("images.parquet", "default/partial-train/0000.parquet"):
        write_parquet(tmp_path / "pets" / name, [encode(image(0))], [0])
    for source in ("auto", "parquet"):
        refused(tmp_path, "train-*.parquet or train/0000.parquet", "default/partial-train/0000.parquet, images.parquet",
                "rename those of the training part", source=source)


def test_other_splits_are_ignored_and_said(tmp_path):
    folder = pets(tmp_path)
    write_parquet(folder / "validation-00000-of-00001.parquet", [encode(image(5))], [0])
    (folder / "._train-00000-of-00002.parquet").write_bytes(b"left by a Mac")
    data = load(tmp_path)
    assert len(data.train) == 60
    assert any("ignored" in note and "validation (1)" in note for note in data.notes)


def test_a_real_cifar10(tmp_path):
    root = os.environ.get("IMPACTX_DATA")
    if not root or not (Path(root) / "cifar10").is_dir():
        pytest.skip("no CIFAR-10: IMPACTX_DATA does not name a folder that holds cifar10/")
    data = load(root, cache=tmp_path, name="cifar10")
    test = data.load_test()
    assert data.train.images.shape == (50000, 32, 32, 3) and test.images.shape == (10000, 32, 32, 3)
    assert np.bincount(data.train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert data.class_names[0] == "airplane" and data.class_names[9] == "truck"
    folder = Path(root) / "cifar10"
    for part, files in ((data.train, "train"), (test, "test")):
        position = 0
        for file in sorted(folder.glob(f"{files}-*.parquet")):
            table = pq.read_table(file)
            for row in (0, 777, len(table) - 1):
                cell, label = (table.column(c)[row].as_py() for c in ("img", "label"))
                peer = cv2.imdecode(np.frombuffer(cell["bytes"], np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
                assert np.array_equal(part.images[position + row], peer)
                assert part.labels[position + row] == label
            position += len(table)
        assert position == len(part)


def test_digits_are_upscaled_and_split(tmp_path):
    from sklearn.datasets import load_digits

    data = load(tmp_path, name="digits", source="digits")
    test = data.load_test()
    assert data.train.images.shape == (1438, 32, 32, 3) and len(test) == 359
    assert np.bincount(test.labels).min() >= 34 and data.class_names == tuple("0123456789")
    digits = load_digits()
    levels = np.rint(digits.images * 255 / 16).astype(np.uint8)
    peers = np.stack([cv2.resize(level, (32, 32), interpolation=cv2.INTER_LINEAR) for level in levels])
    peers = peers.astype(int)
    for part in (data.train, test):
        for index in range(0, len(part), 97):
            shown = part.images[index].astype(int)
            assert (shown == shown[:, :, :1]).all()
            distance = np.abs(peers - shown[:, :, 0]).max(axis=(1, 2))
            assert distance.min() <= 2 and digits.target[distance.argmin()] == part.labels[index]


def test_class_folders_with_and_without_a_test_part(tmp_path):
    place = folders(tmp_path / "a")
    (place / "train" / "cat" / "readme.txt").write_text("not an image")
    (place / "extra").mkdir()
    data = load(tmp_path / "a")
    assert data.class_names == ("cat", "dog") and len(data.train) == len(data.load_test()) == 16
    assert np.array_equal(data.train.images[9], image(9)) and data.train.labels.tolist() == [0] * 8 + [1] * 8
    assert any("1 files" in note for note in data.notes) and any("extra" in note for note in data.notes)

    folders(tmp_path / "b", per_class=20, parts=("",))
    data = load(tmp_path / "b", test_fraction=0.25)
    test = data.load_test()
    assert np.bincount(test.labels).tolist() == [5, 5] and np.bincount(data.train.labels).tolist() == [15, 15]
    numbers = [int(i[0, 0, 1]) for part in (data.train, test) for i in part.images]
    assert sorted(numbers) == list(range(40))  # every image once: the drawn test part is disjoint from train
    labels = [int(label) for part in (data.train, test) for label in part.labels]
    assert labels == [number // 20 for number in numbers]
    assert any("10 images drawn by split_seed 0" in note for note in data.notes)


def test_grey_palette_and_transparent_images_become_rgb_and_it_is_said(tmp_path):
    place = folders(tmp_path)
    grey = np.full((12, 10), 77, np.uint8)
    rgba = np.full((12, 10, 4), (200, 100, 50, 0), np.uint8)
    rgba[:, 5:, 3] = 255
    deep = np.full((12, 10), 0x4D12, np.uint16)
    palette = Image.fromarray(np.full((12, 10, 3), (255, 0, 0), np.uint8)).convert("P")
    for number, content in enumerate((grey, grey, rgba, deep, palette)):
        (place / "train" / "cat" / f"{number:02d}.png").write_bytes(encode(content))
    data = load(tmp_path)
    images = data.train.images
    assert (images[0] == 77).all() and (images[1] == 77).all() and (images[3] == 77).all()
    assert (images[2][:, :5] == 0).all() and (images[2][:, 5:] == (200, 100, 50)).all()
    assert (images[4] == (255, 0, 0)).all() and np.array_equal(images[5], image(5))
    told = " | ".join(data.notes)
    for count, kind in ((2, "grey"), (1, "RGBA"), (1, "palette"), (1, "16-bit grey")):
        assert f"{count} train images of kind {kind} were converted" in told
    assert load(tmp_path).notes == data.notes  # kept with the cache


def photo(pixels, orientation, kind="PNG", **options):
    """An encoded image with an EXIF orientation."""
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(out, kind, exif=exif, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation, seen", [
    (1, lambda p: p), (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (4, lambda p: p[::-1]),
    (5, lambda p: p.swapaxes(0, 1)), (6, lambda p: np.rot90(p, -1)), (7, lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    (8, lambda p: np.rot90(p)), (0, lambda p: p), (9, lambda p: p)])
@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})])
def test_an_image_is_turned_as_its_exif_orientation_says(orientation, seen, kind, options):
    """As the EXIF standard has it: what the stored rows and columns are in the picture that is seen."""
    found = decode(photo(image(1), orientation, kind, **options))
    np.testing.assert_array_equal(found.image, seen(image(1)))
    assert kind == "TIFF" or found.turned == (2 <= orientation <= 8)  # Pillow itself turns a TIFF


def test_other_exif_data_and_damaged_ones_change_nothing():
    exif, out, pixels = Image.Exif(), io.BytesIO(), image(2, (40, 30))
    exif[0x010F] = "a maker"
    for data in (exif, b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense", b"Exif\0\0"):
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "JPEG", exif=data)
        bare = io.BytesIO()
        Image.fromarray(pixels).save(bare, "JPEG")
        found = decode(out.getvalue())
        np.testing.assert_array_equal(found.image, np.asarray(Image.open(bare)))
        assert not found.turned and found.kind is None


def test_turned_images_are_said_and_the_others_keep_their_fingerprint(tmp_path):
    for root in ("a", "b"):
        folders(tmp_path / root)
    before = load(tmp_path / "a")
    for name in ("00.png", "01.png"):
        file = tmp_path / "b/pets/train/cat" / name
        file.write_bytes(photo(np.asarray(Image.open(file))[::-1], 4))  # stored upside down
    data = load(tmp_path / "b")
    assert "2 train images were turned as their EXIF orientation says" in data.notes
    assert not any("turned" in note for note in before.notes)
    assert (data.fingerprint, data.test_fingerprint) == (before.fingerprint, before.test_fingerprint)


def test_resizing_makes_one_size_and_is_antialiased(tmp_path):
    place = folders(tmp_path)
    board = np.zeros((64, 64, 3), np.uint8)
    board[::2, ::2] = board[1::2, 1::2] = 255
    (place / "train" / "cat" / "00.png").write_bytes(encode(board))
    (place / "train" / "dog" / "03.png").write_bytes(encode(image(3, (9, 30))))
    data = load(tmp_path, image_size=16)
    assert data.image_size == (16, 16) and data.load_test().images.shape == (16, 16, 16, 3)
    assert abs(data.train.images[0][2:-2, 2:-2].astype(int) - 127).max() < 8
    assert any(note.startswith("16 train images of 12x10, ") and "64x64" in note and "9x30" in note
               and note.endswith(" were resized to 16x16 (image_size)") for note in data.notes)
    assert "16 test images of 12x10 were resized to 16x16 (image_size)" in data.notes


def test_without_a_drawn_test_part_every_image_is_a_training_image(tmp_path):
    folders(tmp_path, parts=("",))
    drawn, whole = load(tmp_path), load(tmp_path, test_fraction=None)
    assert len(drawn.train) == 13 and np.array_equal(whole.train.images, np.stack([image(i) for i in range(16)]))
    assert any("none is drawn" in note for note in whole.notes)
    with pytest.raises(DataError, match="'pets' has no test part .*test_fraction"):
        whole.load_test()
    assert len(load(tmp_path, test_fraction=None, subset=None).train) == 16  # and from the cache
    pets(tmp_path / "b")
    own, same = load(tmp_path / "b"), load(tmp_path / "b", test_fraction=None)
    assert same.fingerprint == own.fingerprint and len(same.load_test()) == 12


def test_a_subset_is_stratified_and_follows_its_seed(tmp_path):
    pets(tmp_path)
    whole, data, again, other = (load(tmp_path, **s) for s in (
        {}, {"subset": 30}, {"subset": 30, "num_classes": 3}, {"subset": 30, "split_seed": 1}))
    assert np.bincount(data.train.labels).tolist() == [10, 10, 10]
    numbers = data.train.images[:, 0, 0, 1].tolist()
    assert len(set(numbers)) == 30 and (np.array(numbers) % 3 == data.train.labels).all()
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert whole.fingerprint not in (data.fingerprint, other.fingerprint)
    assert data.test_fingerprint == whole.test_fingerprint
    assert any("subset: 30 of 60" in note for note in data.notes)
    assert any("all are used" in note for note in load(tmp_path, subset=500).notes)


def test_the_fingerprint_follows_the_content_alone(tmp_path):
    def made(name, cells, labels, names):
        for part in ("train", "test"):
            write_parquet(tmp_path / name / "pets" / f"{part}.parquet", cells, labels, names=names)
        return load(tmp_path / name).fingerprint

    cells, labels = [encode(image(i)) for i in range(16)], [0] * 8 + [1] * 8
    first = made("a", cells, labels, ["cat", "dog"])
    assert first == made("b", [encode(image(i), kind="BMP") for i in range(16)], labels, ["cat", "dog"])
    folders(tmp_path / "c")
    assert load(tmp_path / "c").fingerprint == first
    changed = image(3)
    changed[5, 5, 1] ^= 1
    others = [made("d", [*cells[:3], encode(changed), *cells[4:]], labels, ["cat", "dog"]),
              made("e", cells, [1, *labels[1:]], ["cat", "dog"]), made("f", cells, labels, ["cat", "fox"])]
    assert len({first, *others}) == 4 and all(re.fullmatch("[0-9a-f]{64}", f) for f in others)


# torchvision: its own code on archives made here, fetched through its own download -----------------------


@pytest.fixture
def server(tmp_path):
    """A web server on this machine: the folder it serves, and its address."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield folder, f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def cifar_archive(folder):
    """A tiny CIFAR-10 in the form of the official archive: 2 images a batch file, labels 0..9 in turn."""
    members, number = {}, 0
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        pixels = np.stack([image(number + i, (32, 32)) for i in range(4)])
        members[name] = pickle.dumps({"data": pixels.transpose(0, 3, 1, 2).reshape(4, -1),
                                      "labels": [(number + i) % 10 for i in range(4)]})
        number += 4
    members["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in members.items()}
    return folder / "cifar.tar.gz", sums


def test_torchvision_downloads_once_and_is_read(tmp_path, server, monkeypatch):
    import torchvision

    archive, sums = cifar_archive(server[0])
    cifar = torchvision.datasets.CIFAR10  # the official address and checksums give way to the tiny archive's
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(cifar, "url", f"{server[1]}/{archive.name}")
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [[n, sums[n]] for n in sums if n.startswith("data_batch")])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
    wanted = {"name": "cifar10", "source": {"kind": "auto", "torchvision": "CIFAR10"}}
    assert "to be downloaded" in locate(DatasetSettings(**wanted), tmp_path)
    data = load(tmp_path, **wanted)
    assert data.class_names[3] == "class 3" and data.train.labels.tolist() == [*range(10), *range(10)]
    assert np.array_equal(data.train.images, np.stack([image(i, (32, 32)) for i in range(20)]))
    assert np.array_equal(data.load_test().images[3], image(23, (32, 32)))
    archive.unlink()
    assert "to be downloaded" not in locate(without_downloads(DatasetSettings(**wanted)), tmp_path)
    assert load(tmp_path, cache=tmp_path / "other", **wanted).fingerprint == data.fingerprint
    (tmp_path / "torchvision" / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(DataError, match="torchvision cannot read its CIFAR10 in .*cifar-10-batches-py"):
        load(tmp_path, **wanted)


def test_a_download_that_fails_says_what_to_do(tmp_path, server, monkeypatch):
    import torchvision

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", f"{server[1]}/absent.tar.gz")
    refused(tmp_path, "CIFAR10", str(tmp_path / "torchvision" / "cifar-10-batches-py"), "data_batch_1",
            "could not be downloaded", "404", str(tmp_path / "pets"), "`path`",
            source={"kind": "auto", "torchvision": "CIFAR10"})


def test_torchvisions_stl10_is_turned_to_channels_last(tmp_path, monkeypatch):
    import torchvision

    stl = torchvision.datasets.STL10
    folder = tmp_path / "torchvision" / "stl10_binary"
    folder.mkdir(parents=True)
    pixels = np.stack([image(i, (96, 96)) for i in range(8)])
    contents = {"class_names.txt": b"bird\ncar\n", "unlabeled_X.bin": b""}
    for part, rows in (("train", slice(0, 4)), ("test", slice(4, 8))):
        contents[f"{part}_X.bin"] = pixels[rows].transpose(0, 3, 2, 1).tobytes()  # column by column
        contents[f"{part}_y.bin"] = bytes([1, 2, 1, 2])
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(stl, "train_list",
                        [[n, sums[n]] for n in ("train_X.bin", "train_y.bin", "unlabeled_X.bin")])
    monkeypatch.setattr(stl, "test_list", [[n, sums[n]] for n in ("test_X.bin", "test_y.bin")])
    data = load(tmp_path, name="stl10",
                source={"kind": "auto", "torchvision": "STL10", "download": False})
    assert data.class_names == ("bird", "car") and data.train.labels.tolist() == [0, 1, 0, 1]
    assert np.array_equal(data.train.images, pixels[:4])
    assert np.array_equal(data.load_test().images, pixels[4:])


# The cache ----------------------------------------------------------------------------------------------


def test_a_second_load_does_not_decode(tmp_path):
    place = pets(tmp_path)
    first = load(tmp_path)
    for file in place.glob("*.parquet"):  # same size and time, but nothing that could be decoded
        stat = file.stat()
        file.write_bytes(b"x" * stat.st_size)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    lines = []
    second = load(tmp_path, progress=lines.append)
    assert lines == [] and second.fingerprint == first.fingerprint
    assert np.array_equal(second.train.images[59], image(59)) and len(second.load_test()) == 12
    with pytest.raises(DataError, match=r"train-0000\d-of-00002.parquet is not a readable Parquet file"):
        load(tmp_path, cache=tmp_path / "another")  # the source was really unreadable


def test_a_changed_file_is_decoded_anew(tmp_path):
    place = pets(tmp_path)
    before = load(tmp_path)
    write_parquet(place / "train-00001-of-00002.parquet", [encode(image(i)) for i in range(200, 230)],
                  [i % 3 for i in range(30)], names=["cat", "dog", "owl"])
    after = load(tmp_path)
    assert before.fingerprint != after.fingerprint and np.array_equal(after.train.images[59], image(229))


def _same_size_and_time(file, content):
    """Put other content into a file's place, as a copy that keeps times does."""
    stat = file.stat()
    assert len(content) == stat.st_size
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_file_of_the_same_size_and_time_is_noticed_by_its_contents(tmp_path):
    pixels = [np.full((8, 8, 3), value, np.uint8) for value in (10, 20, 30, 40)]
    for number, one in enumerate(pixels):
        file = tmp_path / "pets" / "train" / "ab"[number % 2] / f"{number}.bmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(one).save(file)
    file = tmp_path / "pets" / "train" / "a" / "0.bmp"

    def loaded(session, noticed_by):
        settings = DatasetSettings(name="pets", test_fraction=None, noticed_by=noticed_by)
        return load_dataset(settings, tmp_path, session=session)

    before = {how: loaded("first", how) for how in ("contents", "size_and_time")}
    assert before["contents"].fingerprint == before["size_and_time"].fingerprint
    _same_size_and_time(file, file.read_bytes().replace(bytes([10] * 24), bytes([99] * 24)))
    assert loaded("second", "size_and_time").fingerprint == before["contents"].fingerprint
    after = loaded("second", "contents")
    assert after.fingerprint != before["contents"].fingerprint and after.train.images[0].max() == 99


def test_decoded_images_are_compared_with_their_fingerprint_once_a_job(tmp_path):
    pets(tmp_path)
    session = tmp_path.name  # a job's own: what is noted of it lies in the node's temporary folder
    data = load_dataset(DatasetSettings(name="pets"), tmp_path, session=session)
    file, lines = data.folder / "train_images.npy", []
    whole = file.read_bytes()
    _same_size_and_time(file, whole[:5000] + bytes(300) + whole[5300:])
    assert whole[5000:5300] != bytes(300)
    # The same job has read all of it on this node.
    load_dataset(DatasetSettings(name="pets"), tmp_path, session=session, progress=lines.append)
    assert lines == []
    again = load_dataset(DatasetSettings(name="pets"), tmp_path, session=f"{session}-next", progress=lines.append)
    assert "is damaged" in lines[0] and "content is not what was written" in lines[0]
    assert (again.folder / "train_images.npy").read_bytes() == whole
    # A time that changes is seen in the same job, too.
    file.write_bytes(whole[:5000] + bytes(300) + whole[5300:])
    os.utime(file, ns=(0, 0))
    load_dataset(DatasetSettings(name="pets"), tmp_path, session=f"{session}-next", progress=lines.append)
    assert file.read_bytes() == whole


def _decoded(root, cache, name, limit=None):
    """Decode a data set in a process of its own: once that has ended, nobody has it in use."""
    if not (root / name).exists():
        pets(root)
        (root / "pets").rename(root / name)
    script = ("import sys; from impactx.datasets import load_dataset; from impactx.settings import DatasetSettings;"
              "load_dataset(DatasetSettings(name=sys.argv[3]), sys.argv[1], sys.argv[2],"
              " limit=int(sys.argv[4]) if sys.argv[4] else None)")
    subprocess.run([sys.executable, "-c", script, str(root), str(cache), name, str(limit or "")], check=True,
                   env={**os.environ, "PYTHONPATH": str(PLATFORM)})


def test_beyond_the_limit_the_longest_unused_entries_go_but_none_in_use(tmp_path):
    cache = tmp_path / "cache"
    for mine in ("mine", f"mine-{'0' * 16}"):  # of the user, who chose the folder
        (cache / mine).mkdir(parents=True)
    (cache / f"file-{'0' * 16}").touch()

    def names():
        return [p.name.rpartition("-")[0] or p.name for p in sorted(cache.iterdir()) if p.is_dir()]

    for name in ("a", "b", "c"):
        _decoded(tmp_path, cache, name)
    used = load(tmp_path, cache=cache, name="a")
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in cache.glob("?-*")]
    for age, name in enumerate(("a", "b", "c")):
        os.utime(next(cache.glob(f"{name}-*")) / "meta.json", (1000 + age, 1000 + age))
    _decoded(tmp_path, cache, "b")  # opened once more
    _decoded(tmp_path, cache, "d", limit=3 * max(sizes) + 100)
    assert names() == ["a", "b", "d", "mine", "mine"]  # a was not opened for longest, but this process has it in use
    _decoded(tmp_path, cache, "e", limit=1)
    assert names() == ["a", "e", "mine", "mine"]  # the process that made e had it in use
    assert len(used.load_test()) == 12


def _truncate(file):
    os.truncate(file, file.stat().st_size // 2)


def _zero(file):
    file.write_bytes(file.read_bytes()[:128].ljust(file.stat().st_size, b"\0"))


@pytest.mark.parametrize("name", ["train_images.npy", "train_labels.npy", "test_images.npy", "meta.json"])
@pytest.mark.parametrize("damage", [_truncate, Path.unlink, _zero])
def test_a_damaged_cache_is_made_anew(tmp_path, name, damage):
    pets(tmp_path)
    data = load(tmp_path)
    if (damage, name) == (_zero, "test_images.npy"):  # the test images are not read before load_test
        damage(data.folder / name)
        with pytest.raises(DataError, match="decoded test images in .* are damaged"):
            load(tmp_path).load_test()
        return
    damage(data.folder / name)
    lines = []
    again = load(tmp_path, progress=lines.append)
    assert any("is damaged" in line and str(data.folder) in line for line in lines)
    assert again.fingerprint == data.fingerprint and np.array_equal(again.train.images[41], image(41))
    assert np.array_equal(again.load_test().images[0], image(1000))


LOADER = """
import os, signal, sys
from impactx.datasets import load_dataset
from impactx.settings import DatasetSettings
root, cache, end = sys.argv[1:]
def progress(line):
    print("LINE", line, flush=True)
    if end in line and end:
        os.kill(os.getpid(), signal.SIGKILL)
data = load_dataset(DatasetSettings(name="pets"), root, cache=cache, progress=progress)
print("DONE", data.fingerprint, int(data.train.images.sum()))
"""


def start_loader(root, cache, end=""):
    return subprocess.Popen([sys.executable, "-c", LOADER, str(root), str(cache), end], text=True,
                            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PLATFORM)})


def test_of_several_processes_one_decodes(tmp_path):
    pets(tmp_path, count=1500)
    running = [start_loader(tmp_path, tmp_path / "cache") for _ in range(3)]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len({re.search("DONE (.*)", output)[1] for output in outputs}) == 1
    assert sum("1,500 decoded" in output for output in outputs) == 1


def test_a_process_killed_while_decoding_leaves_nothing_half_made(tmp_path):
    pets(tmp_path)
    cache = tmp_path / "cache"
    process = start_loader(tmp_path, cache, end="train images: 60 decoded")
    process.communicate()
    assert process.returncode == -9
    assert len(list(cache.glob(".*.part"))) == 1 and not list(cache.glob("pets-*"))
    data = load(tmp_path, cache=cache)
    assert np.array_equal(data.train.images[59], image(59))
    assert not list(cache.glob(".*.part")) and len(list(cache.glob("pets-*"))) == 1


READ_ONLY = """
import mmap, os, sys
import pyarrow.parquet, pyarrow.compute, PIL.PngImagePlugin  # while they may still be read
from impactx.datasets import load_dataset
from impactx.settings import DatasetSettings
settings = DatasetSettings(name="pets")
if os.geteuid() == 0:
    os.setegid(65534); os.seteuid(65534)  # root may write everywhere
data = load_dataset(settings, sys.argv[1])
print("FOLDER", data.folder, len(data.load_test()))
"""


def test_a_read_only_data_root_is_decoded_into_the_users_cache():
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as user:
        pets(Path(root))
        os.chmod(root, 0o555)
        os.chmod(user, 0o777)
        environment = {**os.environ, "PYTHONPATH": str(PLATFORM), "XDG_CACHE_HOME": user}
        try:
            out = subprocess.run([sys.executable, "-c", READ_ONLY, root], text=True, check=True,
                                 stdout=subprocess.PIPE, env=environment).stdout
        finally:
            os.chmod(root, 0o755)
        folder = re.search("FOLDER (.*) 12", out)[1]
        assert Path(folder).parent == Path(user) / "impactx" and not (Path(root) / ".cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    pets(tmp_path)
    (tmp_path / "a file").write_text("")
    with pytest.raises(DataError, match=r"no writable folder among .*a file"):
        load(tmp_path, cache=tmp_path / "a file")


NO_SPACE = """
import resource, sys
from impactx.datasets import DataError, load_dataset
from impactx.settings import DatasetSettings
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # a longer file fails in the middle
try:
    load_dataset(DatasetSettings(name="pets"), sys.argv[1], cache=sys.argv[2])
except DataError as error:
    print("REFUSED", error)
"""


def test_a_file_system_that_is_full_is_named_and_nothing_is_left(tmp_path):
    pets(tmp_path)  # 60 images of 360 bytes
    cache = tmp_path / "cache"
    out = subprocess.run([sys.executable, "-c", NO_SPACE, str(tmp_path), str(cache)], text=True, check=True,
                         stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(PLATFORM)}).stdout
    assert "REFUSED cannot write pets-" in out and "set `cache`" in out
    assert [p.name for p in cache.iterdir() if p.is_dir()] == []


# Bad input ----------------------------------------------------------------------------------------------


def test_an_absent_data_set_says_what_was_looked_for_and_how_to_provide_it(tmp_path):
    for settings in ({}, {"source": "parquet"}, {"source": "folder"}):
        refused(tmp_path, "'pets' was not found", str(tmp_path / "pets"), "does not exist", "`path`",
                "`data_root`", **settings)
        with pytest.raises(DataError, match="was not found"):
            locate(DatasetSettings(name="pets", **settings), tmp_path)
    refused(tmp_path, "CIFAR10", "data_batch_1", "`download` is false", str(tmp_path / "pets"),
            source={"kind": "auto", "torchvision": "CIFAR10", "download": False})
    with pytest.raises(ValidationError, match=r"source\.dataset"):
        DatasetSettings(name="pets", source="torchvision")
    refused(tmp_path, str(tmp_path / "gone"), "is not a folder", path=str(tmp_path / "gone"))


def test_auto_prefers_parquet_then_folders_then_torchvision(tmp_path):
    wanted = DatasetSettings(name="pets", source={"kind": "auto", "torchvision": "CIFAR10"})
    assert "torchvision's CIFAR10" in locate(wanted, tmp_path)
    folders(tmp_path)
    assert locate(wanted, tmp_path).startswith("class folders in")
    pets(tmp_path)
    assert locate(wanted, tmp_path) == f"Parquet files in {tmp_path / 'pets'} (2 train, 1 test)"
    by_path = DatasetSettings(name="x", source="folder", path=str(tmp_path / "pets"))
    assert "class folders" in locate(by_path, "/")
    assert not (tmp_path / ".cache").exists()


def test_missing_truncated_and_foreign_parquet_files_are_named(tmp_path):
    place = pets(tmp_path)
    whole = (place / "train-00001-of-00002.parquet").read_bytes()
    (place / "train-00001-of-00002.parquet").unlink()
    refused(tmp_path, "lacks train-00001-of-00002.parquet", "1 of 2")
    for content in (whole[:len(whole) // 2], whole[:4], b"", whole[:-600] + b"\0" * 600):
        (place / "train-00001-of-00002.parquet").write_bytes(content)
        refused(tmp_path, "train-00001-of-00002.parquet", "not a readable Parquet file")
    torn = whole[:40] + b"\xff" * 2000 + whole[2040:]  # the footer is whole, the rows are not
    (place / "train-00001-of-00002.parquet").write_bytes(torn)
    refused(tmp_path, "train-00001-of-00002.parquet")
    (place / "train-00001-of-00002.parquet").write_bytes(whole)
    write_parquet(place / "train-00000-of-00007.parquet", [encode(image(0))], [0])
    refused(tmp_path, "mixes files of several exports", "train-00000-of-00007.parquet")


ROWS = range(24)
CELLS = [encode(image(i)) for i in ROWS]
LABELS = [i % 3 for i in ROWS]
FLOAT_IMAGE = encode(Image.fromarray(np.ones((12, 10), np.float32)), kind="TIFF")


@pytest.mark.parametrize("cells, labels, options, words", [
    (CELLS, [*LABELS[:7], 3, *LABELS[8:]], {"names": list("abc")}, ["row 7", "label 3 is outside 0..2"]),
    (CELLS, [*LABELS[:7], -1, *LABELS[8:]], {}, ["row 7", "label -1 is outside 0..2"]),
    (CELLS, [*LABELS[:7], 10**12, *LABELS[8:]], {}, ["row 7", "label 1000000000000 means"]),
    (CELLS, [*LABELS[:7], None, *LABELS[8:]], {}, ["row 7", "'label'", "missing"]),
    (CELLS, [str(x) for x in LABELS], {}, ["'label'", "string", "expected integers"]),
    (CELLS, [0] * 24, {}, ["1 class", "at least 2"]),
    (CELLS, [0, 2] * 12, {}, ["no training image of class '1'"]),
    (CELLS, [*LABELS[:7], 20, *LABELS[8:]], {}, ["21 classes were counted, from the largest label: 20 in", "row 7;",
                                                 "set num_classes"]),
    (CELLS, LABELS, {"names": ["cat", "dog", "owl", "fox"]}, ["no training image of class 'fox'"]),
    (CELLS, LABELS, {"names": ["cat", "dog", "cat"]}, ["names two classes alike"]),
    (CELLS, LABELS, {"image_column": "picture"}, ["no image column", "img, image", "picture"]),
    (CELLS, LABELS, {"label_column": "coarse"}, ["no label column", "label, fine_label, labels", "coarse"]),
    ([*CELLS[:11], b"no image", *CELLS[12:]], LABELS, {}, ["row 11", "cannot be read as an image"]),
    ([*CELLS[:11], CELLS[11][:90], *CELLS[12:]], LABELS, {}, ["row 11", "cannot be read as an image"]),
    ([*CELLS[:11], b"", *CELLS[12:]], LABELS, {}, ["row 11", "cannot be read as an image"]),
    ([*CELLS[:11], None, *CELLS[12:]], LABELS, {}, ["row 11", "no bytes"]),
    ([*CELLS[:11], encode(image(1, (12, 11))), *CELLS[12:]], LABELS, {},
     ["row 11 has 12x11 pixels", "has 12x10", "image_size"]),
    ([*CELLS[:11], FLOAT_IMAGE, *CELLS[12:]], LABELS, {}, ["row 11", "pixel mode F"]),
    ([], pa.array([], pa.int64()), {}, ["holds no image"]),
])
def test_bad_rows_are_named(tmp_path, cells, labels, options, words):
    write_parquet(tmp_path / "pets" / "train.parquet", cells, labels, **options)
    refused(tmp_path, str(tmp_path / "pets"), *words)


def test_a_wrong_type_of_image_column_is_named(tmp_path):
    (tmp_path / "pets").mkdir()
    table = pa.table({"img": [[1, 2]] * 4, "label": [0, 0, 1, 1]})
    pq.write_table(table, tmp_path / "pets" / "train.parquet")
    refused(tmp_path, "'img'", "list<", "expected encoded images")


def test_a_test_part_that_does_not_fit_is_refused_before_any_training(tmp_path):
    place = pets(tmp_path)
    test = place / "test-00000-of-00001.parquet"
    write_parquet(test, [encode(image(i, (9, 9))) for i in range(3)], [0, 1, 2])
    refused(tmp_path, f"{test}, row 0 has 9x9", "train-00000-of-00002.parquet, row 0 has 12x10")
    write_parquet(test, CELLS, [5] * 24)
    refused(tmp_path, f"{test}, row 0: label 5 is outside 0..2")
    write_parquet(test, CELLS, LABELS, names=["dog", "cat", "owl"])
    refused(tmp_path, str(test), "class names", "differ")
    write_parquet(test, CELLS, LABELS, image_column="image")
    refused(tmp_path, str(test), "no column 'img'")


def test_num_classes_is_checked(tmp_path):
    pets(tmp_path)
    refused(tmp_path, "3 classes", "num_classes is 10", num_classes=10)
    assert load(tmp_path, num_classes=3).num_classes == 3


def test_bad_class_folders_are_named(tmp_path):
    place = folders(tmp_path)
    (place / "train" / "owl").mkdir()
    refused(tmp_path, str(place / "train" / "owl"), "is empty")
    (place / "train" / "owl").rmdir()
    (place / "test" / "owl").mkdir()
    Image.fromarray(image(0)).save(place / "test" / "owl" / "x.png")
    refused(tmp_path, str(place / "test" / "owl"), "test part only")
    (place / "train" / "dog" / "03.png").write_bytes(b"no image")
    (place / "test" / "owl" / "x.png").unlink()
    (place / "test" / "owl").rmdir()
    refused(tmp_path, str(place / "train" / "dog" / "03.png"), "cannot be read as an image")
    (place / "train").rename(tmp_path / "elsewhere")
    refused(tmp_path, "a folder test but no folder train")


def test_a_drawn_test_part_leaves_every_class_training_images(tmp_path):
    write_parquet(tmp_path / "pets" / "train.parquet", CELLS, [0] * 23 + [1], names=["cat", "dog"])
    refused(tmp_path, "test_fraction of 0.2", "no training image of class 'dog'")
    refused(tmp_path, "test_fraction 0.05: cannot draw 1 images from 24 images of 2 classes",
            test_fraction=0.05)


def test_the_package_imports_without_the_heavy_libraries():
    code = ("import sys, impactx.datasets; "
            "print([m for m in ('torch', 'torchvision', 'pyarrow', 'sklearn', 'ray') if m in sys.modules])")
    out = subprocess.run([sys.executable, "-c", code], text=True, check=True, capture_output=True,
                         env={**os.environ, "PYTHONPATH": str(PLATFORM)}).stdout
    assert out.strip() == "[]"
