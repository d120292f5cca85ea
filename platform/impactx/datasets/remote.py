"""Data sets under an s3:// address: their files are fetched to this node once, and are local from there on."""

from __future__ import annotations

from pathlib import Path

from impactx.datasets.errors import DataError
from impactx.datasets.sources.downloaded import LAYOUT
from impactx.fetching import fetch_folder, is_remote, node_cache
from impactx.settings import DatasetSettings
from impactx.storage import Storage, StorageError


def local_files(settings: DatasetSettings, data_root: str | Path, cache: str | Path | None
                ) -> tuple[DatasetSettings, str | Path]:
    """The settings and data_root with local folders in the place of s3:// addresses; nothing else changes.

    Looked for under data_root: <name>/, then torchvision/ as torchvision lays it out; where neither is there,
    torchvision downloads into this node's cache. Raises DataError.
    """
    if not is_remote(data_root) and not is_remote(settings.path):
        return settings, data_root
    here = node_cache(cache) if is_remote(data_root) else data_root
    try:
        if settings.path:
            if not is_remote(settings.path):
                return settings, here
            if (folder := fetch_folder(settings.path, cache)) is None:
                raise DataError(f"data set {settings.name!r}: its path {settings.path} holds no files")
            return settings.model_copy(update={"path": str(folder)}), here
        if settings.source == "digits":
            return settings, here
        for address, kind in addresses(settings, str(data_root)):
            if (folder := fetch_folder(address, cache)) is not None:
                found = folder.parent if kind == "torchvision" else folder
                return settings.model_copy(update={"path": str(found), "source": kind}), here
        if settings.torchvision_class is None or not settings.download:
            looked = " and ".join(address for address, _ in addresses(settings, str(data_root)))
            raise DataError(f"data set {settings.name!r} was not found: there are no files under {looked}")
    except StorageError as error:
        raise DataError(f"data set {settings.name!r}: {error}") from error
    return settings, here


def addresses(settings: DatasetSettings, data_root: str) -> list[tuple[str, str]]:
    """Where a data set may lie under a remote data_root: (address, source)."""
    root, found = data_root.rstrip("/"), []
    if settings.source != "torchvision":
        found.append((f"{root}/{settings.name}", settings.source))
    if settings.source in ("auto", "torchvision") and settings.torchvision_class is not None:
        found.append((f"{root}/torchvision/{LAYOUT[settings.torchvision_class][0]}", "torchvision"))
    return found


def locate_remote(settings: DatasetSettings, data_root: str | Path) -> str | None:
    """Which address `local_files` would fetch from; None where nothing remote is asked for, or nothing is there."""
    asked = [settings.path] if is_remote(settings.path) else [] if settings.path or settings.source == "digits" or (
        not is_remote(data_root)) else [address for address, _ in addresses(settings, str(data_root))]
    try:
        return next((f"files in {address}" for address in asked if Storage(str(address)).files("")), None)
    except StorageError as error:
        raise DataError(f"data set {settings.name!r}: {error}") from error
