"""Data sets under an s3:// address: their files are fetched to this node once, and local then."""

from __future__ import annotations

from pathlib import Path

from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import SourceFinder, finder_of
from impactx.fetching import fetch_folder, is_remote, node_cache
from impactx.settings import DatasetSettings
from impactx.storage import Storage, StorageError


def local_files(settings: DatasetSettings, data_root: str | Path, cache: str | Path | None
                ) -> tuple[DatasetSettings, str | Path]:
    """Fetch a data set's files if they are remote.

    A remote data_root is searched for the folders that the source names (<name>/, torchvision/...).
    Where none of them is there, a source that downloads does so into this node's cache.

    Args:
        settings: The data set.
        data_root: Folder or address of the data sets.
        cache: Local folder for what is fetched, None for the user's cache folder.

    Returns:
        The settings and data_root with local folders in the place of addresses; nothing else
        changes.

    Raises:
        DataError: There are no files, or they cannot be fetched.
    """
    if not is_remote(data_root) and not is_remote(settings.path):
        return settings, data_root
    local_root = node_cache(cache) if is_remote(data_root) else data_root
    try:
        if settings.path:
            if not is_remote(settings.path):
                return settings, local_root
            folder = fetch_folder(settings.path, cache)
            if folder is None:
                raise DataError(f"data set {settings.name!r}: its path {settings.path} holds no "
                                "files")
            return settings.model_copy(update={"path": str(folder)}), local_root
        candidates = addresses(settings, str(data_root))
        for address, source in candidates:
            if (folder := fetch_folder(address, cache)) is not None:
                update = {"path": str(folder), "source": source}
                return settings.model_copy(update=update), local_root
        finder = finder_of(settings)
        if candidates and finder.offline() == finder:  # it cannot be had in another way
            searched = " and ".join(address for address, _ in candidates)
            raise DataError(f"data set {settings.name!r} was not found: there are no files under "
                            f"{searched}")
    except StorageError as error:
        raise DataError(f"data set {settings.name!r}: {error}") from error
    return settings, local_root


def addresses(settings: DatasetSettings, data_root: str) -> list[tuple[str, SourceFinder]]:
    """Return where a data set may lie under a remote data_root.

    Returns:
        (address, source that reads a local copy of it as its `path`), in the order in which they
        are tried.
    """
    root = data_root.rstrip("/")
    return [(f"{root}/{folder}", source)
            for folder, source in finder_of(settings).remote_folders(settings.name)]


def locate_remote(settings: DatasetSettings, data_root: str | Path) -> str | None:
    """Return in one line from which address `local_files` would fetch.

    Returns:
        None where nothing remote is asked for, or nothing is there.

    Raises:
        DataError: The storage does not answer.
    """
    candidates: list[str] = []
    if settings.path:
        candidates = [settings.path] if is_remote(settings.path) else []
    elif is_remote(data_root):
        candidates = [address for address, _ in addresses(settings, str(data_root))]
    try:
        return next((f"files in {a}" for a in candidates if Storage(a).files("")), None)
    except StorageError as error:
        raise DataError(f"data set {settings.name!r}: {error}") from error
