"""The store of maps: what is written is read, and everything that is not right is named."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from impactx.explain.attribution import Explanations
from impactx.explain.maps import store as store_module
from impactx.explain.maps.scale import map_scale
from impactx.explain.maps.store import HEAD, MapStore, StoreError, StoreSpec
from impactx.storage import Storage

SPEC = StoreSpec("f" * 32, 10, (3, 4, 5), 4, {"max_evals": 50})
LABELS = np.arange(10) % 3


def explanations(rows: np.ndarray, shape=SPEC.shape) -> Explanations:
    rng = np.random.default_rng(7)
    every = rng.normal(size=(SPEC.images, *shape)).astype(np.float32)
    return Explanations(every[rows], rows + 0.5, rows - 0.5)


@pytest.fixture
def store(tmp_path) -> MapStore:
    store = MapStore.create(Storage(tmp_path), "maps/key", SPEC)
    for shard in (2, 0, 1):
        rows = store.shard_indices(shard)
        store.write_shard(shard, LABELS[rows], explanations(rows))
    return store


def file_of(store: MapStore, shard: int) -> Path:
    return Path(store.storage.root, store.folder, store.shard_name(shard))


ENTRY = f"maps-{SPEC.fingerprint}"


def entries(cache: Path) -> list[str]:
    """All folders in a cache, unfinished ones included."""
    return sorted(p.name for p in cache.iterdir() if p.is_dir())


def rewrite(store: MapStore, shard: int, change) -> None:
    """A valid Parquet file with other content, as another program might leave it."""
    table = pq.read_table(io.BytesIO(file_of(store, shard).read_bytes()))
    pq.write_table(change(table), file_of(store, shard))


def test_round_trip(store):
    again = MapStore.open(store.storage, "maps/key")
    assert again.spec == SPEC and again.missing() == [] and again.verify() == []
    assert [again.shard_name(k) for k in range(3)] == [f"shard-0000{k}-of-00003.parquet" for k in range(3)]
    table = again.read_shard(2)
    assert table["index"].to_pylist() == [8, 9] and table["label"].to_pylist() == [2, 0]
    assert table["score"].to_pylist() == [8.5, 9.5] and table["base_value"].to_pylist() == [7.5, 8.5]


def test_unpacked_maps_are_aligned_by_index_and_read_only(store, tmp_path):
    maps = store.unpack(tmp_path / "cache")
    np.testing.assert_array_equal(maps, explanations(np.arange(10)).maps)
    assert isinstance(maps, np.memmap) and not maps.flags.writeable and maps.dtype == np.float32
    assert entries(tmp_path / "cache") == [ENTRY]


def test_bytes_are_the_same_whoever_writes_them(store, tmp_path):
    other = MapStore.create(Storage(tmp_path / "other"), "maps/key", SPEC)
    for shard in range(3):
        rows = other.shard_indices(shard)
        other.write_shard(shard, LABELS[rows], explanations(rows))
        assert file_of(other, shard).read_bytes() == file_of(store, shard).read_bytes()


def test_reading_needs_only_pyarrow_as_documented(store):
    """The lines of the module's docstring, as they stand there."""
    code = "\n".join(line.strip() for line in store_module.__doc__.splitlines() if line.startswith("    "))
    names = {"folder": f"{store.storage.root}/maps/key", "pyarrow": pa, "json": json, "np": np}
    exec(code, names)
    maps, index = names["maps"], names["table"]["index"].to_numpy()
    assert sorted(index) == list(range(10))
    np.testing.assert_array_equal(maps, explanations(index).maps)


