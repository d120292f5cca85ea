"""A folder of Parquet files in the layout of the Hugging Face hub.

Files are named train-00000-of-00004.parquet (or train.parquet; the hub's older exports add a hash, as in
train-00000-of-00001-1359597a978bc4fa.parquet), and test-... likewise; or, as in the hub's own conversions,
train/0000.parquet and test/0000.parquet. They lie in the folder itself, in data/, or in its only subfolder that
holds any (default/train/0000.parquet).  A row has the image in `img` or
`image` (encoded bytes, or a struct {bytes, path}) and the label in `label`, `fine_label` or `labels`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from impactx.datasets.decoding import Raw
from impactx.datasets.errors import DataError
from impactx.datasets.sources.base import Part, Source, file_identity

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("label", "fine_label", "labels")
ROWS = 64  # read at a time

_SHARD = re.compile(r"(?P<split>.+?)(?:-(?P<index>\d+)-of-(?P<count>\d+)(?P<hash>-[0-9a-f]+)?)?\.parquet")
_CONVERTED = re.compile(r"\d+\.parquet")  # below a folder that has the split's name


def find_parquet(folder: Path) -> Path | None:
    """The folder that holds the train files: `folder`, folder/data or one subfolder; None if none does.

    Raises DataError when several subfolders do.
    """
    for place in (folder, folder / "data"):
        if place.is_dir() and any(_split_of(p) == "train" for p in _files(place)):
            return place
    if not folder.is_dir():
        return None
    places = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and not sub.name.startswith(".")
              and any(_split_of(p) == "train" for p in _files(sub))]
    if len(places) > 1:
        raise DataError(f"several folders in {folder} hold train-*.parquet: "
                        f"{', '.join(p.name for p in places)}; set `path` of the data set to one of them")
    return places[0] if places else None


def parquet_names(folder: Path) -> list[str]:
    """All Parquet files at any depth of a folder, whatever their names, for a message."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.parquet"))


