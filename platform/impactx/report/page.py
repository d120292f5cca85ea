"""The page around the blocks: one file, no script, nothing loaded from elsewhere; made for screen and print."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from impactx.report.blocks import Section, html

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --blue: #0072b2; --warm: #9a3b00; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, "Liberation Sans", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 40px 28px 80px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -.01em; }
h2 { font-size: 22px; margin: 56px 0 12px; padding-top: 14px; border-top: 2px solid var(--ink); }
h3 { font-size: 17px; margin: 34px 0 8px; }
p { margin: 8px 0 12px; max-width: 78ch; }
p.under, p.note, figcaption, caption { color: var(--soft); font-size: 14px; }
p.lead { font-size: 17px; border-left: 4px solid var(--blue); padding: 2px 0 2px 16px; margin: 16px 0; }
p.warning, ul.warning { border-left: 4px solid var(--warm); background: #fff6ef; padding: 10px 16px; margin: 14px 0; }
ul { padding-left: 22px; max-width: 78ch; } ul.warning { padding-left: 34px; } li { margin: 3px 0; }
nav { margin: 22px 0 0; font-size: 14px; display: flex; flex-wrap: wrap; gap: 6px 18px; }
a { color: var(--blue); }
.wide { overflow-x: auto; margin: 16px 0 20px; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; min-width: 50%; }
caption { text-align: left; padding: 0 0 8px; caption-side: top; }
th, td { padding: 6px 12px 6px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td:last-child:not(.number) { white-space: normal; }
th { border-bottom: 1.5px solid var(--ink); font-weight: 600; white-space: normal; vertical-align: bottom; }
.number { text-align: right; } tr.strong td { font-weight: 650; }
figure { margin: 18px 0 26px; } img { max-width: 100%; height: auto; display: block; }
figcaption { margin-top: 8px; max-width: 86ch; }
pre { background: #f6f8fa; border: 1px solid var(--line); padding: 12px 14px;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, "Liberation Mono", monospace; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--blue); }
@media print {
  main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, table { break-inside: avoid; }
  nav { display: none; } body { font-size: 11pt; }
  .wide { overflow: visible; } table { font-size: 8pt; } th, td { padding-right: 6px; }
  td:not(.number) { white-space: normal; }
}
"""


def page(title: str, under: Sequence[str], head: Sequence[Section], sections: Sequence[Section]) -> bytes:
    """The page. under: lines below the title; head: sections that stand before the list of contents, untitled."""
    contents = "".join(f'<a href="#{s.anchor}">{escape(s.title)}</a>' for s in sections if s.level == 1)
    body = "".join(html(block) for section in head for block in section.blocks)
    rest = "".join(_section(section) for section in sections)
    lines = "".join(f'<p class="under">{escape(line)}</p>' for line in under)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
            f"<style>{_STYLE}</style></head>\n<body><main><h1>{escape(title)}</h1>{lines}{body}<nav>{contents}</nav>"
            f"{rest}</main></body></html>\n").encode()


def _section(section: Section) -> str:
    name = f' id="{section.anchor}"' if section.level == 1 else ""
    return (f"<h{section.level + 1}{name}>{escape(section.title)}</h{section.level + 1}>"
            + "\n".join(html(block) for block in section.blocks))
