"""Any class of torchvision.datasets that holds its images as CIFAR10 does, by its name."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import os
import shutil
import tarfile
from collections.abc import Iterator
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from filelock import FileLock
from pydantic import AfterValidator, Field, PrivateAttr

from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Progress, Source, SourceFinder
from impactx.settings.extensions import source


class Layout(NamedTuple):
    """Where a class of torchvision keeps its files.

    Attributes:
        folder: The class's own folder below the one that torchvision is given.
        files: Names in it without which torchvision refuses to read; empty if the class does not
            list them.
    """

    folder: str
    files: tuple[str, ...]


# What `_layout` reads from these classes. It stands here because importing torchvision takes each
# process a second, and the data sets of the paper need none of it once they are decoded.
LAYOUTS = {
    "CIFAR10": Layout("cifar-10-batches-py", (
        "data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5",
        "test_batch", "batches.meta")),
    "CIFAR100": Layout("cifar-100-python", ("train", "test", "meta")),
    "STL10": Layout("stl10_binary", (
        "train_X.bin", "train_y.bin", "unlabeled_X.bin", "test_X.bin", "test_y.bin",
        "class_names.txt")),
}


@cache
def class_names() -> tuple[str, ...]:
    """Return the names of all classes of torchvision.datasets, without importing it."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return ()
    text = Path(spec.submodule_search_locations[0], "datasets", "__init__.py").read_text("utf-8")
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            return tuple(ast.literal_eval(node.value))
    return ()


def check_class(name: str) -> str:
    """Return the name of a class of torchvision.datasets as it is.

    Raises:
        ValueError: There is no such class; the message offers close names.
    """
    names = class_names()
    if name not in names:
        folded = {other.lower(): other for other in names}
        close = [folded[c] for c in difflib.get_close_matches(name.lower(), folded, n=3)]
        offer = (f"did you mean {' or '.join(close)}?" if close
                 else "some are CIFAR10, STL10 and MNIST")
        raise ValueError(f"torchvision.datasets has no such class; {offer}")
    return name


TorchvisionClass = Annotated[str, AfterValidator(check_class)]


