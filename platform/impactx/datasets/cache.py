"""A node's cache: entries that are made once, whole or not at all, by one process at a time.

An entry is a folder with a file `meta.json`, which is written last. Whoever opens one holds a lock
on that file until the process ends, so that nobody makes room by deleting what is in use.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from impactx.datasets.errors import DataError

T = TypeVar("T")
META = "meta.json"
_ENTRY = re.compile(r"[^.].*-[0-9a-f]{16,}")
_in_use: dict[Path, int] = {}  # file descriptors of this process, each with a shared lock


class CacheDamaged(Exception):
    """An entry exists but is not whole."""


def fetch(folders: Sequence[Path], key: str, read: Callable[[Path], T],
          build: Callable[[Path], None], say: Callable[[str], None], limit: int | None = None
          ) -> T:
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
        limit: Bytes that a folder may hold. Beyond that the entries that were not opened for
            longest are deleted, but none that a process has in use. None: nothing is deleted.

    Returns:
        The value of `read`.

    Raises:
        DataError: No folder can be written, or its space ends.
    """
    for folder in folders:
        _sweep(folder)
        try:
            value = _read(folder / key, read)
            _make_room(folder, limit)
            return value
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except CacheDamaged as damage:
            say(f"{folder / key} is damaged ({damage}): made anew")
    folder = _writable(folders)
    with _lock(folder / f".{key}.lock", say):
        try:
            return _read(folder / key, read)  # another process may have made it meanwhile
        except (FileNotFoundError, CacheDamaged):
            pass
        temporary = folder / f".{key}.{uuid.uuid4().hex[:12]}.part"
        try:
            temporary.mkdir()
            build(temporary)
            _publish(temporary, folder / key, read)
        except OSError as error:
            raise DataError(f"cannot write {key} to {folder}: {error.strerror or error}; free "
                            "space there or set `cache` to another folder") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        value = _read(folder / key, read)
    _make_room(folder, limit)
    return value


def once_a_node(session: str, files: Sequence[Path], compute: Callable[[], str]) -> str:
    """Return what one process of a job computes of files on this node, such as a checksum.

    It is computed anew where a file has another size, time or inode than it had then.

    Args:
        session: Names the job's present start; "" computes it in each process.
        files: What it is computed of.
        compute: Returns one line.
    """
    if not session:
        return compute()
    states = [(str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino)
              for file in files for stat in [file.stat()]]
    name = hashlib.sha256(repr(states).encode()).hexdigest()[:32]
    note = Path(tempfile.gettempdir(), f"impactx-{os.getuid()}", session, name)
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
    except OSError:  # another user's folder, or no space: then each process computes it
        return compute()
    with _lock(note.with_suffix(".lock"), lambda line: None):
        with contextlib.suppress(OSError):
            return note.read_text()
        value = compute()
        with contextlib.suppress(OSError):
            part = note.with_suffix(f".{uuid.uuid4().hex}")
            part.write_text(value)
            part.rename(note)
        return value


def _read(entry: Path, read: Callable[[Path], T]) -> T:
    if not entry.is_dir():
        raise FileNotFoundError(entry)
    _use(entry)
    return read(entry)


def _use(entry: Path) -> None:
    """Keep an entry from being deleted while this process lives, and note that it is in use."""
    try:
        descriptor = os.open(entry / META, os.O_RDONLY)
    except FileNotFoundError:
        return  # it is damaged, which whoever reads it says
    with contextlib.suppress(OSError):  # a file system without locks, from which nothing is deleted
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not (entry / META).exists():
        os.close(descriptor)
        raise FileNotFoundError(entry)  # another process has just deleted it to make room
    if (earlier := _in_use.get(entry)) is not None:
        os.close(earlier)
    _in_use[entry] = descriptor
    with contextlib.suppress(OSError):  # a cache that can only be read
        os.utime(entry / META)


def _make_room(folder: Path, limit: int | None) -> None:
    """Delete the longest unused entries beyond the limit."""
    if limit is None:
        return
    entries: list[tuple[int, int, Path]] = []
    for entry in folder.iterdir():
        # It is a file or folder of the user's, or another process has deleted it meanwhile.
        with contextlib.suppress(OSError):
            if _ENTRY.fullmatch(entry.name):
                size = sum(file.stat().st_size for file in entry.iterdir())
                entries.append(((entry / META).stat().st_mtime_ns, size, entry))
    held = sum(size for _, size, _ in entries)
    for _, size, entry in sorted(entries):
        if held <= limit:
            return
        if _delete_unused(entry):
            held -= size


def _delete_unused(entry: Path) -> bool:
    """Delete an entry unless a process has it in use; return whether it is gone."""
    try:
        descriptor = os.open(entry / META, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = entry.with_name(f".{entry.name}.{uuid.uuid4().hex[:12]}.part")
        entry.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    except OSError:  # it is in use, or the file system has no locks, or cannot be written
        return False
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Delete temporary folders whose makers were killed: nobody holds their locks any more."""
    for stale in folder.glob(".*.part"):
        key = stale.name[1:].rsplit(".", 2)[0]
        lock = FileLock(folder / f".{key}.lock")
        # It is being made (Timeout), or the cache can only be read, or has no locks.
        with contextlib.suppress(OSError, NotImplementedError), lock.acquire(timeout=0):
            shutil.rmtree(stale, ignore_errors=True)


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
    raise DataError("the cache cannot be written: no writable folder among "
                    f"{', '.join(reasons)}; set `cache` to a folder with space")


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock, unless the file system has none: then two may build, and one wins."""
    lock = FileLock(path)
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
    try:
        yield
    finally:
        lock.release()
