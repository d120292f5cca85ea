"""The accuracy of each class, and how well the scores are calibrated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from impactx.report.blocks import Block, Figure, Section, Table, Text
from impactx.report.numbers import NONE, percent, points
from impactx.report.results import title
from impactx.report.style import figure, look, plain, png, shown
from impactx.results.evidence_records import ApproachEvidence, CellEvidence
from impactx.results.export import JobExport

MOST_CLASSES = 20  # that a picture can show
MOST_COMPARED = 4  # approaches whose differences are listed


def class_sections(export: JobExport) -> list[Section]:
    """Return the calibration of every approach and the accuracy of each class, by cell.

    Args:
        export: The job.
    """
    class_names = {(cell.dataset, cell.model): cell.class_names for cell in export.cells}
    sections = [Section(title(cell), _cell(cell, class_names[cell.dataset, cell.model]), level=2)
                for cell in export.evidence.cells if cell.approaches]
    head = Section("Classes and calibration", [Text(
        "The expected calibration error (ECE, 15 bins) says how far the highest score is from the "
        "share of images that are classified correctly, in points. NLL is the negative log "
        "likelihood of the true class, in nats. Smaller is better for both.")])
    return [head, *sections] if sections else []


def _cell(cell: CellEvidence, names: Sequence[str]) -> list[Block]:
    entries, suffix = cell.approaches, f"{cell.dataset}-{cell.model}"
    calibration = [
        [shown(entry.approach), percent(entry.ece.mean), percent(entry.ece.spread),
         f"{entry.nll.mean:.4f}", NONE if entry.nll.spread is None else f"{entry.nll.spread:.4f}"]
        for entry in entries]
    first = entries[0]
    compared = entries[1:] if len(entries) <= MOST_COMPARED else []
    rows = [[name, *(percent(entry.per_class[k], 1) for entry in entries),
             *(points(_difference(entry, first, k), 1) for entry in compared)]
            for k, name in enumerate(names)]
    head = ["class", *(f"{shown(entry.approach)} %" for entry in entries),
            *(f"{shown(entry.approach)} − {shown(first.approach)}" for entry in compared)]
    blocks: list[Block] = [Table(
        f"calibration-{suffix}", ["approach", "ECE (points)", "spread", "NLL (nats)", "spread"],
        calibration, frozenset({1, 2, 3, 4}))]
    if len(names) <= MOST_CLASSES:
        blocks.append(_dots(entries, names, suffix))
    cut = f" (the first {MOST_CLASSES} of {len(rows)})" if len(rows) > MOST_CLASSES else ""
    return [*blocks, Table(f"classes-{suffix}", head, rows, frozenset(range(1, len(head))),
                           caption=f"Accuracy of each class, mean over repeats{cut}",
                           shown_rows=MOST_CLASSES)]


def _difference(entry: ApproachEvidence, base: ApproachEvidence, k: int) -> float | None:
    accuracy, reference = entry.per_class[k], base.per_class[k]
    return None if accuracy is None or reference is None else accuracy - reference


def _dots(entries: Sequence[ApproachEvidence], names: Sequence[str], suffix: str) -> Figure:
    drawing = figure(8.6, 0.9 + 0.27 * len(names))
    axes, approaches = drawing.subplots(), [entry.approach for entry in entries]
    values = np.array([[np.nan if v is None else 100 * v for v in entry.per_class]
                       for entry in entries])
    for y, column in enumerate(values.T):
        if np.isfinite(column).any():
            axes.plot([np.nanmin(column), np.nanmax(column)], [y, y], color="#d0d7de", linewidth=3,
                      zorder=1)
    for entry, row in zip(entries, values, strict=True):
        style = look(entry.approach, approaches) | {"linestyle": "none"}
        axes.plot(row, range(len(names)), **style, markersize=6.5, label=shown(entry.approach),
                  zorder=2)
    axes.set_yticks(range(len(names)),
                    [name if len(name) < 24 else name[:23] + "…" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("accuracy on the class's test images (%)")
    axes.legend(fontsize=8.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1),
                ncols=min(4, len(entries)))
    plain(axes, grid="x")
    return Figure(f"classes-{suffix}.png", png(drawing),
                  "Accuracy of each class for every approach", width=860)
