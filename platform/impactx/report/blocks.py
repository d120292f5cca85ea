"""What a page is made of. Only `html` here writes markup, and it escapes every text it is given."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Literal

from impactx.report.numbers import NONE


@dataclass(frozen=True)
class Text:
    """A paragraph. kind: plain, lead (the sentence of a cell), note (small) or warning."""

    text: str
    kind: Literal["plain", "lead", "note", "warning"] = "plain"


@dataclass(frozen=True)
class Items:
    """A list of texts."""

    texts: Sequence[str]
    kind: Literal["plain", "warning"] = "plain"


@dataclass(frozen=True)
class Code:
    """Lines to be copied; closed: behind a line that opens them."""

    text: str
    closed: str = ""


@dataclass(frozen=True)
class Table:
    """Texts in columns. name: of its CSV file; numeric: columns aligned right; strong: rows to be set bold;
    shown_rows: so many stand on the page, all in the file.
    """

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: frozenset[int] = frozenset()
    strong: frozenset[int] = frozenset()
    caption: str = ""
    shown_rows: int | None = None

    def csv(self) -> bytes:
        """The table as a file; what is a typographer's minus or a dash for "none" on the page is plain there."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows(
            [["" if cell == NONE else cell.replace("−", "-") for cell in row] for row in (self.head, *self.rows)])
        return stream.getvalue().encode()


@dataclass(frozen=True)
class Figure:
    """A picture. name: of its PNG file; alt: what is seen, for who cannot see it; width: in CSS pixels."""

    name: str
    png: bytes
    alt: str
    caption: str = ""
    width: int = 900


Block = Text | Items | Code | Table | Figure


@dataclass
class Section:
    """A heading and what follows; level 1: in the list of contents."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 1

    @property
    def anchor(self) -> str:
        """Its name in the page's addresses."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


def html(block: Block) -> str:
    """A block as HTML."""
    match block:
        case Text(text, kind):
            return f'<p class="{kind}">{escape(text)}</p>'
        case Items(texts, kind):
            return f'<ul class="{kind}">' + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
        case Code(text, closed):
            code = f"<pre>{escape(text)}</pre>"
            return f"<details><summary>{escape(closed)}</summary>{code}</details>" if closed else code
        case Table():
            return _table(block)
        case Figure(name, png, alt, caption, width):
            data = base64.b64encode(png).decode()
            below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
            return (f'<figure id="{escape(name, quote=True)}"><img src="data:image/png;base64,{data}" '
                    f'alt="{escape(alt, quote=True)}" style="width:{width}px">{below}</figure>')
    raise TypeError(f"no block: {block!r}")


def _table(table: Table) -> str:
    # A column without a single value is in the file, and no use to a reader.
    columns = [i for i in range(len(table.head)) if not table.rows or any(row[i] != NONE for row in table.rows)]

    def row(cells: Sequence[str], tag: str, strong: bool = False) -> str:
        inner = "".join(f'<{tag}{" class=number" if i in table.numeric else ""}>{escape(cells[i])}</{tag}>'
                        for i in columns)
        return f"<tr{' class=strong' if strong else ''}>{inner}</tr>"

    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    body = "".join(row(cells, "td", i in table.strong) for i, cells in enumerate(table.rows[:table.shown_rows]))
    return (f'<div class="wide"><table>{caption}<thead>{row(table.head, "th")}</thead><tbody>{body}</tbody></table>'
            "</div>")
