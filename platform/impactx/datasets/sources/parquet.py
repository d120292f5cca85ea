"""A folder of Parquet files in the layout of the Hugging Face hub.

Files are named train-00000-of-00004.parquet (or train.parquet; the hub's older exports add a hash,
as in train-00000-of-00001-1359597a978bc4fa.parquet), and test-... likewise; or, as in the hub's own
conversions, train/0000.parquet and test/0000.parquet. They lie in the folder itself, in data/, or
in its only subfolder that holds any (default/train/0000.parquet). A row has the image in `img` or
`image` (encoded bytes, or a struct {bytes, path}) and the label in `label`, `fine_label` or
`labels`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import PrivateAttr

from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Source
from impactx.settings.extensions import source

T = TypeVar("T")
IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
ROWS = 64  # read at a time
PARQUET_FILES = "Parquet files (train-*.parquet or train/0000.parquet)"  # for messages

_SHARD = re.compile(
    r"(?P<split>.+?)(?:-(?P<index>\d+)-of-(?P<count>\d+)(?P<hash>-[0-9a-f]+)?)?\.parquet",
    re.DOTALL)
_CONVERTED = re.compile(r"\d+\.parquet")  # below a folder that has the split's name


def find_parquet(folder: Path) -> Path | None:
    """Return the folder that holds the train files, None if there is none.

    Args:
        folder: It may be this folder, its subfolder `data`, or any one other subfolder.

    Raises:
        DataError: Several subfolders hold train files.
    """
    for candidate in (folder, folder / "data"):
        if candidate.is_dir() and any(_split_of(p) == "train" for p in _files(candidate)):
            return candidate
    if not folder.is_dir():
        return None
    holders = [sub for sub in sorted(folder.iterdir())
               if sub.is_dir() and not sub.name.startswith(".")
               and any(_split_of(p) == "train" for p in _files(sub))]
    if len(holders) > 1:
        raise DataError(f"several folders in {folder} hold train-*.parquet: "
                        f"{', '.join(p.name for p in holders)}; set `path` of the data set to one "
                        "of them")
    return holders[0] if holders else None


@source
class Parquet(Source):
    """Parquet files in the layout of the Hugging Face hub: train-*.parquet, test-*.parquet.

    Images lie in the column `img` or `image`, labels in `label`, `fine_label` or `labels`.
    """

    kind: Literal["parquet"] = "parquet"
    _folder: Path = PrivateAttr(Path())
    _files: dict[Part, list[Path]] = PrivateAttr(default_factory=dict)
    _starts: dict[Part, list[int]] = PrivateAttr(default_factory=dict)
    _columns: tuple[str, str] | None = PrivateAttr(None)
    _names: tuple[str, ...] | None = PrivateAttr(None)

    @property
    def has_test(self) -> bool:
        """Whether there are test-*.parquet."""
        return "test" in self._files

    def list_files(self) -> None:
        """List the files of both parts, in the order of their names.

        Raises:
            DataError: There are none, or not as many as their names promise.
        """
        self.location.check_path()
        folder = find_parquet(self.location.folder)
        if folder is None:
            raise self.location.absent([PARQUET_FILES])
        self._folder = folder
        splits: dict[str, list[Path]] = {}
        for file in _files(folder):
            splits.setdefault(_split_of(file), []).append(file)
        parts: tuple[Part, ...] = ("train", "test")
        self._files = {part: splits.pop(part) for part in parts if part in splits}
        for files in self._files.values():
            _check_complete(files)
        if splits:
            self.notes.append("ignored Parquet files of other splits: " + ", ".join(
                f"{name} ({len(files)})" for name, files in sorted(splits.items())))

    def describe(self) -> str:
        """Return the folder and its numbers of files."""
        counts = ", ".join(f"{len(files)} {part}" for part, files in self._files.items())
        return f"Parquet files in {self._folder} ({counts})"

    def identity(self) -> Any:
        """Return names, sizes and times of all files."""
        return self.file_identity(self._folder,
                             [file for files in self._files.values() for file in files])

    def class_names(self) -> tuple[str, ...] | None:
        """Return the names that the hub's `datasets` library wrote into the files, if it did."""
        self._image_and_label()
        return self._names

    def labels(self, part: Part) -> np.ndarray:
        """Return the labels of a part, int64 of shape (n,).

        Raises:
            DataError: A file is damaged or lacks a label.
        """
        import pyarrow.compute as pc

        _, column = self._image_and_label()
        labels = []
        for file in self._files[part]:
            values = _guard(file, partial(_column, file, column))
            if values.null_count:
                row = pc.index(pc.is_null(values), True).as_py()
                raise DataError(f"{file}, row {row}: the label ({column!r}) is missing")
            labels.append(values.to_numpy().astype(np.int64))
        return np.concatenate(labels)

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        """Return the encoded bytes of images; row groups are read one batch at a time.

        Raises:
            DataError: A file is damaged or lacks an image.
        """
        column, _ = self._image_and_label()
        for file, start in zip(self._files[part], self._starts[part], strict=True):
            position = start
            batches = _guard(file, partial(_batches, file, column))
            while True:
                batch = _guard(file, partial(next, batches, None))
                if batch is None:
                    break
                end = position + len(batch)
                inside = rows[np.searchsorted(rows, position):np.searchsorted(rows, end)]
                cells = _bytes_of(batch.column(0))
                for row in inside:
                    cell = cells[int(row) - position].as_py()
                    if cell is None:
                        raise DataError(f"{self.where(part, int(row))}: column {column!r} holds no "
                                        "bytes (a path alone is not enough: embed the images)")
                    yield cell
                position = end

    def where(self, part: Part, row: int) -> str:
        """Return the file of one image and the row in it."""
        self._image_and_label()
        index = bisect_right(self._starts[part], row) - 1
        return f"{self._files[part][index]}, row {row - self._starts[part][index]}"

    def _image_and_label(self) -> tuple[str, str]:
        """Return the names of both columns, after all files' footers have been read, once."""
        if self._columns is not None:
            return self._columns
        first = self._files["train"][0]
        names: dict[Path, tuple[str, ...] | None] = {}
        starts: dict[Part, list[int]] = {}
        columns: tuple[str, str] | None = None
        for part, files in self._files.items():
            starts[part], position = [], 0
            for file in files:
                opened, schema = _guard(file, partial(_opened, file))
                columns = columns or (_find(schema.names, IMAGE_COLUMNS, "image", file),
                                      _find(schema.names, LABEL_COLUMNS, "label", file))
                for column in columns:
                    if column not in schema.names:
                        raise DataError(f"{file} has no column {column!r}, which {first} has: it "
                                        f"has {', '.join(schema.names)}")
                _check_types(schema, *columns, file)
                own = names[file] = _class_names(schema.metadata, columns[1])
                if own is not None and names[first] is not None and own != names[first]:
                    raise DataError(f"the class names in {file} differ from those in {first}: the "
                                    "same label would mean two classes")
                starts[part].append(position)
                position += opened.metadata.num_rows
        assert columns is not None  # there is a train file
        self._starts, self._names, self._columns = starts, names[first], columns
        return columns


