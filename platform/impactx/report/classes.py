"""Accuracy of each class, and how far the scores can be believed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from impactx.report.blocks import Block, Figure, Section, Table, Text
from impactx.report.numbers import NONE, percent, points
from impactx.report.results import named
from impactx.report.style import figure, look, plain, png, shown

MOST_CLASSES, MOST_COMPARED = 20, 4  # classes that a picture can show, approaches whose differences are listed


def class_sections(export: Mapping[str, Any]) -> list[Section]:
    """For each cell: calibration of every approach, and accuracy by class."""
    facts = {(cell["dataset"], cell["model"]): cell["class_names"] for cell in export["cells"]}
    made = [Section("Classes and calibration", [Text(
        "Expected calibration error (ECE, 15 bins): how far the highest score is from the share of images that are "
        "right, in points; NLL: negative log likelihood of the true class, in nats. Smaller is better for both.")])]
    for cell in export["evidence"]["cells"]:
        if cell["approaches"]:
            made.append(Section(named(cell), _cell(cell, facts[cell["dataset"], cell["model"]]), level=2))
    return made if len(made) > 1 else []


def _cell(cell: Mapping[str, Any], names: list[str]) -> list[Block]:
    found, tail = cell["approaches"], f"{cell['dataset']}-{cell['model']}"
    calibration = [[shown(e["approach"]), percent(e["ece"]["mean"]), percent(e["ece"]["spread"]),
                    f"{e['nll']['mean']:.4f}", NONE if e["nll"]["spread"] is None else f"{e['nll']['spread']:.4f}"]
                   for e in found]
    compared = found[1:] if len(found) <= MOST_COMPARED else []
    rows = [[name, *(percent(e["per_class"][k], 1) for e in found),
             *(points(_difference(e, found[0], k), 1) for e in compared)] for k, name in enumerate(names)]
    head = ["class", *(f"{shown(e['approach'])} %" for e in found),
            *(f"{shown(e['approach'])} − {shown(found[0]['approach'])}" for e in compared)]
    blocks: list[Block] = [
        Table(f"calibration-{tail}", ["approach", "ECE (points)", "spread", "NLL (nats)", "spread"], calibration,
              frozenset({1, 2, 3, 4}))]
    if len(names) <= MOST_CLASSES:
        blocks.append(_dots(found, names, tail))
    return [*blocks, Table(f"classes-{tail}", head, rows, frozenset(range(1, len(head))),
                           caption="Accuracy of each class, mean over repeats"
                           + (f" (the first {MOST_CLASSES} of {len(rows)})" if len(rows) > MOST_CLASSES else ""),
                           shown_rows=MOST_CLASSES)]


def _difference(entry: Mapping[str, Any], base: Mapping[str, Any], k: int) -> float | None:
    ours, theirs = entry["per_class"][k], base["per_class"][k]
    return None if ours is None or theirs is None else ours - theirs


def _dots(found: list[Mapping[str, Any]], names: list[str], tail: str) -> Figure:
    made = figure(8.6, 0.9 + 0.27 * len(names))
    axes, approaches = made.subplots(), [e["approach"] for e in found]
    values = np.array([[np.nan if v is None else 100 * v for v in e["per_class"]] for e in found])
    for y, column in enumerate(values.T):
        if np.isfinite(column).any():
            axes.plot([np.nanmin(column), np.nanmax(column)], [y, y], color="#d0d7de", linewidth=3, zorder=1)
    for entry, row in zip(found, values, strict=True):
        style = look(entry["approach"], approaches) | {"linestyle": "none"}
        axes.plot(row, range(len(names)), **style, markersize=6.5, label=shown(entry["approach"]), zorder=2)
    axes.set_yticks(range(len(names)), [name if len(name) < 24 else name[:23] + "…" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("accuracy on the class's test images (%)")
    axes.legend(fontsize=8.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(4, len(found)))
    plain(axes, grid="x")
    return Figure(f"classes-{tail}.png", png(made), "Accuracy of each class for every approach", width=860)