@source
class Torchvision(Source):
    """A data set as torchvision downloads and reads it.

    It may be any class of torchvision.datasets that takes `root`, `train` (or `split`) and
    `download`, and keeps all its images in the array `data` and their labels in `targets` (or
    `labels`): CIFAR10, CIFAR100, STL10, MNIST, FashionMNIST, SVHN, USPS and others. Grey images
    become RGB. The files lie in data_root/torchvision, or in `path`.
    """

    kind: Literal["torchvision"] = "torchvision"
    dataset: TorchvisionClass = Field(
        description="The name of a class of torchvision.datasets, for instance CIFAR10.")
    download: bool = Field(True, description="Torchvision downloads the files that are absent.")
    _base: Path = PrivateAttr(Path())
    _folder: Path = PrivateAttr(Path())
    _missing: list[str] = PrivateAttr(default_factory=list)
    _loaded: dict[Part, tuple[np.ndarray, np.ndarray]] = PrivateAttr(default_factory=dict)
    _names: tuple[str, ...] | None = PrivateAttr(None)

    @property
    def has_test(self) -> bool:
        """Always: a class without a test part is refused."""
        return True

    def offline(self) -> Self:
        """Return the same source, which downloads nothing."""
        return self.model_copy(update={"download": False})

    def remote_folders(self, name: str) -> list[tuple[str, SourceFinder]]:
        """Return the class's own folder below torchvision/."""
        return [(f"torchvision/{_layout(self.dataset).folder}", self)]

    def published_as(self) -> str:
        """Return the name of the class."""
        return self.dataset

    def list_files(self) -> None:
        """Look for the class's files below the folder that torchvision is given.

        Raises:
            DataError: Some are absent and `download` is false, or the class cannot be used.
        """
        layout, place = _layout(self.dataset), self.location
        self._base = place.folder if place.path_given else place.data_root / "torchvision"
        if self._base.name == layout.folder and not (self._base / layout.folder).is_dir():
            self._base = self._base.parent  # `path` is the class's own folder
        self._folder = self._base / layout.folder
        self._missing = self._absent()
        if self._missing and not self.download:
            raise DataError(f"torchvision's {self.dataset} is not in {self._folder} (absent: "
                            f"{', '.join(self._missing)}) and `download` is false. "
                            f"{self._advice()}")

    def describe(self) -> str:
        """Return the class and its folder."""
        return (f"torchvision's {self.dataset} in {self._folder}"
                + (", to be downloaded" if self._missing else ""))

    def prepare(self, progress: Progress) -> None:
        """Download the files that are absent; of several processes, one does.

        Raises:
            DataError: The download fails.
        """
        if not self._missing:
            return
        try:
            self._base.mkdir(parents=True, exist_ok=True)
            with FileLock(self._base / f".{self.dataset}.lock"):
                if self._absent():
                    progress(f"downloading {self.dataset} to {self._base}")
                    self._download()
        except (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError) as error:
            raise DataError(f"{self.dataset} is not in {self._folder} (absent: "
                            f"{', '.join(self._missing)}) and could not be downloaded: {error}. "
                            f"{self._advice()}") from error
        self._missing = []

    def identity(self) -> Any:
        """Return names, sizes and times of the files that are read."""
        files = _layout(self.dataset).files or self._own_files()
        return self.file_identity(self._base, [self._folder / name for name in files
                                          if not name.startswith("unlabeled")])

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names that torchvision gives the classes, None if it gives none."""
        self._load("train")
        return self._names

    def labels(self, part: Part) -> np.ndarray:
        """Return the labels of a part, int64 of shape (n,)."""
        return self._load(part)[1]

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        """Return images as arrays, uint8 of shape (H, W, 3)."""
        images = self._load(part)[0]
        for row in rows:
            image = images[row]
            if image.ndim == 2:
                image = np.repeat(image[:, :, None], 3, axis=2)
            yield np.ascontiguousarray(image)

    def where(self, part: Part, row: int) -> str:
        """Return the folder and the number of one image."""
        return f"torchvision's {self.dataset} in {self._folder}, {part} image {row}"

    def _advice(self) -> str:
        return self.location.advice(
            "or let torchvision download it (download: true, on a machine with network access) "
            "and copy data_root/torchvision from there")

    def _own_files(self) -> list[str]:
        return sorted(p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*")
                      if p.is_file())

    def _absent(self) -> list[str]:
        layout = _layout(self.dataset)
        if layout.files:
            return [name for name in layout.files if not (self._folder / name).is_file()]
        return [] if self._folder.is_dir() and self._own_files() else ["all files"]

    def _download(self) -> None:
        if _layout(self.dataset).files:
            self._torchvision(self._base, "train", download=True)
            return
        # Nobody knows which files the class needs, so its folder must come whole or not at all.
        partial = self._folder.with_name(f".{self._folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for part in ("train", "test"):
            self._torchvision(partial, part, download=True)
        os.rename(partial, self._folder)

    def _load(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        if part not in self._loaded:
            self._loaded.clear()  # one part in memory at a time
            root = self._base if _layout(self.dataset).files else self._folder
            try:
                data = self._torchvision(root, part, download=False)
            except Exception as error:  # unpickling a damaged file raises nearly any type
                raise DataError(
                    f"torchvision cannot read its {self.dataset} in {self._folder} ({error}): "
                    "delete the folder and let it be downloaded again") from error
            images = _channels_last(getattr(data, "data", None), self.dataset)
            labels = np.asarray(getattr(data, "targets", getattr(data, "labels", None)))
            classes = getattr(data, "classes", None)
            self._names = None if classes is None else tuple(classes)
            self._loaded[part] = images, labels.astype(np.int64)
        return self._loaded[part]

    def _torchvision(self, root: Path, part: Part, download: bool) -> Any:
        cls = _class(self.dataset)
        chosen: dict[str, Any] = {"split": part} if "split" in _arguments(cls) else {
            "train": part == "train"}
        return cls(str(root), download=download, **chosen)


def _class(name: str) -> Any:
    import torchvision.datasets

    return getattr(torchvision.datasets, name)


def _arguments(cls: Any) -> set[str]:
    return set(inspect.signature(cls.__init__).parameters)


@cache
def _layout(name: str) -> Layout:
    """Return where a class keeps its files, as CIFAR10 or MNIST list them.

    A class that lists none (SVHN, USPS) gets a folder of its own, whose files are all its own.

    Raises:
        DataError: The class has not the arguments that CIFAR10 has.
    """
    if name in LAYOUTS:
        return LAYOUTS[name]
    cls = _class(name)
    arguments = _arguments(cls)
    if not {"root", "download"} <= arguments or not {"train", "split"} & arguments:
        raise DataError(f"torchvision's {name} does not take root, download and train (or split), "
                        "as CIFAR10 does: save its images as class folders or Parquet files")
    if all(hasattr(cls, attribute) for attribute in ("base_folder", "train_list", "test_list")):
        meta = getattr(cls, "meta", {}).get("filename") or getattr(cls, "class_names_file", None)
        listed = [file for file, *_ in (*cls.train_list, *cls.test_list)]
        return Layout(cls.base_folder, (*listed, *([meta] if meta else [])))
    if hasattr(cls, "resources") and hasattr(cls, "raw_folder"):
        return Layout(name, tuple(f"raw/{Path(file).stem}" for file, _ in cls.resources))
    return Layout(name, ())


def _channels_last(data: Any, name: str) -> np.ndarray:
    """Return torchvision's images as uint8 of shape (N, H, W, 3), or (N, H, W) if they are grey."""
    images = np.asarray(data)
    if images.ndim == 4 and images.shape[1] == 3 != images.shape[3]:  # as STL10 and SVHN keep them
        images = images.transpose(0, 2, 3, 1)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or (
            images.ndim == 4 and images.shape[3] != 3):
        kept = "no array" if data is None else f"{images.dtype} of shape {images.shape}"
        raise DataError(f"torchvision's {name} has {kept} as its `data`, not uint8 images of shape "
                        "(N, H, W, 3) or (N, H, W) as CIFAR10 and MNIST have: save its images as "
                        "class folders or Parquet files")
    return images
