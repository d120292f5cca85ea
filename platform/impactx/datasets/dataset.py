"""Loading a data set: open its source, decode it once, open what was decoded."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from impactx.datasets.cache import CacheDamaged, fetch
from impactx.datasets.entry import FORMAT, ImageSet, open_part, read_meta
from impactx.datasets.errors import DataError
from impactx.datasets.preparation import prepare
from impactx.datasets.remote import local_files, locate_remote
from impactx.datasets.sources.base import Location, Source, finder_of
from impactx.fetching import is_remote, node_cache
from impactx.settings import DatasetSettings


@dataclass(frozen=True)
class Dataset:
    """A decoded data set, as `load_dataset` returns it.

    Attributes:
        name: Its name in the settings.
        class_names: K names in the order of the labels.
        image_size: (H, W) in pixels.
        fingerprint: sha256 (hex) of the images, labels and class names of the training part. It
            follows the content, whatever file that came from.
        test_fingerprint: The same for the test part; "" if there is none (test_fraction None).
        notes: Sentences on what was converted, resized, drawn or left out.
        source: One line on the origin.
        folder: The folder of the decoded files.
        train: The training images, after the draws of subset and test part.
        session: See `load_dataset`.
        channels: Channels of an image; always 3.
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
    session: str = ""
    channels: int = 3

    @property
    def num_classes(self) -> int:
        """The number of classes K."""
        return len(self.class_names)

    def load_test(self) -> ImageSet:
        """Open the test images. This is the only place where they are read after decoding.

        Raises:
            DataError: There is no test part, or the decoded file was damaged since it was loaded.
        """
        if not self.test_fingerprint:
            raise DataError(f"the data set {self.name!r} has no test part ({self.source}), and "
                            "none was drawn: give it one, or set its test_fraction")
        try:
            return open_part(self.folder, "test", read_meta(self.folder), self.session)
        except CacheDamaged as damage:
            raise DataError(f"the decoded test images in {self.folder} are damaged ({damage}): "
                            "delete that folder, it is made anew from the source") from damage


def load_dataset(settings: DatasetSettings, data_root: str | Path,
                 cache: str | Path | None = None,
                 progress: Callable[[str], None] | None = None, *, limit: int | None = None,
                 session: str = "") -> Dataset:
    """Load a data set, decoding its parts if no cache holds them yet.

    Several processes may call this at once: one decodes, the others wait. A damaged cache is made
    anew.

    Args:
        settings: The data set.
        data_root: Folder of the data sets, local or shared; or an s3:// address, whose files are
            fetched into the cache once a node.
        cache: Local folder of decoded images. None: data_root/.cache, or where that cannot be
            written, impactx in the user's cache folder.
        progress: Called with one line now and then while something is decoded or downloaded.
        limit: Bytes that the cache may hold, see `cache.fetch`.
        session: Names the job's present start. The contents of files are checked once a node for
            all processes that give the same; "": by each process.

    Raises:
        DataError: There is a problem with the data; the message names the file, row or class.
    """
    say = progress or (lambda line: None)
    settings, data_root = local_files(settings, data_root, cache)
    source = _open_source(settings, data_root, session)
    source.prepare(say)
    folders = ([Path(cache).expanduser().absolute()] if cache is not None
               else [Path(data_root).expanduser().absolute() / ".cache", node_cache()])
    return fetch(folders, _key(settings, source),
                 read=lambda entry: _open(settings.name, entry, session),
                 build=lambda folder: prepare(source, settings, folder, say), say=say, limit=limit)


def locate(settings: DatasetSettings, data_root: str | Path) -> str:
    """Return in one line which data `load_dataset` would use.

    Nothing is read, decoded or downloaded.

    Raises:
        DataError: The data are absent or files of theirs are missing.
    """
    if (remote := locate_remote(settings, data_root)) is not None:
        return remote
    if is_remote(data_root):
        data_root = node_cache()
    return _open_source(settings, data_root).describe()


def without_downloads(settings: DatasetSettings) -> DatasetSettings:
    """Return the same data set from a source that downloads nothing."""
    return settings.model_copy(update={"source": finder_of(settings).offline()})


def _open_source(settings: DatasetSettings, data_root: str | Path, session: str = "") -> Source:
    return finder_of(settings).open(Location.of(settings, data_root, session))


def _open(name: str, entry: Path, session: str) -> Dataset:
    meta = read_meta(entry)
    parts = meta["parts"]
    height, width = parts["train"]["shape"][1:3]
    return Dataset(
        name=name, class_names=tuple(meta["class_names"]), image_size=(height, width),
        fingerprint=parts["train"]["fingerprint"],
        test_fingerprint=parts.get("test", {}).get("fingerprint", ""),
        notes=list(meta["notes"]), source=meta["source"], folder=entry,
        train=open_part(entry, "train", meta, session), session=session)


def _key(settings: DatasetSettings, source: Source) -> str:
    """Return the name of the cache's entry: it changes with everything that changes the images."""
    drawn = settings.subset is not None or not source.has_test
    inputs = {
        # The suffix keeps the entries that earlier versions made.
        "format": FORMAT, "source": f"{type(source).__name__}Source", "files": source.identity(),
        "num_classes": settings.num_classes, "image_size": settings.image_size,
        "subset": settings.subset,
        "test_fraction": None if source.has_test else settings.test_fraction,
        "seed": settings.split_seed if drawn else None}
    if not type(source).__module__.startswith("impactx."):  # for ours, FORMAT counts the changes
        inputs["code"] = _code(type(source))
    text = json.dumps(inputs, sort_keys=True)
    return f"{settings.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _code(cls: type[Source]) -> str:
    """Return the text of a user's file: what its source returned before an edit is not reused."""
    try:
        return Path(inspect.getfile(cls)).read_text(encoding="utf-8")
    except (OSError, TypeError):  # it was typed into an interpreter
        return cls.__qualname__