def _files(folder: Path) -> list[Path]:
    named = [p for p in folder.glob("*.parquet") if not p.name.startswith(".")]
    converted = [p for p in folder.glob("*/*.parquet") if _CONVERTED.fullmatch(p.name)]
    return sorted([*named, *converted])


def _split_of(file: Path) -> str:
    return file.parent.name if _CONVERTED.fullmatch(file.name) else _shard(file)["split"]


def _shard(file: Path) -> re.Match[str]:
    match = _SHARD.fullmatch(file.name)
    assert match is not None  # every name that ends in .parquet matches
    return match


def _check_complete(files: list[Path]) -> None:
    """Raise DataError unless the files are all shards that their names promise, of one export."""
    folder = files[0].parent
    converted = all(_CONVERTED.fullmatch(file.name) for file in files)
    shards = [_shard(file) for file in files]
    numbers = [int(shard["split" if converted else "index"] or 0) for shard in shards]
    if len({file.parent for file in files}) > 1 or len(set(numbers)) < len(files) or len(
            {shard["count"] for shard in shards}) > 1:
        raise DataError(f"{folder} mixes files of several exports of one split: "
                        f"{', '.join(file.name for file in files[:6])}; keep one export")
    one = shards[0]
    if converted:
        total, form = max(numbers) + 1, f"{{:0{len(one['split'])}d}}.parquet"
    elif one["count"] is None:
        return
    else:
        total = int(one["count"])
        form = (f"{one['split']}-{{:0{len(one['index'])}d}}-of-{one['count']}"
                f"{'-*' if one['hash'] else ''}.parquet")
    missing = [form.format(i) for i in range(total) if i not in numbers]
    if missing:
        more = " and more" if len(missing) > 5 else ""
        raise DataError(f"{folder} lacks {', '.join(missing[:5])}{more} ({len(files)} of {total} "
                        "files are there): copy the missing files")


def _open(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, buffer_size=1 << 20)


def _opened(file: Path) -> tuple[Any, Any]:
    opened = _open(file)
    return opened, opened.schema_arrow


def _column(file: Path, name: str) -> Any:
    return _open(file).read(columns=[name]).column(0)


def _batches(file: Path, name: str) -> Iterator[Any]:
    return iter(_open(file).iter_batches(ROWS, columns=[name]))


def _guard(file: Path, read: Callable[[], T]) -> T:
    """Return read(); what pyarrow raises becomes a DataError that names the file."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file (truncated or damaged: {error}); "
                        "copy it again") from error


def _find(names: list[str], wanted: tuple[str, ...], content: str, file: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(f"{file} has no {content} column: expected one of {', '.join(wanted)}; it has "
                    f"{', '.join(names)}")


def _check_types(schema: Any, image: str, label: str, file: Path) -> None:
    import pyarrow as pa

    stored = encoded = schema.field(image).type
    if pa.types.is_struct(stored) and stored.get_field_index("bytes") >= 0:
        encoded = stored.field("bytes").type
    if not (pa.types.is_binary(encoded) or pa.types.is_large_binary(encoded)):
        raise DataError(f"column {image!r} of {file} holds {stored}, expected encoded images as "
                        "bytes or as a struct {bytes, path}")
    stored = schema.field(label).type
    if not pa.types.is_integer(stored):
        raise DataError(f"column {label!r} of {file} holds {stored}, expected integers 0..K-1")


def _bytes_of(column: Any) -> Any:
    """Return the encoded bytes of an image column, whether plain or in a struct."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """Return the names that the hub's `datasets` library wrote beside the schema, if it did."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(str(name) for name in feature["names"])
    except (KeyError, TypeError, ValueError):
        return None
