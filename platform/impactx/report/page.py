"""The page around the blocks: one file for screen and print, without scripts or other resources."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined

from impactx.report.blocks import Block, Section


@cache
def _templates() -> Environment:
    """Return the package's templates; every text that they are given is escaped."""
    return Environment(loader=PackageLoader("impactx.report"), autoescape=True,
                       undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def html(block: Block) -> str:
    """Return a block as HTML."""
    return _templates().get_template(block.template).render(block=block)


def page(title: str, under: Sequence[str], head: Sequence[Block], sections: Sequence[Section]
         ) -> bytes:
    """Return the page.

    Args:
        title: The heading of the page.
        under: Lines below the title.
        head: Blocks before the list of contents.
        sections: All that follows.
    """
    return _templates().get_template("page.html").render(
        title=title, under=under, head=head, sections=sections).encode()
