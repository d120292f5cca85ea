"""What every source of images returns, and the place at which it looks for a data set."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import PrivateAttr

from impactx.datasets.cache import once_a_node
from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError
from impactx.settings import DatasetSettings
from impactx.settings.extensions import SourceSettings

Part = Literal["train", "test"]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Location:
    """Where a source looks for one data set.

    Attributes:
        name: Name of the data set.
        folder: The data set's `path` if the user gave one, else data_root/<name>; it need not
            exist.
        data_root: The local folder that holds all data sets.
        path_given: Whether `folder` is the user's `path`.
        image_size: Side in pixels to which the images will be resized, or None. A source may ignore
            it: whatever has another size is resized when it is decoded.
        contents: Whether a changed file is noticed by its contents as well.
        session: See `cache.once_a_node`.
    """

    name: str
    folder: Path
    data_root: Path
    path_given: bool = False
    image_size: int | None = None
    contents: bool = False
    session: str = ""

    @classmethod
    def of(cls, settings: DatasetSettings, data_root: str | Path, session: str = "") -> Location:
        """Return the location of a data set.

        Args:
            settings: The data set.
            data_root: The folder that holds all data sets.
            session: See `cache.once_a_node`.

        Raises:
            DataError: The data set's `path` or data_root is a remote address.
        """
        root = _local(data_root, "data_root")
        folder = _local(settings.path, "path") if settings.path else root / settings.name
        return cls(settings.name, folder, root, bool(settings.path), settings.image_size,
                   settings.noticed_by == "contents", session)

    def check_path(self) -> None:
        """Raise DataError if the user gave a `path` that is not a folder."""
        if self.path_given and not self.folder.is_dir():
            raise DataError(f"data set {self.name!r}: its path {self.folder} is not a folder. "
                            f"{self.advice()}")

    def absent(self, contents: Sequence[str], *ways: str) -> DataError:
        """Return the error that `folder` holds nothing that can be read.

        Args:
            contents: What was looked for, such as "class folders of images".
            ways: Further ways to provide the data set, beside those of `advice`.
        """
        state = "which holds none" if self.folder.exists() else "which does not exist"
        if self.folder.is_dir() and (others := _parquet_names(self.folder)):
            more = " and more" if len(others) > 5 else ""
            state += (f" (its Parquet files are {', '.join(others[:5])}{more}: rename those of the "
                      "training part like train-00000-of-00001.parquet)")
        return DataError(f"data set {self.name!r} was not found: looked for "
                         f"{' and '.join(contents)} in {self.folder}, {state}. "
                         f"{self.advice(*ways)}")

    def advice(self, *ways: str) -> str:
        """Return a sentence with the ways in which a user can provide the data set."""
        default = self.data_root / self.name
        return "Ways to provide it: " + "; ".join([
            f"put its Parquet files or class folders into {default}",
            "set `path` of the data set to their folder",
            "set `data_root` to the folder that holds the data sets", *ways]) + "."


class SourceFinder(SourceSettings, ABC):
    """Anything that `source` of a data set can name.

    Nearly every one is a `Source`, which reads images itself. A finder that is none (`auto`) looks
    at what is there and returns the source that reads it.
    """

    @abstractmethod
    def open(self, location: Location) -> Source:
        """Return the source that reads the data set at a location.

        Files are listed, and neither read nor downloaded.

        Raises:
            DataError: The data are absent or incomplete; the message says what was looked for,
                where, and what to do.
        """

    def offline(self) -> Self:
        """Return a source that is the same and downloads nothing: itself if it never does."""
        return self

    def remote_folders(self, name: str) -> list[tuple[str, SourceFinder]]:
        """Return the folders of a remote data_root that may hold the data set's files.

        Args:
            name: Name of the data set.

        Returns:
            (folder below data_root, source that reads a local copy of it as its `path`), in the
            order in which they are tried; empty for a source without files.
        """
        return [(name, self)]

    def published_as(self) -> str | None:
        """Return the name under which the data set is published ("CIFAR10"), None if it is not."""
        return None


class Source(SourceFinder):
    """The images and labels of a data set, before they are decoded.

    A source of your own is a subclass with a name, registered by a decorator:

        @source
        class Npz(Source):
            kind: Literal["npz"] = "npz"
            file: str = "images.npz"

    Its fields are what a user can set. The methods `describe`, `identity`, `labels` and `images`
    must be written, the others where their defaults do not fit. `load_dataset` calls `open`, which
    copies the source, gives the copy its `location` and calls its `list_files`; then `prepare`,
    then `identity`. The rest is called once in the life of a data set, when it is decoded into the
    cache. What a method wants to keep for the others goes into a pydantic `PrivateAttr`.
    """

    _location: Location | None = PrivateAttr(None)
    _notes: list[str] = PrivateAttr(default_factory=list)

    def open(self, location: Location) -> Source:
        """Return a copy of this source that reads the data set at a location."""
        opened = type(self).model_construct(self.model_fields_set, **dict(self))
        opened._location = location
        opened.list_files()
        return opened

    @property
    def location(self) -> Location:
        """Where the data set is looked for; known to the copies that `open` returns."""
        if self._location is None:
            raise RuntimeError(f"the data source {self.kind!r} was not opened: call open(location)")
        return self._location

    @property
    def notes(self) -> list[str]:
        """Sentences on what was left out, for people to read; a source appends its own."""
        return self._notes

    @property
    def has_test(self) -> bool:
        """Whether there is an official test part. If not, a share of `train` is drawn as one."""
        return False

    def list_files(self) -> None:
        """Look for the files at `location`, without reading them.

        Raises:
            DataError: They are absent or incomplete.
        """

    def prepare(self, progress: Progress) -> None:
        """Fetch what is missing, such as a download. Several processes may call this at once.

        Args:
            progress: Takes a line for people to read.

        Raises:
            DataError: It cannot be had.
        """

    @abstractmethod
    def describe(self) -> str:
        """Return in one line which data are used, and from where."""

    @abstractmethod
    def identity(self) -> Any:
        """Return a JSON value that changes whenever the images or labels may have changed.

        What was decoded under the same identity is not decoded again. It holds every setting on
        which the contents depend, and the `file_identity` of files.
        """

    def file_identity(self, root: Path, files: Sequence[Path]) -> list[Any]:
        """Return what tells files below a folder from those that were there before.

        Returns:
            [root, [name, size, modification time in ns], ...], and where the data set is
            `noticed_by` contents a last entry: one SHA-256 of all of them.

        Raises:
            DataError: A file cannot be read.
        """
        rows: list[Any] = [str(root)]

        def checksum() -> str:
            digest = hashlib.sha256()
            for path in files:
                with open(path, "rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            return digest.hexdigest()

        try:
            for file in files:
                stat = file.stat()
                rows.append([file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns])
            if self.location.contents:
                rows.append(once_a_node(self.location.session, files, checksum))
        except OSError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
        return rows

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names of the classes in the order of the labels, None if there are none."""
        return None

    @abstractmethod
    def labels(self, part: Part) -> np.ndarray:
        """Return all labels of a part: integers of shape (n,), which should lie in 0..K-1."""

    @abstractmethod
    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        """Return an iterator over images of a part.

        Args:
            part: The part.
            rows: Ascending positions in what `labels` returns, int64 of shape (m,).

        Returns:
            Exactly m images, in the order of `rows`. Each is a file, the bytes of one (in any
            format that Pillow reads), or an array, uint8 of shape (H, W, 3).
        """

    def where(self, part: Part, row: int) -> str:
        """Return the file (and the row in it) of one image, for messages."""
        return f"{self.describe()}, {part} image {row}"


def finder_of(settings: DatasetSettings) -> SourceFinder:
    """Return the source that a data set names.

    Raises:
        TypeError: Its class is registered but no subclass of `Source`.
    """
    if not isinstance(settings.source, SourceFinder):
        raise TypeError(f"the data source {settings.source.kind!r} must be a subclass of "
                        f"{Source.__module__}.Source")
    return settings.source


def _local(path: str | Path, setting: str) -> Path:
    if "://" in str(path):
        raise DataError(f"{setting} must be a local folder: got {path}")
    return Path(path).expanduser().absolute()


def _parquet_names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet"))
