"""Files of an s3:// address on this node's own disk: fetched once, by whoever asks first; the others wait."""

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
    """Whether it is an address, and no local path."""
    return address is not None and "://" in os.fspath(address)


def node_cache(cache: str | os.PathLike[str] | None = None) -> Path:
    """The folder for what this node fetches: the given one, else impactx in the user's cache folder."""
    if cache is not None:
        return Path(cache).expanduser().absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "impactx"
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir(), "impactx")


def fetch_file(address: str, cache: str | os.PathLike[str] | None = None) -> Path:
    """A local copy of one file. Raises FileNotFoundError where it is absent, StorageError where it cannot be had."""
    folder, _, name = address.rpartition("/")
    files = {path: size for path, size in Storage(folder).files("").items() if path == name}
    if not files:
        raise FileNotFoundError(f"{address} does not exist")
    return _fetch(folder, files, node_cache(cache)) / name


def fetch_folder(address: str, cache: str | os.PathLike[str] | None = None) -> Path | None:
    """A local copy of everything below an address, under the last part of its name; None where there is nothing.

    Raises StorageError where it cannot be had.
    """
    files = Storage(address).files("")
    if not files:
        return None
    return _fetch(address.rstrip("/"), files, node_cache(cache), address.rstrip("/").rpartition("/")[2])


def _fetch(address: str, files: Mapping[str, tuple[int, int]], cache: Path, under: str = "") -> Path:
    """files: path below the address -> (size, time of the last change): other contents are another copy."""
    about = json.dumps([address, sorted(files.items())])
    target = cache / "fetched" / hashlib.sha256(about.encode()).hexdigest()[:32]
    if (target / under).is_dir():
        return target / under
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():
                _copy(address, files, target, under)
    except OSError as error:
        raise StorageError(f"cannot fetch {address} to {target}: {error.strerror or error}; free space there, or set "
                           "`cache` to another folder") from error
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
            place = partial / under / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(storage.read(path))
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("fetched %s to %s in %.1f s", address, target / under, time.perf_counter() - started)
