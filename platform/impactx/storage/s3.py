"""Whole files in an S3 bucket, by pyarrow's file system."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyarrow.fs import FileInfo, FileSelector, S3FileSystem

SCHEME = "s3://"
VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION",
             "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")


class S3Files:
    """The files of a `Storage` whose root is in a bucket; errors are OSErrors, pyarrow's own.

    An object appears when its upload is complete, so nothing is ever half. Credentials, region and
    endpoint come from the usual AWS_* variables, at the first request of each process.

    Args:
        root: s3://bucket or s3://bucket/prefix.
    """

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self._filesystem: S3FileSystem | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_filesystem": None}

    @property
    def remedy(self) -> str:
        """The end of an error's message: what to check, without any value that may be secret."""
        given = ", ".join(name for name in VARIABLES if os.environ.get(name))
        return ("; check the bucket, the endpoint and the keys (in this process's environment: "
                f"{given or 'no AWS_* variable'})")

    def may_pass(self, error: OSError) -> bool:
        """Return whether an error may pass by itself: any but that a file is absent."""
        return not isinstance(error, FileNotFoundError)

    @property
    def _s3(self) -> S3FileSystem:
        if self._filesystem is None:
            from pyarrow import fs

            options: dict[str, str] = {}
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                scheme, _, options["endpoint_override"] = endpoint.rstrip("/").rpartition("://")
                options["scheme"] = scheme or "https"
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            if region:
                options["region"] = region
            self._filesystem = fs.S3FileSystem(**options)
        return self._filesystem

    def _key(self, path: str) -> str:
        return f"{self.root.removeprefix(SCHEME)}/{path}".rstrip("/")

    def write(self, path: str, data: bytes) -> None:
        """Upload an object."""
        with self._s3.open_output_stream(self._key(path)) as stream:
            stream.write(data)

    def read(self, path: str) -> bytes:
        """Return the bytes of an object."""
        with self._s3.open_input_file(self._key(path)) as stream:
            return bytes(stream.read())

    def exists(self, path: str) -> bool:
        """Return whether there is such an object."""
        return bool(self._s3.get_file_info(self._key(path)).is_file)

    def _list(self, folder: str, recursive: bool = False) -> list[FileInfo]:
        from pyarrow import fs

        selector: FileSelector = fs.FileSelector(
            self._key(folder), allow_not_found=True, recursive=recursive)
        return list(self._s3.get_file_info(selector))

    def names(self, folder: str) -> list[str]:
        """Return the names of the objects directly in a folder, in any order."""
        return [info.base_name for info in self._list(folder) if info.is_file]

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder, in any order."""
        from pyarrow import fs

        return [info.base_name for info in self._list(folder)
                if info.type == fs.FileType.Directory]

    def files(self, folder: str) -> dict[str, tuple[int, int]]:
        """Return the size and time of everything below a folder; see `Storage.files`."""
        prefix = f"{self._key(folder)}/"
        return {info.path.removeprefix(prefix): (info.size, info.mtime_ns)
                for info in self._list(folder, recursive=True) if info.is_file}

    def delete(self, path: str) -> None:
        """Delete an object, if it exists."""
        if self.exists(path):
            self._s3.delete_file(self._key(path))

    def delete_folder(self, folder: str) -> None:
        """Delete every object below a folder."""
        for path in self.files(folder):
            self._s3.delete_file(self._key(f"{folder}/{path}"))

    def sweep(self, folder: str) -> None:
        """Do nothing: S3 shows nothing half."""
