"""Files of an s3:// address on this node's disk: the first that asks fetches, the others wait."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock

from impactx.storage import Storage, StorageError

log = logging.getLogger("impactx")


def is_remote(address: str | os.PathLike[str] | None) -> bool:
    """Return whether this is an address, and no local path."""
    return address is not None and "://" in os.fspath(address)


def node_cache(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder for what this node fetches.

    Args:
        cache: The folder that the user gave. None: impactx in the user's cache folder.
    """
    if cache is not None:
        return Path(cache).expanduser().absolute()
    try:
        users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return users.absolute() / "impactx"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir(), "impactx")


def fetch_file(address: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """Return a local copy of one file.

    Args:
        address: The file's address.
        cache: Local folder for the copy, None for the user's cache folder.

    Raises:
        FileNotFoundError: The file is absent.
        StorageError: It cannot be fetched.
    """
    folder, _, name = address.rpartition("/")
    files = {path: size for path, size in Storage(folder).files("").items() if path == name}
    if not files:
        raise FileNotFoundError(f"{address} does not exist")
    return _fetch(folder, files, node_cache(cache)) / name


def fetch_folder(address: str, cache: str | os.PathLike[str] | None = None) -> Path | None:
    """Return a local copy of everything below an address.

    Args:
        address: The folder's address.
        cache: Local folder for the copy, None for the user's cache folder.

    Returns:
        A folder whose name is the last part of the address; None if there are no files.

    Raises:
        StorageError: They cannot be fetched.
    """
    files = Storage(address).files("")
    if not files:
        return None
    address = address.rstrip("/")
    return _fetch(address, files, node_cache(cache), address.rpartition("/")[2])


def _fetch(address: str, files: Mapping[str, tuple[int, int]], cache: Path, under: str = ""
           ) -> Path:
    """Return the folder that holds a copy of files.

    Args:
        address: The folder's address.
        files: (size, time of the last change) of each, by its path below the address. Other
            contents are another copy.
        cache: Local folder of all copies.
        under: Folder inside the copy into which the files go.
    """
    contents = json.dumps([address, sorted(files.items())])
    target = cache / "fetched" / hashlib.sha256(contents.encode()).hexdigest()[:32]
    if (target / under).is_dir():
        return target / under
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                _copy(address, files, target, under)
    except OSError as error:
        raise StorageError(f"cannot fetch {address} to {target}: {error.strerror or error}; free "
                           "space there, or set `cache` to another folder") from error
    return target / under


def _copy(address: str, files: Mapping[str, tuple[int, int]], target: Path, under: str) -> None:
    for stale in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
        shutil.rmtree(stale, ignore_errors=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}"
    started, storage = time.perf_counter(), Storage(address, patience=60)
    total = sum(size for size, _ in files.values())
    log.info("fetching %s: %d files, %.1f MB", address, len(files), total / 1e6)
    try:
        for path in files:
            copy = partial / under / path
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(storage.read(path))
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    seconds = time.perf_counter() - started
    log.info("fetched %s to %s in %.1f s", address, target / under, seconds)
