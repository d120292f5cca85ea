"""Whole files under a local (or shared) folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

TEMPORARY = ".partial-"  # begins the name of a file that is still being written


class LocalFiles:
    """The files of a `Storage` whose root is a folder; errors are those of the operating system.

    Args:
        root: The folder, which need not exist.
    """

    remedy = ""

    def __init__(self, root: str) -> None:
        self.root = str(Path(root).expanduser().absolute())

    def may_pass(self, error: OSError) -> bool:
        """Return whether an error may pass by itself; here no error does but a full disk's."""
        return False

    def write(self, path: str, data: bytes) -> None:
        """Write a file under a temporary name, sync it and rename it, so that it is never half."""
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
        """Return the bytes of a file."""
        return Path(self.root, path).read_bytes()

    def exists(self, path: str) -> bool:
        """Return whether there is such a file."""
        return Path(self.root, path).is_file()

    def names(self, folder: str) -> list[str]:
        """Return the names of the files directly in a folder, in any order."""
        local = Path(self.root, folder)
        if not local.is_dir():
            return []
        return [p.name for p in local.iterdir()
                if p.is_file() and not p.name.startswith(TEMPORARY)]

    def folders(self, folder: str) -> list[str]:
        """Return the names of the folders directly in a folder, in any order."""
        local = Path(self.root, folder)
        return [p.name for p in local.iterdir() if p.is_dir()] if local.is_dir() else []

    def files(self, folder: str) -> dict[str, tuple[int, int]]:
        """Return the size and time of everything below a folder; see `Storage.files`."""
        local = Path(self.root, folder)
        paths = [p for p in local.rglob("*")
                 if p.is_file() and not p.name.startswith(TEMPORARY)]
        return {p.relative_to(local).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns)
                for p in paths}

    def delete(self, path: str) -> None:
        """Delete a file, if it exists."""
        Path(self.root, path).unlink(missing_ok=True)

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with everything in it, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(Path(self.root, folder))

    def sweep(self, folder: str) -> None:
        """Delete what killed writers left in a folder."""
        for left in Path(self.root, folder).glob(f"{TEMPORARY}*"):
            with contextlib.suppress(OSError):  # it is only untidy
                left.unlink()
