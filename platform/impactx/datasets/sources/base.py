"""What every source of images offers to the rest of the package."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError

Part = Literal["train", "test"]
Say = Callable[[str], None]


class Source(ABC):
    """Images and labels of one data set, not yet decoded.

    Building a source only lists files: it is cheap, and raises DataError when the data are absent or
    incomplete. `notes` collects what was left out or changed, for people to read.
    """

    has_test: bool
    """Whether there is an official test part; otherwise one is drawn from `train`."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def describe(self) -> str:
        """Which data would be used, and from where, in one line."""

    @abstractmethod
    def identity(self) -> Any:
        """JSON value that changes when the content may have changed (names, sizes, times of files)."""

    def prepare(self, say: Say) -> None:  # noqa: B027 - most sources have nothing to prepare
        """Fetch what is still missing (a download); called once, before identity()."""

    @abstractmethod
    def class_names(self) -> tuple[str, ...] | None:
        """Names in the order of the labels; None when the source knows only numbers."""

    @abstractmethod
    def labels(self, part: Part) -> np.ndarray:
        """All labels of the part, int64 of shape (n,), as they stand (their range is not checked)."""

    @abstractmethod
    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        """The images at the ascending positions `rows` of the part, one after the other."""

    @abstractmethod
    def where(self, part: Part, row: int) -> str:
        """The file (and row in it) of one image, for messages."""


def file_identity(root: Path, files: list[Path]) -> list:
    """[root, [name, size, modification time in ns], ...] of files below root."""
    rows: list = [str(root)]
    for file in files:
        try:
            stat = file.stat()
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from error
        rows.append([file.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns])
    return rows
