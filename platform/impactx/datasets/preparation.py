"""Decoding a source into an entry of the cache: its labels are checked, its draws made."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from impactx.datasets.decoding import decode_blocks
from impactx.datasets.entry import write_meta, write_part
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Source
from impactx.datasets.splits import stratified_draw
from impactx.settings import DatasetSettings

SECONDS_BETWEEN_LINES = 2.0

Rows = dict[Part, tuple[Part, np.ndarray]]
"""For each part that is written: the source's part it is taken from, and the ascending rows there.
"""
Blocks = Iterator[list[np.ndarray]]


def prepare(source: Source, settings: DatasetSettings, folder: Path,
            say: Callable[[str], None]) -> None:
    """Decode the training part of a source, and its test part as far as it has or gets one.

    Args:
        source: The opened source.
        settings: The data set.
        folder: The empty folder into which the entry is written.
        say: Takes a line for people to read.

    Raises:
        DataError: There is something wrong with the data. Labels are checked before images, and
            the first error is reported.
    """
    names, labels = _labels(source, settings)
    rows, notes = _rows(source, settings, labels, names)
    parts: dict[str, Any] = {}
    first = _First()
    for part, (origin, chosen) in rows.items():
        kinds: Counter[str] = Counter()
        sizes: Counter[tuple[int, int]] = Counter()
        turned: Counter[bool] = Counter()

        def where(position: int, origin: Part = origin, chosen: np.ndarray = chosen) -> str:
            return source.where(origin, int(chosen[position]))

        raws = source.images(origin, chosen)
        blocks = decode_blocks(raws, where, settings.image_size, kinds, sizes, turned)
        blocks = _complete(blocks, len(chosen), source)
        blocks = _one_size(blocks, where, first)
        blocks = _told(blocks, len(chosen), f"{settings.name}: {part} images", say)
        parts[part] = write_part(folder, part, labels[origin][chosen], blocks, names)
        notes += [f"{count} {part} images of kind {kind} were converted to RGB"
                  for kind, count in sorted(kinds.items())]
        if turned:
            notes.append(
                f"{turned.total()} {part} images were turned as their EXIF orientation says")
        if sizes:
            common = ", ".join(f"{height}x{width}" for (height, width), _ in sizes.most_common(3))
            others = " and other sizes" if len(sizes) > 3 else ""
            notes.append(f"{sizes.total()} {part} images of {common}{others} were resized to "
                         f"{settings.image_size}x{settings.image_size} (image_size)")
    write_meta(folder, {"name": settings.name, "class_names": list(names), "parts": parts,
                        "notes": source.notes + notes, "source": source.describe()})


def _labels(source: Source, settings: DatasetSettings
            ) -> tuple[tuple[str, ...], dict[Part, np.ndarray]]:
    """Return class names and checked labels of the source's own parts."""
    own: tuple[Part, ...] = ("train", "test") if source.has_test else ("train",)
    labels = {part: _vector(source, part) for part in own}
    names, counted = source.class_names(), ""
    if names is None:
        largest = int(labels["train"].argmax())
        count = settings.num_classes or int(labels["train"][largest]) + 1
        if settings.num_classes is None and count > len(labels["train"]):
            raise DataError(
                f"{source.where('train', largest)}: the label {count - 1} means {count} classes, "
                f"but there are {len(labels['train'])} training images: labels must be 0..K-1")
        names = tuple(str(label) for label in range(count))
        if settings.num_classes is None:  # then one wrong label looks like many empty classes
            counted = (f". {count} classes were counted, from the largest label: {count - 1} in "
                       f"{source.where('train', largest)}; correct it if it is wrong, or set "
                       "num_classes")
    if settings.num_classes not in (None, len(names)):
        raise DataError(f"{source.describe()} has {len(names)} classes, but num_classes is "
                        f"{settings.num_classes}: correct or remove num_classes")
    if len(set(names)) < len(names):
        raise DataError(f"{source.describe()} names two classes alike: {', '.join(names[:20])}")
    for part, values in labels.items():
        wrong = np.flatnonzero((values < 0) | (values >= len(names)))
        if len(wrong):
            raise DataError(
                f"{source.where(part, int(wrong[0]))}: label {values[wrong[0]]} is outside "
                f"0..{len(names) - 1} ({len(wrong)} such {part} labels)")
    if len(names) < 2:
        raise DataError(f"{source.describe()} has {len(names)} class: a classifier needs at least "
                        "2")
    counts = np.bincount(labels["train"], minlength=len(names))
    if not counts.all():
        empty = int(counts.argmin())
        raise DataError(f"{source.describe()} has no training image of class {names[empty]!r} "
                        f"(label {empty} of 0..{len(names) - 1}): every class needs some{counted}")
    return names, labels