def test_a_shard_is_read_in_the_callers_thread_alone(store):
    # A pool of pyarrow's that still held one of our objects at the end of a process would abort it.
    script = ("import os, sys; from impactx.explain.maps.store import MapStore; from impactx.storage import Storage; "
              "store = MapStore.open(Storage(sys.argv[1]), 'maps/key'); threads = len(os.listdir('/proc/self/task')); "
              "assert store.verify() == []; print(len(os.listdir('/proc/self/task')) - threads)")
    done = subprocess.run([sys.executable, "-c", script, str(store.storage.root)], capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


def test_create_keeps_the_shards_of_a_store_begun_with_another_shard_size(store):
    again = MapStore.create(store.storage, "maps/key", replace(SPEC, shard_size=3))
    assert again.spec.shard_size == 4 and again.missing() == [] and again.verify() == []


def test_shards_that_are_not_of_the_store_are_named(store, tmp_path):
    other = MapStore.create(Storage(tmp_path), "maps/other", replace(SPEC, fingerprint="e" * 32, shard_size=2))
    rows = other.shard_indices(0)
    other.write_shard(0, LABELS[rows], explanations(rows))
    foreign = file_of(store, 0).with_name(other.shard_name(0))
    foreign.write_bytes(file_of(other, 0).read_bytes())
    store.storage.write_json("maps/key/result.json", {"images": 10})
    assert store.missing() == []
    assert store.verify() == [f"{foreign} is no shard of this store, which has 3 of 4 images: delete it, or whoever "
                              "reads the folder reads it too"]
    foreign.unlink()
    assert store.verify() == []


def test_shards_of_the_size_before_the_head_was_made_anew_are_named(store):
    old = [str(file_of(store, shard)) for shard in range(3)]
    store.storage.delete(f"maps/key/{HEAD}")
    again = MapStore.create(store.storage, "maps/key", replace(SPEC, shard_size=5))
    for shard in range(2):
        rows = again.shard_indices(shard)
        again.write_shard(shard, LABELS[rows], explanations(rows))
    assert [message.split()[0] for message in again.verify()] == old


def test_another_fingerprint_is_another_store(store):
    with pytest.raises(StoreError, match=f"maps/key holds maps under fingerprint {'f' * 32}, not {'e' * 32}"):
        MapStore.create(store.storage, "maps/key", replace(SPEC, fingerprint="e" * 32))


def test_missing_shards_are_listed_and_named(store, tmp_path):
    file_of(store, 1).unlink()
    assert store.missing() == [1]
    with pytest.raises(StoreError, match="shard-00001-of-00003.parquet is missing"):
        store.unpack(tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


@pytest.mark.parametrize("shard", [-1, 10**6])
def test_a_shard_that_the_store_cannot_have_is_refused(store, shard):
    for ask in (store.shard_indices, store.read_shard):
        with pytest.raises(StoreError, match=f"shard {shard} of .*: there are 0 to {store.spec.shards - 1}"):
            ask(shard)


def test_a_torn_shard_is_named_wherever_it_is_cut(store):
    whole = file_of(store, 1).read_bytes()
    for size in [*range(0, len(whole), 37), len(whole) - 1]:
        file_of(store, 1).write_bytes(whole[:size])
        with pytest.raises(StoreError, match="shard-00001-of-00003.parquet is torn or no Parquet file"):
            store.read_shard(1)
        assert len(store.verify()) == 1


def test_no_flipped_byte_passes_unnoticed(store):
    """Either the shard is refused by name, or the byte was not part of the rows (such as Parquet's own statistics)."""
    whole = file_of(store, 1).read_bytes()
    rows = store.read_shard(1)
    refused = 0
    for place in range(0, len(whole), 11):
        damaged = bytearray(whole)
        damaged[place] ^= 0x41
        file_of(store, 1).write_bytes(bytes(damaged))
        try:
            assert store.read_shard(1).equals(rows)
        except StoreError as error:
            refused += 1
            assert "shard-00001-of-00003.parquet" in str(error) and "delete it" in str(error)
    assert refused > 20


def altered(column: str, position: int, value):
    def change(table: pa.Table) -> pa.Table:
        cells = table[column].to_pylist()
        cells[position] = value
        return table.set_column(table.column_names.index(column), table.schema.field(column),
                                pa.chunked_array([pa.array(cells, table.schema.field(column).type)]))
    return change


@pytest.mark.parametrize("change, said", [
    (altered("map", 1, [0.0] * 60), "altered: its checksum"),
    (altered("label", 0, 2), "altered: its checksum"),
    (altered("score", 0, 2.0), "altered: its checksum"),
    (altered("base_value", 3, None), "altered: its checksum"),
    (altered("index", 0, 0), "other images than its name says"),
    (lambda t: t.slice(1), "other images than its name says"),
    (lambda t: pa.concat_tables([t, t]), "other images than its name says"),
    (lambda t: t.drop_columns(["map"]), "other columns"),
    (lambda t: t.replace_schema_metadata(dict(t.schema.metadata) | {b"impactx.shape": b"[3, 5, 4]"}), "another shape"),
    (lambda t: t.replace_schema_metadata({}), "is foreign: its fingerprint is None"),
    (lambda t: t.replace_schema_metadata(dict(t.schema.metadata) | {b"impactx.fingerprint": b"e"}), "is foreign"),
    (lambda t: t.replace_schema_metadata(dict(t.schema.metadata) | {b"impactx.fingerprint": b"\xff"}), "is foreign"),
])
def test_valid_parquet_with_other_content_is_named(store, tmp_path, change, said):
    rewrite(store, 1, change)
    with pytest.raises(StoreError, match=f"shard-00001-of-00003.parquet .*{said}"):
        store.read_shard(1)
    with pytest.raises(StoreError, match="shard-00001"):
        store.unpack(tmp_path / "cache")


def test_a_shard_under_another_ones_name_is_refused(store):
    file_of(store, 1).write_bytes(file_of(store, 0).read_bytes())
    with pytest.raises(StoreError, match="shard-00001-of-00003.parquet holds other images"):
        store.read_shard(1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_map_that_is_not_finite_is_refused_with_its_image(store, value):
    before = file_of(store, 1).read_bytes()
    found = explanations(store.shard_indices(1))
    found.maps[2, 0, 1, 1] = value
    with pytest.raises(StoreError, match="map of image 6 is not finite"):
        store.write_shard(1, LABELS[4:8], found)
    assert file_of(store, 1).read_bytes() == before


@pytest.mark.parametrize("maps", [np.zeros((3, 3, 4, 5), np.float32), np.zeros((4, 3, 5, 4), np.float32),
                                  np.zeros((4, 3, 4, 5), np.float64)])
def test_maps_of_another_form_are_refused(store, maps):
    with pytest.raises(StoreError, match=r"shard-00001.*must hold float32 maps \(4, 3, 4, 5\)"):
        store.write_shard(1, LABELS[4:8], Explanations(maps, np.zeros(4), np.zeros(4)))


@pytest.mark.parametrize("head, said", [
    ("{}", "another format"), ("[]", "another format"), ('{"format": 99}', "another format"),
    ('{"format": 1}', "damaged"), ('{"format": 1, "shape": [1, 2, 3], "more": 1}', "damaged")])
def test_a_wrong_head_is_named(store, head, said):
    store.storage.write(f"maps/key/{HEAD}", head.encode())
    with pytest.raises(StoreError, match=f"store.json .*{said}"):
        MapStore.open(store.storage, "maps/key")


def test_a_store_of_other_maps_than_those_that_are_meant_is_refused(store):
    assert MapStore.open(store.storage, "maps/key", SPEC.fingerprint).spec == SPEC
    with pytest.raises(StoreError) as caught:
        MapStore.open(store.storage, "maps/key", "e" * 32)
    said = str(caught.value)
    assert f"{store.storage.uri('maps/key')} holds maps under fingerprint {'f' * 32}, not {'e' * 32}" in said
    assert "delete the folder and compute the maps again" in said


def test_no_store_is_named(tmp_path):
    with pytest.raises(StoreError, match=f"{tmp_path}/maps/none is no store of maps"):
        MapStore.open(Storage(tmp_path), "maps/none")


def cut(file: Path) -> None:
    file.write_bytes(b"")


def no_array(file: Path) -> None:
    file.write_bytes(b"\x93NUMPY broken")


def another_shape(file: Path) -> None:
    np.save(file, np.zeros((9, 3, 4, 5), np.float32))


def part_is_zero(file: Path) -> None:
    """As a disk or a killed copy leaves it: size and time are those of the whole file."""
    stat = file.stat()
    whole = file.read_bytes()
    file.write_bytes(whole[:1000] + bytes(200) + whole[1200:])
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("damage", [cut, no_array, another_shape, part_is_zero])
def test_a_damaged_unpacked_file_is_made_anew(store, tmp_path, damage, caplog):
    before = np.array(store.unpack(tmp_path / "cache", session="first"))
    damage(tmp_path / "cache" / ENTRY / "maps.npy")
    with caplog.at_level("INFO", "impactx"):
        after = store.unpack(tmp_path / "cache", session="second")
    np.testing.assert_array_equal(after, before)
    assert f"{ENTRY} is damaged" in caplog.text and entries(tmp_path / "cache") == [ENTRY]


UNPACK = """
import sys, time
from pathlib import Path
from impactx.explain.maps.store import MapStore
from impactx.storage import Storage

class Waits(MapStore):
    def read_shard(self, shard):
        while shard == 1 and not Path(sys.argv[3]).exists():
            time.sleep(0.01)
        print("SHARD", shard, flush=True)
        return super().read_shard(shard)

print("SUM", Waits.open(Storage(sys.argv[1]), "maps/key").unpack(sys.argv[2]).sum())
"""


def start_unpacking(store: MapStore, cache: Path, gate: Path) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", UNPACK, store.storage.root, str(cache), str(gate)], text=True,
                            stdout=subprocess.PIPE)


def test_of_several_processes_one_unpacks(store, tmp_path):
    running = [start_unpacking(store, tmp_path / "cache", store_file) for store_file in [file_of(store, 0)] * 3]
    outputs = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert sum("SHARD" in output for output in outputs) == 1
    assert len({output.splitlines()[-1] for output in outputs}) == 1


def test_a_process_killed_while_unpacking_leaves_nothing(store, tmp_path):
    process = start_unpacking(store, tmp_path / "cache", tmp_path / "never")
    assert process.stdout.readline() == "SHARD 0\n"
    assert len(list((tmp_path / "cache").glob(".*.part"))) == 1
    process.kill()
    process.communicate()
    # Whoever opens anything in the cache tidies it up, also where it is other maps.
    other = MapStore.create(store.storage, "maps/other", replace(SPEC, fingerprint="e" * 32))
    for shard in range(3):
        other.write_shard(shard, LABELS[other.shard_indices(shard)], explanations(other.shard_indices(shard)))
    other.unpack(tmp_path / "cache")
    assert entries(tmp_path / "cache") == [f"maps-{'e' * 32}"]


def test_a_full_cache_folder_is_an_error_not_a_death(store, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a file system is not allowed here")
    try:
        (folder / "others").write_bytes(b"x" * 62_000)
        with pytest.raises(StoreError, match=f"unpacked: cannot write {ENTRY} to {folder}: No space left.*`cache`"):
            store.unpack(folder)
        assert entries(folder) == [] and (folder / "others").exists()
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# ---- scale

def test_std_is_of_the_training_part_alone():
    rng = np.random.default_rng(0)
    maps = rng.normal(0.3, 0.01, (3000, 3, 4, 4)).astype(np.float32)
    training = np.flatnonzero(np.arange(3000) % 3)
    maps[np.arange(0, 3000, 3)] *= 1000
    assert map_scale(maps, training, "std") == pytest.approx(1 / maps[training].astype(np.float64).std(), rel=1e-9)


def test_the_other_scales():
    maps = np.array([[[[1.0, -4.0]]], [[[0.5, 0.25]]]], np.float32)
    np.testing.assert_array_equal(map_scale(maps, np.array([0]), "max_abs"), np.array([0.25, 2.0], np.float32))
    assert map_scale(maps, np.array([0]), "raw") == 1.0
    with pytest.raises(StoreError, match="constant"):
        map_scale(np.ones((4, 1, 2, 2), np.float32), np.arange(3), "std")


def test_a_map_of_zeros_has_the_max_abs_scale_1():
    maps = np.array([[[[1.0, -4.0]]], [[[0.0, 0.0]]], [[[1e-40, 0.0]]]], np.float32)  # 1 / 1e-40 is above float32
    np.testing.assert_array_equal(map_scale(maps, np.array([0]), "max_abs"), np.array([0.25, 1, 1], np.float32))
    with pytest.raises(StoreError, match="all training maps are zeros"):
        map_scale(maps, np.array([1]), "max_abs")
