"""Whole files under one root, on a local (or shared) folder or in an S3 bucket.

Everything an experiment leaves goes through `Storage`, so a file is there whole or not at all:
locally it is written under a temporary name, synced and renamed; an S3 object appears when its
upload is complete.  Credentials and endpoint of S3 come from the usual AWS_* variables.
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
from pathlib import Path
from typing import Any, TypeVar

TEMPORARY = ".partial-"
FULL = (errno.ENOSPC, errno.EDQUOT)
log = logging.getLogger("impactx")
T = TypeVar("T")


class StorageError(RuntimeError):
    """A file could not be written or read; the message names it and says what to do."""


class DamagedError(StorageError):
    """A file was read, and is not what it should be."""


class Storage:
    """Files by their relative path under `root` (a folder, or s3://bucket/prefix). Can be pickled."""

    def __init__(self, root: str | os.PathLike[str], patience: float = 0) -> None:
        """patience: seconds for which is tried again what fails because there is no space, or S3 does not answer."""
        text = os.fspath(root)
        self.remote = "://" in text
        if self.remote and not text.startswith("s3://"):
            raise StorageError(f"storage address {text!r}: only local paths and s3:// are supported")
        self.root = text.rstrip("/") if self.remote else str(Path(text).expanduser().absolute())
        self.patience = patience
        self._filesystem: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filesystem": None}

    def __repr__(self) -> str:
        return f"Storage({self.root!r})"

    def uri(self, path: str = "") -> str:
        """The full address of a file, for messages and for other programs."""
        return f"{self.root}/{path}" if path else self.root

    def _s3(self, path: str) -> tuple[Any, str]:
        if self._filesystem is None:
            from pyarrow import fs

            options: dict[str, Any] = {}
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                options["scheme"], _, options["endpoint_override"] = endpoint.rstrip("/").rpartition("://")
                options["scheme"] = options["scheme"] or "https"
            if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
                options["region"] = region
            self._filesystem = fs.S3FileSystem(**options)
        return self._filesystem, f"{self.root[len('s3://'):]}/{path}".rstrip("/")

    def write(self, path: str, data: bytes) -> None:
        """Write a file whole, replacing an older one.

        Raises StorageError where the storage is full, read-only or away, and stays so as long as its patience lasts;
        nothing half is left then.
        """
        try:
            self._patiently(lambda: self._write(path, data), f"{self.uri(path)} cannot be written")
        except OSError as error:
            reason = ("no space is left: free some, then start the same command again, finished work is kept"
                      if error.errno in FULL else str(error))
            raise StorageError(f"could not write {self.uri(path)} ({len(data)} bytes): {reason}{self._remedy()}"
                               ) from error

    def _patiently(self, do: Callable[[], T], what: str) -> T:
        """Try again where the storage is full or away, as long as the patience lasts."""
        end, pause = time.monotonic() + self.patience, 0.5
        while True:
            try:
                return do()
            except OSError as error:
                passing = error.errno in FULL or self.remote and not isinstance(error, FileNotFoundError)
                if not passing or time.monotonic() + pause > end:
                    raise
                if pause == 0.5:
                    log.warning("%s (%s): tried again for %.0f s", what, error.strerror or error, self.patience)
                time.sleep(pause)
                pause = min(2 * pause, 10.0)

    def _write(self, path: str, data: bytes) -> None:
        if self.remote:
            filesystem, key = self._s3(path)
            with filesystem.open_output_stream(key) as stream:
                stream.write(data)
            return
        target = Path(self.root, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{TEMPORARY}{uuid.uuid4().hex}-{target.name}")
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, path: str) -> bytes:
        """The bytes of a file. Raises FileNotFoundError where it is absent, StorageError otherwise."""
        try:
            return self._patiently(lambda: self._read(path), f"{self.uri(path)} cannot be read")
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.uri(path)} does not exist") from None
        except OSError as error:
            raise StorageError(f"could not read {self.uri(path)}: {error}{self._remedy()}") from error

    def _read(self, path: str) -> bytes:
        if self.remote:
            filesystem, key = self._s3(path)
            with filesystem.open_input_file(key) as stream:
                return stream.read()
        return Path(self.root, path).read_bytes()

    def _remedy(self) -> str:
        if not self.remote:
            return ""
        given = [name for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
                                   "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE") if os.environ.get(name)]
        return (f"; check the bucket, the endpoint and the keys (in this process's environment: "
                f"{', '.join(given) or 'no AWS_* variable'})")

    @contextlib.contextmanager
    def _asking(self, what: str, path: str) -> Iterator[tuple[Any, str]]:
        """The S3 file system and the key of a path; what goes wrong in the block becomes a StorageError."""
        try:
            yield self._s3(path)
        except OSError as error:
            raise StorageError(f"could not {what} {self.uri(path)}: {error}{self._remedy()}") from error

    def exists(self, path: str) -> bool:
        """True where the file is there (whole, by construction). Raises StorageError where S3 does not answer."""
        if self.remote:
            with self._asking("look for", path) as (filesystem, key):
                return bool(filesystem.get_file_info(key).is_file)
        return Path(self.root, path).is_file()

    def names(self, folder: str) -> list[str]:
        """Sorted names of the files directly in a folder; empty where there is no such folder."""
        if self.remote:
            from pyarrow import fs

            with self._asking("list", folder) as (filesystem, key):
                found = filesystem.get_file_info(fs.FileSelector(key, allow_not_found=True))
            return sorted(info.base_name for info in found if info.is_file)
        local = Path(self.root, folder)
        if not local.is_dir():
            return []
        return sorted(p.name for p in local.iterdir() if p.is_file() and not p.name.startswith(TEMPORARY))

    def files(self, folder: str) -> dict[str, tuple[int, int]]:
        """Everything below an S3 folder: path relative to it -> (bytes, time of the last change in ns)."""
        from pyarrow import fs

        with self._asking("list", folder) as (filesystem, key):
            found = filesystem.get_file_info(fs.FileSelector(key, allow_not_found=True, recursive=True))
        return {info.path.removeprefix(f"{key}/"): (info.size, info.mtime_ns) for info in found if info.is_file}

    def folders(self, folder: str) -> list[str]:
        """Sorted names of the folders directly in a folder; empty where there is no such folder."""
        if self.remote:
            from pyarrow import fs

            with self._asking("list", folder) as (filesystem, key):
                found = filesystem.get_file_info(fs.FileSelector(key, allow_not_found=True))
            return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)
        local = Path(self.root, folder)
        return sorted(p.name for p in local.iterdir() if p.is_dir()) if local.is_dir() else []

    def delete(self, path: str) -> None:
        """Remove a file; absent is fine."""
        if self.remote:
            with self._asking("delete", path) as (filesystem, key):
                if filesystem.get_file_info(key).is_file:
                    filesystem.delete_file(key)
        else:
            Path(self.root, path).unlink(missing_ok=True)

    def write_json(self, path: str, value: Any) -> None:
        """Write plain data as readable JSON."""
        self.write(path, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())

    def read_json(self, path: str) -> Any:
        """Plain data from JSON. Raises FileNotFoundError, DamagedError where it is not JSON, StorageError otherwise."""
        data = self.read(path)
        try:
            return json.loads(data)
        except ValueError as error:
            raise DamagedError(f"{self.uri(path)} is damaged ({error}): delete it, it will be made anew") from error

    def sweep(self, folder: str) -> None:
        """Remove what killed writers left in a folder, once nobody writes there any more. S3 shows nothing half."""
        if not self.remote:
            for left in Path(self.root, folder).glob(f"{TEMPORARY}*"):
                with contextlib.suppress(OSError):  # it is only untidy
                    left.unlink()

    def check(self) -> None:
        """Prove before the work starts that files can be written here. Raises StorageError if not."""
        probe, now = f"{TEMPORARY}{uuid.uuid4().hex}", Storage(self.root)
        now.write(probe, b"probe")
        now.delete(probe)
