"""CIFAR-10, CIFAR-100 and STL-10 as torchvision downloads and reads them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Say, Source, file_identity

# Folder, and the files without which torchvision refuses to read (its own list, kept here so that a
# warm start need not import torchvision).
LAYOUT = {
    "CIFAR10": ("cifar-10-batches-py", ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4",
                                        "data_batch_5", "test_batch", "batches.meta"]),
    "CIFAR100": ("cifar-100-python", ["train", "test", "meta"]),
    "STL10": ("stl10_binary", ["train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "unlabeled_X.bin",
                               "class_names.txt"]),
}


class TorchvisionSource(Source):
    """root: the folder given to torchvision; its own subfolder and archive lie in it."""

    has_test = True

    def __init__(self, kind: str, root: Path, download: bool, hints: str) -> None:
        super().__init__()
        self.kind, self.root, self.hints = kind, root, hints
        self.folder = root / LAYOUT[kind][0]
        self.missing = [name for name in LAYOUT[kind][1] if not (self.folder / name).is_file()]
        if self.missing and not download:
            raise DataError(f"torchvision's {kind} is not in {self.folder} (absent: "
                            f"{', '.join(self.missing)}) and `download` is false. {hints}")
        self._loaded: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._names: tuple[str, ...] | None = None

    def describe(self) -> str:
        return f"torchvision's {self.kind} in {self.folder}" + (", to be downloaded" if self.missing else "")

    def prepare(self, say: Say) -> None:
        if not self.missing:
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / f".{self.kind}.lock"):  # one of several processes downloads
                if any(not (self.folder / name).is_file() for name in self.missing):
                    say(f"downloading {self.kind} to {self.root}")
                self._torchvision("train", download=True)
        except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
            raise DataError(f"{self.kind} is not in {self.folder} (absent: {', '.join(self.missing)}) and "
                            f"could not be downloaded: {error}. {self.hints}") from error
        self.missing = []

    def identity(self) -> Any:
        return file_identity(self.root, [self.folder / name for name in LAYOUT[self.kind][1]
                                         if not name.startswith("unlabeled")])

    def class_names(self) -> tuple[str, ...] | None:
        self._load("train")
        return self._names

    def labels(self, part: Part) -> np.ndarray:
        return self._load(part)[1]

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        images = self._load(part)[0]
        for row in rows:
            yield np.ascontiguousarray(images[row])

    def where(self, part: Part, row: int) -> str:
        return f"torchvision's {self.kind} in {self.folder}, {part} image {row}"

    def _load(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._loaded:
            self._loaded.clear()  # one part in memory at a time
            try:
                data = self._torchvision(part, download=False)
            except Exception as error:  # unpickling a damaged file raises nearly anything
                raise DataError(f"torchvision cannot read its {self.kind} in {self.folder} ({error}): "
                                "delete the folder and let it be downloaded again") from error
            images, labels = data.data, np.asarray(getattr(data, "targets", getattr(data, "labels", None)))
            if self.kind == "STL10":  # channels first, as its binary files are
                images = images.transpose(0, 2, 3, 1)
            self._names = tuple(data.classes)
            self._loaded[part] = images, labels.astype(np.int64)
        return self._loaded[part]

    def _torchvision(self, part: Part, download: bool) -> Any:
        import torchvision.datasets as tv

        where = {"split": part} if self.kind == "STL10" else {"train": part == "train"}
        return getattr(tv, self.kind)(str(self.root), download=download, **where)
