"""Reading a store of maps: as a torch dataset, or by pyarrow, pandas or DuckDB alone.

    from impactx.explain.maps.reading import MapDataset
    maps = MapDataset.open("results/maps/<key>", data)       # data: a datasets.Dataset
    image, label, map = maps[7]                              # of training image 7

`folder` is the store's folder; row i belongs to the training image table["index"][i]. With pyarrow:

    table = pyarrow.dataset.dataset(folder, format="parquet", exclude_invalid_files=True).to_table()
    shape = json.loads(table.schema.metadata[b"impactx.shape"])
    maps = np.stack(table["map"].to_numpy()).reshape(-1, *shape)

With pandas (where a map is a flat array, in the order channel, row, column):

    frame = pandas.concat(map(pandas.read_parquet, sorted(glob.glob(f"{folder}/shard-*.parquet"))))
    shape = json.load(open(f"{folder}/store.json"))["shape"]
    maps = np.stack(frame["map"]).reshape(-1, *shape)

With DuckDB (1.3 or newer), here for the labels' mean absolute values, without loading the maps:

    shards = f"read_parquet('{folder}/shard-*.parquet')"
    columns = "label, count(*), avg(list_avg(list_transform(map, lambda v: abs(v))))"
    found = duckdb.sql(f"select {columns} from {shards} group by label order by label").fetchall()
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from impactx.datasets import Dataset
from impactx.explain.maps.store import MapStore, StoreError
from impactx.storage import Storage


def store_at(address: str | Path) -> MapStore:
    """Return the store at an address.

    Args:
        address: The store's folder, or s3://bucket/.../<key>.

    Raises:
        StoreError: There is no store.
    """
    text = str(address).rstrip("/")
    if "://" not in text:
        text = str(Path(text).expanduser().absolute())
    folder, _, name = text.rpartition("/")
    return MapStore.open(Storage(folder or "/"), name)


class MapDataset(TorchDataset[tuple[Tensor, int, Tensor]]):
    """Every training image with its label and map, aligned by index, loaded when it is asked for.

    Item i is the image, float32 (3, H, W) in [0, 1], its label, and its map, float32 (C, H, W) in
    the attribution's own units; IndexError where there is no image i.

    Args:
        images: uint8 (N, H, W, 3).
        labels: int64 (N,).
        maps: float32 (N, C, H, W); all three may be memory-mapped.

    Raises:
        StoreError: The three do not belong together.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, maps: np.ndarray) -> None:
        if not len(images) == len(labels) == len(maps) or images.shape[1:3] != maps.shape[2:]:
            raise StoreError(f"images {images.shape}, labels {labels.shape} and maps {maps.shape} "
                             "do not belong together")
        self.images, self.labels, self.maps = images, labels, maps

    @classmethod
    def open(
        cls, address: str | Path, data: Dataset, cache: str | Path | None = None
    ) -> MapDataset:
        """Open a complete store with its images.

        Args:
            address: The store's address, see `store_at`.
            data: The data set whose training images were explained.
            cache: The folder of the unpacked maps, by default beside the decoded images.

        Raises:
            StoreError: A shard is missing, torn or foreign, or the store is of other images.
        """
        store = store_at(address)
        if (of := store.spec.recipe.get("data")) != data.fingerprint:
            raise StoreError(f"{address} holds maps of the images with fingerprint {of}, "
                             f"{data.name!r} has {data.fingerprint}: load the data set with the "
                             "settings of that job")
        maps = store.unpack(cache or Path(data.folder).parent)
        return cls(data.train.images, data.train.labels, maps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int, Tensor]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"training image {index}: there are 0 to {len(self) - 1}")
        image = torch.from_numpy(np.array(self.images[index])).permute(2, 0, 1).float() / 255
        return image, int(self.labels[index]), torch.from_numpy(np.array(self.maps[index]))