def _vector(source: Source, part: Part) -> np.ndarray:
    """Return the labels of a part, int64 of shape (n,) with n > 0."""
    labels = np.asarray(source.labels(part))
    if not labels.size:
        raise DataError(f"{source.describe()}: the {part} part holds no image")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{source.describe()}: the labels of the {part} part must be integers of "
                        f"shape (n,), not {labels.dtype} of shape {labels.shape}")
    return labels.astype(np.int64)


def _rows(source: Source, settings: DatasetSettings, labels: dict[Part, np.ndarray],
          names: tuple[str, ...]) -> tuple[Rows, list[str]]:
    """Return which rows become training and test part, and notes on the draws."""
    notes = []
    rows: Rows = {}
    train = np.arange(len(labels["train"]), dtype=np.int64)
    if source.has_test:
        rows["test"] = ("test", np.arange(len(labels["test"]), dtype=np.int64))
        counts = np.bincount(labels["test"], minlength=len(names))
        absent = [names[c] for c in np.flatnonzero(counts == 0)]
        if absent:
            notes.append(f"classes without test images: {', '.join(absent)}")
    elif settings.test_fraction is None:
        notes.append("no test part of its own, and none is drawn: all images are taken")
    else:
        count = round(len(train) * settings.test_fraction)
        drawn = _draw(labels["train"], count, settings.split_seed,
                      f"test_fraction {settings.test_fraction}")
        train = np.setdiff1d(train, drawn)
        left = np.bincount(labels["train"][train], minlength=len(names))
        if not left.all():
            raise DataError(
                f"{source.describe()}: a test_fraction of {settings.test_fraction} leaves no "
                f"training image of class {names[int(left.argmin())]!r}: lower it or add images")
        rows["test"] = ("train", drawn)
        notes.append(f"no test part of its own: {len(drawn)} images drawn by split_seed "
                     f"{settings.split_seed}")
    if settings.subset is not None and settings.subset < len(train):
        notes.append(f"subset: {settings.subset} of {len(train)} training images, drawn by "
                     f"split_seed {settings.split_seed}")
        train = train[_draw(labels["train"][train], settings.subset, settings.split_seed,
                            f"subset {settings.subset}")]
    elif settings.subset is not None:
        notes.append(f"subset of {settings.subset}: there are {len(train)} training images, all "
                     "are used")
    return {"train": ("train", train), **rows}, notes


def _draw(labels: np.ndarray, count: int, seed: int, setting: str) -> np.ndarray:
    try:
        return stratified_draw(labels, count, seed)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from None


class _First:
    """The shape and the name of the first image of all parts."""

    shape: tuple[int, ...] = ()
    name = ""


def _complete(blocks: Blocks, total: int, source: Source) -> Blocks:
    """Pass blocks; raise DataError unless they hold as many images as the source was asked for."""
    done = 0
    for block in blocks:
        done += len(block)
        yield block
    if done != total:
        raise DataError(f"{source.describe()}: the data source {source.kind!r} gave {done} images "
                        f"where {total} were asked for")


def _one_size(blocks: Blocks, where: Callable[[int], str], first: _First) -> Blocks:
    """Pass blocks; raise DataError unless their images have the size of the very first image."""
    position = 0
    for block in blocks:
        for image in block:
            if not first.shape:
                first.shape, first.name = image.shape, where(0)
            if image.shape != first.shape:
                raise DataError(
                    f"{where(position)} has {image.shape[0]}x{image.shape[1]} pixels (height x "
                    f"width), {first.name} has {first.shape[0]}x{first.shape[1]}: all images must "
                    "have one size; set image_size to resize them")
            position += 1
        yield block


def _told(blocks: Blocks, total: int, content: str, say: Callable[[str], None]) -> Blocks:
    """Pass blocks, and report the progress now and then."""
    done, start = 0, time.monotonic()
    last = start
    for block in blocks:
        yield block
        done += len(block)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES and done < total:
            last, left = now, (now - start) / done * (total - done)
            say(f"{content}: {done:,} of {total:,} decoded, about {left:.0f} s left")
    say(f"{content}: {total:,} decoded in {time.monotonic() - start:.1f} s")