class ParquetSource(Source):
    """Reads the files in the order of their names; row groups are read one batch at a time."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place
        splits: dict[str, list[Path]] = {}
        for file in _files(place):
            splits.setdefault(_split_of(file), []).append(file)
        self.parts: dict[str, list[Path]] = {
            part: splits.pop(part) for part in ("train", "test") if part in splits}
        if "train" not in self.parts:
            raise DataError(f"no train-*.parquet in {place}")
        for files in self.parts.values():
            _check_complete(files)
        self.has_test = "test" in self.parts
        if splits:
            self.notes.append("ignored Parquet files of other splits: " + ", ".join(
                f"{name} ({len(files)})" for name, files in sorted(splits.items())))
        self._starts: dict[str, list[int]] = {}
        self._columns: tuple[str, str] | None = None
        self._names: tuple[str, ...] | None = None

    def describe(self) -> str:
        counts = ", ".join(f"{len(files)} {part}" for part, files in self.parts.items())
        return f"Parquet files in {self.place} ({counts})"

    def identity(self) -> Any:
        return file_identity(self.place, [file for files in self.parts.values() for file in files])

    def class_names(self) -> tuple[str, ...] | None:
        self._inspect()
        return self._names

    def labels(self, part: Part) -> np.ndarray:
        import pyarrow.compute as pc

        self._inspect()
        _, column = self._columns
        found = []
        for file in self.parts[part]:
            values = _guard(file, lambda file=file: _open(file).read(columns=[column]).column(0))
            if values.null_count:
                row = pc.index(pc.is_null(values), True).as_py()
                raise DataError(f"{file}, row {row}: the label ({column!r}) is missing")
            found.append(values.to_numpy().astype(np.int64))
        return np.concatenate(found)

    def images(self, part: Part, rows: np.ndarray) -> Iterator[Raw]:
        self._inspect()
        column, _ = self._columns
        for file, start in zip(self.parts[part], self._starts[part], strict=True):
            position = start
            batches = _guard(file, lambda file=file: _open(file).iter_batches(ROWS, columns=[column]))
            while True:
                batch = _guard(file, lambda batches=batches: next(batches, None))
                if batch is None:
                    break
                inside = rows[np.searchsorted(rows, position):np.searchsorted(rows, position + len(batch))]
                cells = _bytes_of(batch.column(0))
                for row in inside:
                    cell = cells[int(row) - position].as_py()
                    if cell is None:
                        raise DataError(f"{self.where(part, int(row))}: column {column!r} holds no bytes "
                                        "(a path alone is not enough: embed the images)")
                    yield cell
                position += len(batch)

    def where(self, part: Part, row: int) -> str:
        self._inspect()
        index = bisect_right(self._starts[part], row) - 1
        return f"{self.parts[part][index]}, row {row - self._starts[part][index]}"

    def _inspect(self) -> None:
        """Read the footers of all files once: columns, numbers of rows, class names."""
        if self._columns is not None:
            return
        first = self.parts["train"][0]
        names: dict[Path, tuple[str, ...] | None] = {}
        starts: dict[str, list[int]] = {}
        columns: tuple[str, str] | None = None
        for part, files in self.parts.items():
            starts[part], position = [], 0
            for file in files:
                opened = _guard(file, lambda file=file: _open(file))
                schema = _guard(file, lambda opened=opened: opened.schema_arrow)
                columns = columns or (_find(schema.names, IMAGE_COLUMNS, "image", file),
                                      _find(schema.names, LABEL_COLUMNS, "label", file))
                for column in columns:
                    if column not in schema.names:
                        raise DataError(f"{file} has no column {column!r}, which {first} has: it has "
                                        f"{', '.join(schema.names)}")
                _check_types(schema, *columns, file)
                names[file] = _class_names(schema.metadata, columns[1])
                if names[file] is not None and names[first] is not None and names[file] != names[first]:
                    raise DataError(f"the class names in {file} differ from those in {first}: the same label "
                                    "would mean two classes")
                starts[part].append(position)
                position += opened.metadata.num_rows
        self._starts, self._names, self._columns = starts, names[first], columns


def _files(place: Path) -> list[Path]:
    named = [p for p in place.glob("*.parquet") if not p.name.startswith(".")]
    return sorted([*named, *(p for p in place.glob("*/*.parquet") if _CONVERTED.fullmatch(p.name))])


def _split_of(file: Path) -> str:
    return file.parent.name if _CONVERTED.fullmatch(file.name) else _SHARD.fullmatch(file.name)["split"]


def _check_complete(files: list[Path]) -> None:
    """Every shard that '-of-00004' or a higher number promises must be there, once, and of one set only."""
    folder = files[0].parent
    converted = all(_CONVERTED.fullmatch(file.name) for file in files)
    shards = [_SHARD.fullmatch(file.name) for file in files]
    numbers = [int(shard["split" if converted else "index"] or 0) for shard in shards]
    if len({file.parent for file in files}) > 1 or len(set(numbers)) < len(files) or len(
            {shard["count"] for shard in shards}) > 1:
        raise DataError(f"{folder} mixes files of several exports of one split: "
                        f"{', '.join(file.name for file in files[:6])}; keep one export")
    one = shards[0]
    if converted:
        total, written = max(numbers) + 1, f"{{:0{len(one['split'])}d}}.parquet"
    elif one["count"] is None:
        return
    else:
        total, written = int(one["count"]), (f"{one['split']}-{{:0{len(one['index'])}d}}-of-{one['count']}"
                                             f"{'-*' if one['hash'] else ''}.parquet")
    missing = [written.format(i) for i in range(total) if i not in numbers]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''} "
                        f"({len(files)} of {total} files are there): copy the missing files")


def _open(file: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(file, buffer_size=1 << 20)


def _guard(file: Path, read: Any) -> Any:
    """Call read(); what pyarrow raises becomes a DataError that names the file."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is not a readable Parquet file (truncated or damaged: {error}); "
                        "copy it again") from error


def _find(names: list[str], wanted: tuple[str, ...], what: str, file: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise DataError(f"{file} has no {what} column: expected one of {', '.join(wanted)}; it has "
                    f"{', '.join(names)}")


def _check_types(schema: Any, image: str, label: str, file: Path) -> None:
    import pyarrow as pa

    found = kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(f"column {image!r} of {file} holds {found}, expected encoded images as bytes or as "
                        "a struct {bytes, path}")
    found = schema.field(label).type
    if not pa.types.is_integer(found):
        raise DataError(f"column {label!r} of {file} holds {found}, expected integers 0..K-1")


def _bytes_of(column: Any) -> Any:
    """The encoded bytes of an image column, whether plain or in a struct."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _class_names(metadata: dict[bytes, bytes] | None, column: str) -> tuple[str, ...] | None:
    """The names that the hub's `datasets` library wrote beside the schema, if it did."""
    try:
        feature = json.loads((metadata or {})[b"huggingface"])["info"]["features"][column]
        return tuple(str(name) for name in feature["names"])
    except (KeyError, TypeError, ValueError):
        return None
