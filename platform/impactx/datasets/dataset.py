"""Loading a data set: find its source, decode it once, open what was decoded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from impactx.datasets.cache import CacheDamaged, fetch
from impactx.datasets.entry import FORMAT, ImageSet, open_part, read_meta
from impactx.datasets.errors import DataError
from impactx.datasets.preparation import prepare
from impactx.datasets.remote import local_files, locate_remote
from impactx.datasets.sources import Source, find_source
from impactx.fetching import is_remote, node_cache
from impactx.settings import DatasetSettings


@dataclass(frozen=True)
class Dataset:
    """A decoded data set; made by `load_dataset`.

    name; class_names: K names in the order of the labels; image_size: (H, W).
    fingerprint, test_fingerprint: sha256 (hex) of images, labels and class names of a part: they follow
    the content, whatever file it came from; "" for a test part that there is not (test_fraction None).
    notes: what was converted, resized, drawn or left out.
    train: the training images (after the draws of subset and test part).  source: one line on the origin.
    folder: the decoded files.
    """

    name: str
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    fingerprint: str
    test_fingerprint: str
    notes: list[str]
    source: str
    folder: Path
    train: ImageSet
    channels: int = 3

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def load_test(self) -> ImageSet:
        """Open the test images. This is the only place where they are read after decoding.

        Raises DataError when there is none, or when the decoded file was damaged since it was loaded.
        """
        if not self.test_fingerprint:
            raise DataError(f"the data set {self.name!r} has no test part ({self.source}), and none was drawn: give it "
                            "one, or set its test_fraction")
        try:
            return open_part(self.folder, "test", read_meta(self.folder)["parts"]["test"])
        except CacheDamaged as damage:
            raise DataError(f"the decoded test images in {self.folder} are damaged ({damage}): delete that "
                            "folder, it is made anew from the source") from damage


def load_dataset(settings: DatasetSettings, data_root: str | Path, cache: str | Path | None = None,
                 progress: Callable[[str], None] | None = None) -> Dataset:
    """Load a data set, decoding its parts if no cache holds them yet.

    settings: what to load. data_root: folder of the data sets, local or shared; or an s3:// address, whose files
    are fetched into the cache once a node. cache: local folder of decoded images; None: data_root/.cache, or where
    that cannot be written, impactx in the user's cache folder.
    progress: called with one line now and then while something is decoded or downloaded.

    Several processes may call this at once: one decodes, the others wait. A damaged cache is made anew.
    Raises DataError for every problem with the data; the message names the file, row or class.
    """
    say = progress or (lambda line: None)
    settings, data_root = local_files(settings, data_root, cache)
    source = find_source(settings, data_root)
    source.prepare(say)
    folders = [Path(cache).expanduser().absolute()] if cache is not None else _default_caches(data_root)
    return fetch(folders, _key(settings, source),
                 read=lambda entry: _open(settings.name, entry),
                 build=lambda folder: prepare(source, settings, folder, say), say=say)


def locate(settings: DatasetSettings, data_root: str | Path) -> str:
    """Say in one line which data `load_dataset` would use. Nothing is read, decoded or downloaded.

    Raises DataError when the data are absent or files of theirs are missing.
    """
    if (found := locate_remote(settings, data_root)) is not None:
        return found
    if is_remote(data_root):
        data_root = node_cache()
    return find_source(settings, data_root).describe()


def _open(name: str, entry: Path) -> Dataset:
    meta = read_meta(entry)
    parts = meta["parts"]
    return Dataset(name=name, class_names=tuple(meta["class_names"]),
                   image_size=tuple(parts["train"]["shape"][1:3]), fingerprint=parts["train"]["fingerprint"],
                   test_fingerprint=parts.get("test", {}).get("fingerprint", ""), notes=list(meta["notes"]),
                   source=meta["source"], folder=entry, train=open_part(entry, "train", parts["train"]))


def _key(settings: DatasetSettings, source: Source) -> str:
    """Name of the cache entry: the source's files and every setting that changes what is decoded."""
    drawn = settings.subset is not None or not source.has_test
    about = {"format": FORMAT, "source": type(source).__name__, "files": source.identity(),
             "num_classes": settings.num_classes, "image_size": settings.image_size,
             "subset": settings.subset,
             "test_fraction": None if source.has_test else settings.test_fraction,
             "seed": settings.split_seed if drawn else None}
    return f"{settings.name}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"


def _default_caches(data_root: str | Path) -> list[Path]:
    return [Path(data_root).expanduser().absolute() / ".cache", node_cache()]
