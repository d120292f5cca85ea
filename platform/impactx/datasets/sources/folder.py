"""A folder of class folders: train/<class>/x.png and test/<class>/x.png, or <class>/x.png alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import PrivateAttr

from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Source
from impactx.settings.extensions import source

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
CLASS_FOLDERS = "class folders of images (train/<class>/x.png or <class>/x.png)"  # for messages


def has_class_folders(folder: Path) -> bool:
    """Return whether some folder inside a folder holds an image, at any depth."""
    return folder.is_dir() and any(
        Path(name).suffix.lower() in ENDINGS
        for sub in _subfolders(folder) for _, _, names in os.walk(sub) for name in names)


@source
class Folder(Source):
    """Class folders of images: train/<class>/x.png and test/<class>/x.png, or <class>/x.png alone.

    The classes are the folders in alphabetical order; images lie at any depth inside them.
    """

    kind: Literal["folder"] = "folder"
    _classes: tuple[str, ...] = PrivateAttr(())
    _files: dict[Part, list[Path]] = PrivateAttr(default_factory=dict)
    _labels: dict[Part, np.ndarray] = PrivateAttr(default_factory=dict)

    @property
    def has_test(self) -> bool:
        """Whether there is a folder `test` beside `train`."""
        return "test" in self._files

    def list_files(self) -> None:
        """List all images.

        Raises:
            DataError: There are none, a class has none, or test has a class that train lacks.
        """
        self.location.check_path()
        folder = self.location.folder
        if not has_class_folders(folder):
            raise self.location.absent([CLASS_FOLDERS])
        top = [sub.name for sub in _subfolders(folder)]
        if "train" not in top and "test" in top:
            raise DataError(f"{folder} has a folder test but no folder train: expected "
                            "train/<class>/... and test/<class>/..., or <class>/... alone")
        roots: dict[Part, Path] = {"train": folder / "train" if "train" in top else folder}
        if "train" in top and "test" in top:
            roots["test"] = folder / "test"
        if "train" in top and (others := sorted(set(top) - {"train", "test"})):
            self.notes.append(f"ignored folders beside train and test: {', '.join(others)}")
        self._classes = tuple(sub.name for sub in _subfolders(roots["train"]))
        if not self._classes:
            raise DataError(f"{roots['train']} holds no class folders: expected "
                            "<class>/<image>.png in it")
        for part, root in roots.items():
            self._list(part, root)

    def _list(self, part: Part, root: Path) -> None:
        label_of = {name: label for label, name in enumerate(self._classes)}
        files: list[Path] = []
        labels: list[int] = []
        others = 0
        for sub in _subfolders(root):
            if sub.name not in label_of:
                raise DataError(f"{sub} is a class of the {part} part only: the classes of train "
                                f"are {', '.join(self._classes[:20])}")
            inside = sorted(Path(base) / name for base, _, names in os.walk(sub) for name in names
                            if not name.startswith("."))
            images = [file for file in inside if file.suffix.lower() in ENDINGS]
            others += len(inside) - len(images)
            if not images:
                raise DataError(f"the class folder {sub} is empty: no file in it ends in "
                                f"{', '.join(sorted(ENDINGS))}; add images or remove the folder")
            files += images
            labels += [label_of[sub.name]] * len(images)
        if others:
            self.notes.append(f"ignored {others} files below {root} that do not end like an image")
        self._files[part], self._labels[part] = files, np.asarray(labels, dtype=np.int64)

    def describe(self) -> str:
        """Return the folder and its numbers of classes and images."""
        counts = ", ".join(f"{len(files)} {part} images" for part, files in self._files.items())
        return f"class folders in {self.location.folder} ({len(self._classes)} classes, {counts})"

    def identity(self) -> Any:
        """Return names, sizes and times of all images."""
        return self.file_identity(self.location.folder,
                             [file for files in self._files.values() for file in files])

    def class_names(self) -> tuple[str, ...]:
        """Return the names of the class folders."""
        return self._classes

    def labels(self, part: Part) -> np.ndarray:
        """Return the labels of a part, int64 of shape (n,)."""
        return self._labels[part]

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        """Return the files of images."""
        files = self._files[part]
        return (files[int(row)] for row in rows)

    def where(self, part: Part, row: int) -> str:
        """Return the file of one image."""
        return str(self._files[part][row])


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))
