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
import logging
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from impactx.datasets import DataError
from impactx.datasets.cache import META, CacheDamaged, fetch, once_a_node
from impactx.explain.attribution import Explanations
from impactx.storage import Storage

log = logging.getLogger("impactx")
FORMAT = 1
ARRAY = "maps.npy"  # of a cache's entry, beside its meta.json
HEAD = "store.json"
# In a shard's metadata where its maps were not made in float32: see `Explanations`.
PRECISION_ERROR = "impactx.precision_error"
ENVIRONMENT = "impactx.environment"  # in a shard's metadata: where its maps were made, as JSON
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

    def write_shard(self, shard: int, labels: np.ndarray, explanations: Explanations,
                    environment: str | None = None) -> None:
        """Write a shard, whole or not at all.

        Args:
            shard: The shard's number.
            labels: int64, the labels of the shard's images, in their order.
            explanations: The maps of the shard's images, in their order.
            environment: In which they were made, as JSON; see `version.Environment`.

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
                {} if error is None else {PRECISION_ERROR: repr(error)}) | (
                {} if environment is None else {ENVIRONMENT: environment}))
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

    def environments(self) -> list[str]:
        """Return the different environments in which shards were made, as JSON, sorted."""
        found: set[str] = set()
        for shard in range(self.spec.shards):
            data = pa.BufferReader(self.storage.read(f"{self.folder}/{self.shard_name(shard)}"))
            metadata = pq.read_schema(data).metadata or {}
            if (environment := metadata.get(ENVIRONMENT.encode())) is not None:
                found.add(environment.decode())
        return sorted(found)

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

    def unpack(self, cache: str | Path, *, limit: int | None = None, session: str = ""
               ) -> np.ndarray:
        """Return all maps as one memory-mapped, read-only array.

        Args:
            cache: The folder of the array's entry, which is made once, from checked shards, and is
                made anew where its checksum does not fit.
            limit: Bytes that the folder may hold, see `datasets.cache.fetch`.
            session: Names the job's present start; a node compares the checksum once for it, see
                `datasets.cache.once_a_node`.

        Returns:
            float32 (images, C, H, W), aligned by index.

        Raises:
            StoreError: As of `read_shard`, or the folder has no space for the file.
        """
        try:
            return fetch([Path(cache)], f"maps-{self.spec.fingerprint}",
                         read=lambda entry: self._unpacked(entry, session), build=self._unpack_to,
                         say=log.info, limit=limit)
        except DataError as error:
            raise StoreError(f"the maps cannot be unpacked: {error}") from error

    def _unpack_to(self, entry: Path) -> None:
        """Write the array shard by shard, and its checksum."""
        shape = (self.spec.images, *self.spec.shape)
        digest = hashlib.sha256()
        with open(entry / ARRAY, "xb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            for shard in range(self.spec.shards):
                rows = self.read_shard(shard)["map"].combine_chunks().flatten().to_numpy()
                values = rows.astype("<f4", copy=False).tobytes()
                digest.update(values)
                file.write(values)
            file.flush()
            os.fsync(file.fileno())
        (entry / META).write_text(json.dumps({"sha256": digest.hexdigest()}))

    def _unpacked(self, entry: Path, session: str) -> np.ndarray:
        """Open the array of an entry.

        Raises:
            CacheDamaged: It does not hold what was written.
        """
        file = entry / ARRAY
        try:
            expected = json.loads((entry / META).read_text())["sha256"]
            maps: np.memmap = np.load(file, mmap_mode="r")
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise CacheDamaged(f"{type(error).__name__}: {error}") from error
        if maps.shape != (self.spec.images, *self.spec.shape) or maps.dtype != np.float32:
            raise CacheDamaged(f"it holds {maps.dtype} {maps.shape}")

        def checksum() -> str:
            with open(file, "rb") as stream:
                stream.seek(maps.offset)
                return hashlib.file_digest(stream, "sha256").hexdigest()  # reads in blocks

        if once_a_node(session, [file], checksum) != expected:
            raise CacheDamaged("the content is not what was written")
        return maps
