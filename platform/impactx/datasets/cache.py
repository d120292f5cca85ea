"""A folder of results that are made once: whole or not at all, by one process at a time."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from impactx.datasets.errors import DataError

T = TypeVar("T")


class CacheDamaged(Exception):
    """An entry exists but is not whole."""


def fetch(folders: Sequence[Path], key: str, read: Callable[[Path], T],
          build: Callable[[Path], None], say: Callable[[str], None]) -> T:
    """Read an entry, after it has been built if no folder holds it yet.

    Processes that come at the same time wait for the first.

    Args:
        folders: Caches in the order of preference; an entry is read from any of them, and built in
            the first that can be written.
        key: The entry's name.
        read: Reads an entry. It raises CacheDamaged for one that is not whole, which is then built
            anew.
        build: Fills an empty temporary folder, which is renamed when it returns, so that an entry
            is never half there. Whatever it raises passes through and leaves nothing behind.
        say: Takes a line for people to read.

    Returns:
        The value of `read`.

    Raises:
        DataError: No folder can be written, or its space ends.
    """
    for folder in folders:
        try:
            return _read(folder / key, read)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except CacheDamaged as damage:
            say(f"{folder / key} is damaged ({damage}): made anew")
    folder = _writable(folders)
    with _lock(folder / f".{key}.lock", say) as alone:
        try:
            return _read(folder / key, read)  # another process may have made it meanwhile
        except (FileNotFoundError, CacheDamaged):
            pass
        if alone:  # what an earlier process left that was killed
            for stale in folder.glob(f".{key}.*.part"):
                shutil.rmtree(stale, ignore_errors=True)
        temporary = folder / f".{key}.{uuid.uuid4().hex[:12]}.part"
        try:
            temporary.mkdir()
            build(temporary)
            _publish(temporary, folder / key, read)
        except OSError as error:
            raise DataError(f"cannot write the decoded images to {folder}: {error}; free space "
                            "there or set `cache` to another folder") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return read(folder / key)


def _read(entry: Path, read: Callable[[Path], T]) -> T:
    if not entry.is_dir():
        raise FileNotFoundError(entry)
    return read(entry)


def _publish(temporary: Path, entry: Path, read: Callable[[Path], T]) -> None:
    """Move the finished folder to its place; a damaged entry makes room, a whole one stays."""
    try:
        _read(entry, read)
        return
    except FileNotFoundError:
        pass
    except CacheDamaged:
        shutil.rmtree(entry)
    os.rename(temporary, entry)


def _writable(folders: Sequence[Path]) -> Path:
    reasons = []
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{uuid.uuid4().hex}"
            probe.touch()
            probe.unlink()
            return folder
        except OSError as error:
            reasons.append(f"{folder} ({error.strerror})")
    raise DataError("decoded images cannot be stored: no writable folder among "
                    f"{', '.join(reasons)}; set `cache` to a folder with space")


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold a lock; yield False if the file system has none (then two may build, and one wins)."""
    lock = FileLock(path)
    alone = True
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            key = path.name.strip(".").removesuffix(".lock")
            say(f"another process is preparing {key}: waiting")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout):
            raise
        alone = False
    try:
        yield alone
    finally:
        lock.release()
