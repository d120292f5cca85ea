"""Where images come from: one module a kind of source, and the choice between them."""

from __future__ import annotations

from pathlib import Path

from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Source
from impactx.datasets.sources.digits import DigitsSource
from impactx.datasets.sources.downloaded import TorchvisionSource
from impactx.datasets.sources.folder import FolderSource, has_class_folders
from impactx.datasets.sources.parquet import ParquetSource, find_parquet, parquet_names
from impactx.settings import DatasetSettings

__all__ = ["Part", "Source", "find_source"]


def find_source(settings: DatasetSettings, data_root: str | Path) -> Source:
    """The source that `settings` ask for; for "auto" the first of: Parquet, class folders, torchvision.

    Only lists files. Raises DataError when it is absent: what was looked for, where, and what to do.
    """
    root = _local(data_root, "data_root")
    folder = _local(settings.path, "path") if settings.path else root / settings.name
    hints = _hints(settings, root / settings.name)
    kind = settings.source
    if kind == "digits":
        return DigitsSource(settings.image_size)
    if settings.path and not folder.is_dir() and kind != "torchvision":
        raise DataError(f"data set {settings.name!r}: its path {folder} is not a folder. {hints}")
    looked = []
    if kind in ("auto", "parquet"):
        place = find_parquet(folder)
        if place is not None:
            return ParquetSource(place)
        looked.append("Parquet files (train-*.parquet or train/0000.parquet)")
    if kind in ("auto", "folder"):
        if has_class_folders(folder):
            return FolderSource(folder)
        looked.append("class folders of images (train/<class>/x.png or <class>/x.png)")
    if kind == "torchvision" and settings.torchvision_class is None:
        raise DataError(f"data set {settings.name!r}: the source torchvision needs torchvision_class "
                        "(CIFAR10, CIFAR100 or STL10)")
    if kind == "torchvision" or kind == "auto" and settings.torchvision_class is not None:
        at = folder if kind == "torchvision" and settings.path else root / "torchvision"
        return TorchvisionSource(settings.torchvision_class, at, settings.download, hints)
    there = "which does not exist" if not folder.exists() else "which holds none"
    if folder.is_dir() and (others := parquet_names(folder)):
        more = " and more" if len(others) > 5 else ""
        there += (f" (its Parquet files are {', '.join(others[:5])}{more}: rename those of the training part like "
                  "train-00000-of-00001.parquet)")
    raise DataError(f"data set {settings.name!r} was not found: looked for {' and '.join(looked)} in "
                    f"{folder}, {there}. {hints}")


def _hints(settings: DatasetSettings, default: Path) -> str:
    ways = [f"put its Parquet files or class folders into {default}",
            "set `path` of the data set to their folder",
            "set `data_root` to the folder that holds the data sets"]
    if settings.torchvision_class is None:
        ways.append("or set torchvision_class to CIFAR10, CIFAR100 or STL10")
    else:
        ways.append("or let torchvision download it (download: true, on a machine with network access) and "
                    "copy data_root/torchvision from there")
    return "Ways to provide it: " + "; ".join(ways) + "."


def _local(path: str | Path, what: str) -> Path:
    if "://" in str(path):
        raise DataError(f"{what} must be a local folder: got {path}")
    return Path(path).expanduser().absolute()
