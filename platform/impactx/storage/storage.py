"""Whole files by their path under one root, wherever that root is.

Everything that an experiment leaves goes through `Storage`, so a file is there whole or not at all,
and an error names the file and the remedy.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from impactx.storage.local import TEMPORARY, LocalFiles
from impactx.storage.s3 import SCHEME, S3Files

FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger("impactx")
T = TypeVar("T")


class StorageError(RuntimeError):
    """A file could not be written or read; the message names it and the remedy."""


class DamagedError(StorageError):
    """A file could be read, but its content is not what it should be."""


class Storage:
    """Files by their relative path under a root. Can be pickled, and so sent to the workers.

    Args:
        root: A folder, which need not exist, or s3://bucket/prefix.
        patience: Seconds for which a read or write is tried again if there is no space left, or if
            S3 does not answer.

    Attributes:
        root: The absolute path, or the address, without a slash at its end.
        remote: Whether the root is in a bucket.

    Raises:
        StorageError: The root is an address of another kind.
    """

    def __init__(self, root: str | os.PathLike[str], patience: float = 0) -> None:
        text = os.fspath(root)
        self.remote = "://" in text
        if self.remote and not text.startswith(SCHEME):
            raise StorageError(
                f"storage address {text!r}: only local paths and s3:// are supported")
        self._backend: LocalFiles | S3Files = S3Files(text) if self.remote else LocalFiles(text)
        self.root = self._backend.root
        self.patience = patience

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def _inside(self, path: str) -> str:
        """Return a path as it is, if it stays below the root.

        Names that become paths may come from a folder of somebody else's.

        Raises:
            StorageError: It does not.
        """
        parts = path.split("/")
        if not path or any(part in ("", ".", "..") or "\\" in part or "\0" in part
                           for part in parts):
            raise StorageError(f"{path!r} is no path of a file below {self.root}")
        return path

    def uri(self, path: str = "") -> str:
        """Return the full address of a file, for messages and for other programs."""
        return f"{self.root}/{path}" if path else self.root

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole, replacing an older one.

        Raises:
            StorageError: The storage is full, read-only or away, and stays so for as long as its
                patience lasts. Nothing half is left then.
        """
        try:
            self._inside(path)
            self._patiently(lambda: self._backend.write(path, data),
                            f"{self.uri(path)} cannot be written")
        except OSError as error:
            reason = str(error)
            if error.errno in FULL:
                reason = ("no space is left: free some, then start the same command again, "
                          "finished work is kept")
            raise StorageError(f"could not write {self.uri(path)} ({len(data)} bytes): {reason}"
                               f"{self._backend.remedy}") from error

    def _patiently(self, do: Callable[[], T], what: str) -> T:
        """Try again where the storage is full or away, for as long as the patience lasts."""
        end, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return do()
            except OSError as error:
                passing = error.errno in FULL or self._backend.may_pass(error)
                if not passing or time.monotonic() + pause > end:
                    raise
                if pause == 0.5:
                    log.warning("%s (%s): tried again for %.0f s", what, error.strerror or error,
                                self.patience)
                time.sleep(pause)
                pause = min(2 * pause, 10.0)

    def read(self, path: str) -> bytes:
        """Return the bytes of a file.

        Raises:
            FileNotFoundError: There is no such file.
            StorageError: It cannot be read.
        """
        try:
            self._inside(path)
            return self._patiently(lambda: self._backend.read(path),
                                   f"{self.uri(path)} cannot be read")
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri(path)} does not exist") from None
        except OSError as error:
            raise StorageError(
                f"could not read {self.uri(path)}: {error}{self._backend.remedy}") from error

    @contextlib.contextmanager
    def _naming(self, action: str, path: str) -> Iterator[None]:
        """Turn an OSError of the block into a StorageError that names the action and the file."""
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"could not {action} {self.uri(path)}: {error}{self._backend.remedy}") from error

    def exists(self, path: str) -> bool:
        """Return whether there is such a file; it is whole, by construction.

        Raises:
            StorageError: The storage does not answer.
        """
        with self._naming("look for", path):
            return self._backend.exists(self._inside(path))

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of the files directly in a folder; none if it does not exist.

        Raises:
            StorageError: The storage does not answer.
        """
        with self._naming("list", folder):
            return sorted(self._backend.names(folder))

    def folders(self, folder: str) -> list[str]:
        """Return the sorted names of the folders directly in a folder; none if it does not exist.

        Raises:
            StorageError: The storage does not answer.
        """
        with self._naming("list", folder):
            return sorted(self._backend.folders(folder))

    def files(self, folder: str) -> dict[str, tuple[int, int]]:
        """Return everything below a folder; nothing if it does not exist.

        Returns:
            For the path of each file relative to the folder, its size in bytes and the time of its
            last change in nanoseconds since 1970.

        Raises:
            StorageError: The storage does not answer.
        """
        with self._naming("list", folder):
            return self._backend.files(folder)

    def delete(self, path: str) -> None:
        """Delete a file, if it exists.

        Raises:
            StorageError: It cannot be deleted.
        """
        with self._naming("delete", path):
            self._backend.delete(self._inside(path))

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with everything in it, if it exists.

        Raises:
            StorageError: It cannot be deleted.
        """
        with self._naming("delete", folder):
            self._backend.delete_folder(self._inside(folder))

    def write_json(self, path: str, value: object) -> None:
        """Write plain data as readable JSON; see `write`.

        Raises:
            ValueError: The data holds a number that is not finite.
        """
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
        self.write(path, f"{text}\n".encode())

    def read_json(self, path: str) -> Any:
        """Return plain data from a JSON file.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedError: It is not JSON.
            StorageError: It cannot be read.
        """
        data = self.read(path)
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise DamagedError(f"{self.uri(path)} is damaged ({error}): delete it, it will be made "
                               "anew") from error

    def sweep(self, folder: str) -> None:
        """Delete what killed writers left in a folder, once nobody writes there any more."""
        self._backend.sweep(folder)

    def check(self) -> None:
        """Write and delete a small file, before the work starts and without patience.

        Raises:
            StorageError: Files cannot be written here.
        """
        probe, impatient = f"{TEMPORARY}{uuid.uuid4().hex}", Storage(self.root)
        impatient.write(probe, b"probe")
        impatient.delete(probe)
