"""What a page consists of: texts, tables and figures. Each kind of block has a template."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from impactx.report.numbers import NONE


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        kind: "lead" is the sentence of a cell, "note" is small.
    """

    template: ClassVar[str] = "text.html"

    text: str
    kind: Literal["plain", "lead", "note", "warning"] = "plain"


@dataclass(frozen=True)
class Items:
    """A list of texts."""

    template: ClassVar[str] = "items.html"

    texts: Sequence[str]
    kind: Literal["plain", "warning"] = "plain"


@dataclass(frozen=True)
class Code:
    """Lines to be copied.

    Attributes:
        closed: A line that opens them when it is clicked; "" shows them at once.
    """

    template: ClassVar[str] = "code.html"

    text: str
    closed: str = ""


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns.

    Attributes:
        name: The name of its CSV file, without the ending.
        numeric: The columns that are aligned to the right.
        strong: The rows that are set in bold.
        shown_rows: The number of rows that the page shows; the file has all. None shows all.
    """

    template: ClassVar[str] = "table.html"

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    caption: str = ""
    shown_rows: int | None = None

    @property
    def columns(self) -> list[int]:
        """The columns on the page: one without a single value is in the file alone."""
        return [i for i in range(len(self.head))
                if not self.rows or any(row[i] != NONE for row in self.rows)]

    def csv(self) -> bytes:
        """Return the table as a file, with a plain minus sign and nothing for an absent value."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(
            ["" if cell == NONE else cell.replace("−", "-") for cell in row]
            for row in (self.head, *self.rows))
        return stream.getvalue().encode()


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        name: The name of its PNG file.
        png: The content of the file.
        alt: What is to be seen, for readers who cannot see it.
        width: In CSS pixels.
    """

    template: ClassVar[str] = "figure.html"

    name: str
    png: bytes
    alt: str
    caption: str = ""
    width: int = 900

    @property
    def data(self) -> str:
        """The picture in base 64."""
        return base64.b64encode(self.png).decode()


Block = Text | Items | Code | Table | Figure


@dataclass
class Section:
    """A heading and the blocks below it.

    Attributes:
        level: Sections of level 1 stand in the list of contents.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 1

    @property
    def anchor(self) -> str:
        """The name of the heading in addresses of the page."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")
