"""A folder of class folders: train/<class>/x.png and test/<class>/x.png, or <class>/x.png alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Source, file_identity

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def has_class_folders(folder: Path) -> bool:
    """Whether some folder inside `folder` holds an image, at any depth."""
    return folder.is_dir() and any(
        Path(name).suffix.lower() in ENDINGS
        for sub in _subfolders(folder) for _, _, names in os.walk(sub) for name in names)


class FolderSource(Source):
    """Classes are the folders in alphabetical order; images are found at any depth inside them."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place
        if not place.is_dir():
            raise DataError(f"{place} is not a folder: expected class folders of images in it")
        top = [sub.name for sub in _subfolders(place)]
        if "train" not in top and "test" in top:
            raise DataError(f"{place} has a folder test but no folder train: expected train/<class>/... and "
                            "test/<class>/..., or <class>/... alone")
        roots = {"train": place / "train", "test": place / "test"} if "train" in top else {"train": place}
        roots = {part: root for part, root in roots.items() if root.is_dir()}
        if "train" in top and (others := sorted(set(top) - {"train", "test"})):
            self.notes.append(f"ignored folders beside train and test: {', '.join(others)}")
        self.has_test = "test" in roots
        self._classes = tuple(sub.name for sub in _subfolders(roots["train"]))
        if not self._classes:
            raise DataError(f"{roots['train']} holds no class folders: expected <class>/<image>.png in it")
        self._files: dict[str, list[Path]] = {}
        self._labels: dict[str, np.ndarray] = {}
        for part, root in roots.items():
            self._list(part, root)

    def _list(self, part: str, root: Path) -> None:
        known = {name: label for label, name in enumerate(self._classes)}
        files, labels, others = [], [], 0
        for sub in _subfolders(root):
            if sub.name not in known:
                raise DataError(f"{sub} is a class of the {part} part only: the classes of train are "
                                f"{', '.join(self._classes[:20])}")
            found = sorted(Path(base) / name for base, _, names in os.walk(sub) for name in names
                           if not name.startswith("."))
            images = [file for file in found if file.suffix.lower() in ENDINGS]
            others += len(found) - len(images)
            if not images:
                raise DataError(f"the class folder {sub} is empty: no file in it ends in "
                                f"{', '.join(sorted(ENDINGS))}; add images or remove the folder")
            files += images
            labels += [known[sub.name]] * len(images)
        if others:
            self.notes.append(f"ignored {others} files below {root} that do not end like an image")
        self._files[part], self._labels[part] = files, np.asarray(labels, dtype=np.int64)

    def describe(self) -> str:
        counts = ", ".join(f"{len(files)} {part} images" for part, files in self._files.items())
        return f"class folders in {self.place} ({len(self._classes)} classes, {counts})"

    def identity(self) -> Any:
        return file_identity(self.place, [file for files in self._files.values() for file in files])

    def class_names(self) -> tuple[str, ...]:
        return self._classes

    def labels(self, part: Part) -> np.ndarray:
        return self._labels[part]

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        files = self._files[part]
        return (files[int(row)] for row in rows)

    def where(self, part: Part, row: int) -> str:
        return str(self._files[part][row])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))
