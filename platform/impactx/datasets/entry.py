"""One decoded data set on disk: how it is written, fingerprinted and opened again.

An entry is a folder with <part>_images.npy (uint8, (N, H, W, 3)) and <part>_labels.npy (int64,
(N,)) for the parts train and (where there is one) test, and meta.json.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from impactx.datasets.cache import META, CacheDamaged, once_a_node
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part

# The version of the entry and of the decoding; a new number makes every entry anew. 2: EXIF
# orientations are followed. Fingerprints are of the content, so those of other images stay.
FORMAT = 2


@dataclass(frozen=True)
class ImageSet:
    """Images of one part with their labels.

    Attributes:
        images: uint8 of shape (N, H, W, 3), memory-mapped, read-only. The file is local: send the
            settings to another process and load there, not the array.
        labels: int64 of shape (N,) in 0..K-1, read-only.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def write_part(folder: Path, part: Part, labels: np.ndarray, blocks: Iterator[Sequence[np.ndarray]],
               class_names: Sequence[str]) -> dict[str, Any]:
    """Write images as they come.

    Args:
        folder: The entry.
        part: Its part.
        labels: int64 of shape (N,).
        blocks: Lists of images, uint8 (H, W, 3) of one shape; together N images.
        class_names: K names.

    Returns:
        The part's meta data: shape, and fingerprint (sha256 of shape, names, images and labels).

    Raises:
        DataError: The file system cannot hold the images; none was written then.
    """
    digest = hashlib.sha256()
    shape: tuple[int, ...] = ()
    with open(_images(folder, part), "xb") as file:
        for block in blocks:
            if not shape:
                shape = (len(labels), *block[0].shape)
                _check_space(folder, math.prod(shape))
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                digest.update(_head(shape, class_names))
            data = np.stack(block).tobytes()
            digest.update(data)
            file.write(data)
        _flush(file)
    digest.update(labels.astype("<i8").tobytes())
    with open(_labels(folder, part), "xb") as file:
        np.save(file, labels.astype(np.int64))
        _flush(file)
    return {"shape": list(shape), "fingerprint": digest.hexdigest()}


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Complete an entry.

    Args:
        folder: The entry.
        meta: A JSON object with the key "parts", {part: the value of `write_part`}.
    """
    with open(folder / META, "x", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **meta}, file, indent=1)
        _flush(file)


def read_meta(folder: Path) -> dict[str, Any]:
    """Return the meta data of an entry.

    Raises:
        CacheDamaged: They are unreadable, of another format, or a file has the wrong size.
    """
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise CacheDamaged(f"meta.json has the format {meta['format']}")
        for part, described in meta["parts"].items():
            for file, needed in ((_images(folder, part), math.prod(described["shape"])),
                                 (_labels(folder, part), described["shape"][0] * 8)):
                # A header stands before the values.
                if not needed < file.stat().st_size <= needed + 4096:
                    raise CacheDamaged(f"{file.name} has the wrong size")
        return dict(meta)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheDamaged(f"{type(error).__name__}: {error}") from error


def open_part(folder: Path, part: Part, meta: dict[str, Any], session: str = "") -> ImageSet:
    """Open one part, after its images and labels were compared with their fingerprint.

    Args:
        folder: The entry.
        part: Its part.
        meta: The value of `read_meta`.
        session: See `cache.once_a_node`: in the course of a job a node reads all of it once.

    Raises:
        CacheDamaged: The files do not hold what was written.
    """
    described = meta["parts"][part]
    try:
        images = np.load(_images(folder, part), mmap_mode="r")
        labels = np.load(_labels(folder, part))
    except (OSError, ValueError, EOFError) as error:
        raise CacheDamaged(f"{part}: {error}") from error
    if (list(images.shape) != described["shape"] or images.dtype != np.uint8
            or labels.dtype != np.int64 or labels.shape != images.shape[:1]):
        raise CacheDamaged(f"{part}: the arrays are not those that were written")

    def fingerprint() -> str:
        digest = hashlib.sha256(_head(images.shape, meta["class_names"]))
        with open(_images(folder, part), "rb") as file:
            file.seek(images.offset)
            hashlib.file_digest(file, lambda: digest)  # reads in blocks, and goes on with `digest`
        digest.update(labels.astype("<i8").tobytes())
        return digest.hexdigest()

    files = [_images(folder, part), _labels(folder, part)]
    if once_a_node(session, files, fingerprint) != described["fingerprint"]:
        raise CacheDamaged(f"{part}: the content is not what was written")
    labels.flags.writeable = False
    return ImageSet(images, labels)


def _head(shape: Sequence[int], class_names: Sequence[str]) -> bytes:
    """Return what a fingerprint begins with."""
    return json.dumps([list(shape), list(class_names)]).encode()


def _images(folder: Path, part: str) -> Path:
    return folder / f"{part}_images.npy"


def _labels(folder: Path, part: str) -> Path:
    return folder / f"{part}_labels.npy"


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())  # or a crash of the machine could leave a renamed but empty file


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"the decoded images need {needed / 2**30:.1f} GiB, {folder.parent} has "
                        f"{free / 2**30:.1f} GiB free: free some, or set `cache` to another folder")
