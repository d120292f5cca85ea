"""Data sets: found, decoded once to uint8 RGB, opened as memory-mapped arrays, and split.

    from impactx.datasets import load_dataset, make_split
    from impactx.settings import DatasetSettings

    data = load_dataset(DatasetSettings(name="digits", source="digits"), data_root="data")
    split = make_split(data.train.labels, 0.1, common_fraction=0.05, seed=0,
                       class_names=data.class_names)
    images = data.train.images[split.train[:64]]  # uint8 (64, 32, 32, 3)

Every problem with the data is a `DataError` (a ValueError) whose message names the file, row or
class. A source of your own is one class, see `impactx.datasets.sources.base.Source`.
"""

from impactx.datasets.dataset import Dataset, load_dataset, locate, without_downloads
from impactx.datasets.entry import ImageSet
from impactx.datasets.errors import DataError
from impactx.datasets.splits import Split, make_split, stratified_draw

__all__ = ["DataError", "Dataset", "ImageSet", "Split", "load_dataset", "locate", "make_split",
           "stratified_draw", "without_downloads"]
