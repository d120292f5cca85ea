"""The store of maps: a folder of Parquet shards under one fingerprint, on a disk or in S3.

`store.json`, the head, describes what was explained by what. Shard k holds the images
[k * shard_size, (k + 1) * shard_size) of the split, so names and contents are the same whoever
computes them, and two writers of one shard do no harm. Reading needs neither Ray nor this package:

    table = pyarrow.dataset.dataset(folder, format="parquet", exclude_invalid_files=True).to_table()
    shape = json.loads(table.schema.metadata[b"impactx.shape"])
    maps = np.stack(table["map"].to_numpy()).reshape(-1, *shape)

Row i of the maps belongs to the image table["index"][i].
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from impactx.explain.attribution import Explanations
from impactx.storage import Storage

FORMAT = 1
HEAD = "store.json"
# In a shard's metadata where its maps were not made in float32: see `Explanations`.
PRECISION_ERROR = "impactx.precision_error"
COLUMNS = ("index", "label", "map", "score", "base_value")


class StoreError(RuntimeError):
    """A store or shard is torn, foreign or incomplete; the message names the file and a remedy."""


@dataclass(frozen=True)
class StoreSpec:
    """The contents of a store.

    Attributes:
        fingerprint: The key of weights, data and attribution.
        images: The number of images in the split.
        shape: (C, H, W) of a map.
        shard_size: The number of images in each shard but the last.
        recipe: Everything that the fingerprint was made of, as plain data.
    """

    fingerprint: str
    images: int
    shape: tuple[int, int, int]
    shard_size: int
    recipe: dict[str, Any]

    @property
    def shards(self) -> int:
        """The number of shards of a complete store."""
        return math.ceil(self.images / self.shard_size)


def _checksum(table: pa.Table) -> str:
    """Return the sha256 over the columns' values, which Parquet's encoding does not change."""
    digest = hashlib.sha256()
    for name in COLUMNS:
        column = table[name].combine_chunks()
        values = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
        digest.update(np.ascontiguousarray(values.to_numpy(zero_copy_only=False)).tobytes())
    return digest.hexdigest()


class MapStore:
    """One store; `create` opens it for writing, `open` opens an existing one.

    Args:
        storage: Where the store's folder lies.
        folder: The store's folder in there.
        spec: The store's contents.
    """

    def __init__(self, storage: Storage, folder: str, spec: StoreSpec) -> None:
        self.storage, self.folder, self.spec = storage, folder.strip("/"), spec

    @classmethod
    def create(cls, storage: Storage, folder: str, spec: StoreSpec) -> MapStore:
        """Open the store, or begin it. The shard size of one begun earlier is kept.

        Args:
            storage: Where the folder lies.
            folder: The store's folder.
            spec: What the store is to hold.

        Raises:
            StoreError: The folder holds maps under another fingerprint.
        """
        if storage.exists(f"{folder}/{HEAD}"):
            return cls.open(storage, folder, spec.fingerprint)
        storage.write_json(f"{folder}/{HEAD}", {"format": FORMAT} | asdict(spec))
        return cls(storage, folder, spec)

    @classmethod
    def open(cls, storage: Storage, folder: str, fingerprint: str | None = None) -> MapStore:
        """Open an existing store.

        Args:
            storage: Where the folder lies.
            folder: The store's folder.
            fingerprint: The key of the maps that are expected; None takes any.

        Raises:
            StoreError: There is no store, its head is damaged, or it holds maps under another
                fingerprint.
        """
        try:
            head = storage.read_json(f"{folder}/{HEAD}")
        except FileNotFoundError:
            raise StoreError(
                f"{storage.uri(folder)} is no store of maps: it has no {HEAD}") from None
        if not isinstance(head, dict) or head.pop("format", None) != FORMAT:
            raise StoreError(f"{storage.uri(folder)}/{HEAD} has another format than {FORMAT}: "
                             "made by another version of impactx; compute the maps anew in "
                             "another folder")
        try:
            spec = StoreSpec(**head | {"shape": tuple(head["shape"])})
        except (KeyError, TypeError) as error:
            raise StoreError(f"{storage.uri(folder)}/{HEAD} is damaged ({error}): delete it, it is "
                             "made anew when the maps are computed again") from error
        if fingerprint not in (None, spec.fingerprint):
            raise StoreError(f"{storage.uri(folder)} holds maps under fingerprint "
                             f"{spec.fingerprint}, not {fingerprint}: other weights, data or "
                             "settings made them; delete the folder and compute the maps again, or "
                             "use another folder")
        return cls(storage, folder, spec)

    def shard_name(self, shard: int) -> str:
        """Return the file name of a shard, 0 <= shard < spec.shards."""
        return f"shard-{shard:05d}-of-{self.spec.shards:05d}.parquet"

    def shard_indices(self, shard: int) -> np.ndarray:
        """Return the images of a shard: their indices in the split, int64.

        Raises:
            StoreError: There is no such shard.
        """
        if not 0 <= shard < self.spec.shards:
            raise StoreError(f"shard {shard} of {self.storage.uri(self.folder)}: there are 0 to "
                             f"{self.spec.shards - 1}")
        start = shard * self.spec.shard_size
        return np.arange(start, min(start + self.spec.shard_size, self.spec.images))

    def missing(self) -> list[int]:
        """Return the shards that are not there yet."""
        present = set(self.storage.names(self.folder))
        return [k for k in range(self.spec.shards) if self.shard_name(k) not in present]

    def has(self, shard: int) -> bool:
        """Return whether a shard is there."""
        return self.storage.exists(f"{self.folder}/{self.shard_name(shard)}")

    def write_shard(self, shard: int, labels: np.ndarray, explanations: Explanations) -> None:
        """Write a shard, whole or not at all.

        Args:
            shard: The shard's number.
            labels: int64, the labels of the shard's images, in their order.
            explanations: The maps of the shard's images, in their order.

        Raises:
            StoreError: Shapes do not fit, or a value is not finite.
            StorageError: Writing fails.
        """
        indices, shape, maps = self.shard_indices(shard), self.spec.shape, explanations.maps
        if maps.shape != (len(indices), *shape) or maps.dtype != np.float32:
            raise StoreError(f"{self.shard_name(shard)} must hold float32 maps "
                             f"{(len(indices), *shape)}, got {maps.dtype} {maps.shape}")
        bad = ~np.isfinite(maps).all(axis=(1, 2, 3))
        if bad.any():
            raise StoreError(f"the map of image {indices[bad][0]} is not finite ({bad.sum()} such "
                             f"images in {self.shard_name(shard)}): the explained model gives such "
                             "scores")
        values = pa.FixedSizeListArray.from_arrays(pa.array(maps.reshape(-1)), int(np.prod(shape)))
        table = pa.table({
            "index": pa.array(indices, pa.int64()), "label": pa.array(labels, pa.int64()),
            "map": values, "score": pa.array(explanations.scores, pa.float64()),
            "base_value": pa.array(explanations.base_values, pa.float64())})
        error = explanations.precision_error
        table = table.replace_schema_metadata({
            "impactx.format": str(FORMAT), "impactx.fingerprint": self.spec.fingerprint,
            "impactx.shape": json.dumps(shape), "impactx.checksum": _checksum(table)} | (
                {} if error is None else {PRECISION_ERROR: repr(error)}))
        stream = io.BytesIO()
        pq.write_table(table, stream, compression="zstd")
        self.storage.write(f"{self.folder}/{self.shard_name(shard)}", stream.getvalue())

    def read_shard(self, shard: int) -> pa.Table:
        """Read and check a shard.

        Returns:
            A table with the columns index, label, map, score and base_value, a row for each image.

        Raises:
            StoreError: The file is absent, torn, foreign or altered; the message names it.
        """
        rows, path = self.shard_indices(shard), f"{self.folder}/{self.shard_name(shard)}"
        where = self.storage.uri(path)
        remedy = "delete it and compute the maps again: only this shard is made anew"
        try:
            # In this thread alone: pyarrow's pools drop their last hold on a Python object after
            # read_table returned (786 of 2000 times), and where that meets the process's end, the
            # process aborts.
            file = pq.ParquetFile(pa.BufferReader(self.storage.read(path)), pre_buffer=False)
            table = file.read(use_threads=False)
        except FileNotFoundError:
            raise StoreError(
                f"{where} is missing: compute the maps again, finished shards are kept") from None
        except (pa.ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{where} is torn or no Parquet file ({error}): {remedy}") from error
        meta = {k.decode(errors="replace"): v.decode(errors="replace")
                for k, v in (table.schema.metadata or {}).items() if k.startswith(b"impactx.")}
        if meta.get("impactx.fingerprint") != self.spec.fingerprint:
            raise StoreError(f"{where} is foreign: its fingerprint is "
                             f"{meta.get('impactx.fingerprint')}, the store's "
                             f"{self.spec.fingerprint}: {remedy}")
        size, layout = int(np.prod(self.spec.shape)), meta.get("impactx.shape")
        if not set(COLUMNS) <= set(table.column_names) or layout != json.dumps(self.spec.shape) \
                or table.schema.field("map").type != pa.list_(pa.float32(), size):
            raise StoreError(f"{where} has other columns or maps of another shape ({layout}) than "
                             f"{json.dumps(self.spec.shape)}: {remedy}")
        if table["index"].to_pylist() != rows.tolist():
            raise StoreError(f"{where} holds other images than its name says: {remedy}")
        if meta.get("impactx.checksum") != _checksum(table):
            raise StoreError(f"{where} was altered: its checksum does not fit its rows: {remedy}")
        return table

    def verify(self) -> list[str]:
        """Read every shard.

        Returns:
            A message for each shard that is missing, torn, foreign or altered, and for each other
            Parquet file in the folder: every program that reads the folder takes it for a part of
            the store. It may be another store's, or this one's, cut by another shard size, before
            its head was made anew.
        """
        problems = []
        for shard in range(self.spec.shards):
            try:
                self.read_shard(shard)
            except StoreError as error:
                problems.append(str(error))
        expected = {self.shard_name(k) for k in range(self.spec.shards)}
        problems += [f"{self.storage.uri(f'{self.folder}/{name}')} is no shard of this store, "
                     f"which has {self.spec.shards} of {self.spec.shard_size} images: delete it, "
                     "or whoever reads the folder reads it too"
                     for name in self.storage.names(self.folder)
                     if name.endswith(".parquet") and name not in expected]
        return problems

    def unpack(self, cache: str | Path) -> np.ndarray:
        """Return all maps as one memory-mapped, read-only array.

        Args:
            cache: The folder of the array's file, which is made once, from checked shards.

        Returns:
            float32 (images, C, H, W), aligned by index.

        Raises:
            StoreError: As of `read_shard`, or the folder has no space for the file.
        """
        target = Path(cache, f"maps-{self.spec.fingerprint}.npy")
        expected = (self.spec.images, *self.spec.shape)
        if not target.exists():
            # A name of its own for each process: several may unpack at once, the last rename wins.
            partial = target.with_name(f".partial-{uuid.uuid4().hex}")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                whole = np.lib.format.open_memmap(partial, "w+", np.float32, expected)
                with open(partial, "r+b") as handle:
                    # Space is taken now: a page that finds none later kills the process silently.
                    os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
                for shard in range(self.spec.shards):
                    table = self.read_shard(shard)
                    rows = table["map"].combine_chunks().flatten().to_numpy()
                    whole[self.shard_indices(shard)] = rows.reshape(-1, *self.spec.shape)
                whole.flush()
                del whole
                partial.replace(target)
            except OSError as error:
                raise StoreError(f"the maps cannot be unpacked to {target} "
                                 f"({math.prod(expected) * 4 / 2**20:.1f} MiB): "
                                 f"{error.strerror or error}; free some space, or set `cache` to "
                                 "another folder") from error
            finally:
                partial.unlink(missing_ok=True)
        try:
            maps: np.ndarray = np.load(target, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{target} is damaged ({error}): delete it, it is made anew from the "
                             "shards") from error
        if maps.shape != expected or maps.dtype != np.float32:
            raise StoreError(f"{target} holds {maps.dtype} {maps.shape}, the store float32 "
                             f"{expected}: delete it")
        return maps
