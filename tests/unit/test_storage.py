"""Files whole or not at all, and messages that name the file."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from impactx.storage import Storage, StorageError

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_written_is_read(tmp_path):
    storage = Storage(tmp_path / "out")
    storage.write("a/b/c.bin", b"\0one")
    storage.write("a/b/c.bin", b"two")
    assert storage.read("a/b/c.bin") == b"two" and storage.exists("a/b/c.bin") and not storage.exists("a/b")
    assert storage.names("a/b") == ["c.bin"] and storage.names("a") == [] and storage.names("nowhere") == []
    storage.delete("a/b/c.bin")
    storage.delete("a/b/c.bin")
    assert not storage.exists("a/b/c.bin")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "out/a/b/c.bin")):
        storage.read("a/b/c.bin")


def test_json_round_trip_is_the_same_bytes_whatever_the_order_of_keys(tmp_path):
    storage = Storage(tmp_path)
    storage.write_json("x.json", {"b": [1, 0.1, None], "a": "é"})
    first = storage.read("x.json")
    storage.write_json("x.json", {"a": "é", "b": [1, 0.1, None]})
    assert storage.read("x.json") == first and storage.read_json("x.json") == {"a": "é", "b": [1, 0.1, None]}
    with pytest.raises(ValueError):
        storage.write_json("x.json", float("nan"))
    assert storage.read("x.json") == first


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe", b"\0" * 40])
def test_damaged_json_is_named(tmp_path, content):
    Storage(tmp_path).write("some/result.json", content)
    with pytest.raises(StorageError, match=f"{tmp_path}/some/result.json is damaged .*delete it"):
        Storage(tmp_path).read_json("some/result.json")


FULL = """
import resource, sys
from impactx.storage import Storage, StorageError
storage = Storage(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    storage.write("folder/file.bin", b"new" * 100_000)
except StorageError as error:
    print(error)
"""


def test_a_write_that_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    """The kernel itself cuts the file off (RLIMIT_FSIZE), as a full quota does."""
    Storage(tmp_path).write("folder/file.bin", b"old")
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT / "platform")},
                          preexec_fn=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
    assert f"could not write {tmp_path}/folder/file.bin (300000 bytes)" in done.stdout
    assert os.listdir(tmp_path / "folder") == ["file.bin"]
    assert Storage(tmp_path).read("folder/file.bin") == b"old"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_with_the_file_and_keeps_what_was_there(small_disk):
    storage = Storage(small_disk)
    storage.write("trials/a/result.json", b"old" * 1000)
    with pytest.raises(StorageError) as caught:
        storage.write("trials/a/result.json", b"x" * 2**21)
    assert f"{small_disk}/trials/a/result.json (2097152 bytes)" in str(caught.value)
    assert "no space is left" in str(caught.value) and "start the same command again" in str(caught.value)
    assert storage.read("trials/a/result.json") == b"old" * 1000
    assert os.listdir(small_disk / "trials" / "a") == ["result.json"]
    storage.write("trials/b/result.json", b"x" * 2**19)  # the failed write took nothing


def test_names_hide_what_a_killed_write_left(tmp_path):
    storage = Storage(tmp_path)
    storage.write("f/a", b"1")
    (tmp_path / "f" / ".partial-123-a").write_bytes(b"half")
    assert storage.names("f") == ["a"]
    storage.sweep("f")
    storage.sweep("nowhere")
    assert os.listdir(tmp_path / "f") == ["a"]


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"could not write {tmp_path}/file/x"):
        Storage(tmp_path).write("file/x", b"1")
    with pytest.raises(StorageError, match="could not write"):
        Storage(tmp_path / "file").check()


def test_check_leaves_nothing(tmp_path):
    Storage(tmp_path / "new").check()
    assert os.listdir(tmp_path / "new") == []


def test_addresses():
    with pytest.raises(StorageError, match="gs://b/x.*only local paths and s3://"):
        Storage("gs://b/x")
    assert Storage("s3://bucket/a/").uri("b/c") == "s3://bucket/a/b/c"
    assert Storage("relative").root == str(Path("relative").absolute())
    copy = pickle.loads(pickle.dumps(Storage("s3://bucket/a")))
    assert copy.root == "s3://bucket/a" and copy.remote


def test_reading_a_folder_is_an_error_that_names_it(tmp_path):
    (tmp_path / "d").mkdir()
    with pytest.raises(StorageError, match=f"could not read {tmp_path}/d"):
        Storage(tmp_path).read("d")


