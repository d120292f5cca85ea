"""The searches of a cell: Table 1's grid for A as heat maps, and each approach's candidates."""

from __future__ import annotations

from typing import Any

import numpy as np

from impactx.experiment.steps.training import Trial
from impactx.report.blocks import Block, Figure, Items, Section, Table, Text
from impactx.report.numbers import NONE, number, percent
from impactx.report.results import title
from impactx.report.style import INK, SURFACE, figure, looks, plain, png
from impactx.results.export import CellExport, JobExport, StepExport

STAGE1 = "stage 1"
AXES = ("learning_rate", "batch_size", "validation_fraction")
# What the search of an approach varies; its other settings are those selected for A.
SEARCHED = {"lambda": "λ", "learning_rate": "learning rate"}
FAILED = ("failed", "damaged", "diverged")  # states
MOST_ROWS = 10  # trials in a table, failures in a list; the CSV has all


def search_sections(export: JobExport) -> list[Section]:
    """Return one section for each cell that has begun its searches.

    Args:
        export: The job.
    """
    sections = []
    for cell in export.cells:
        searches = dict.fromkeys(
            step.group for step in cell.steps if step.search and step.kind == Trial.kind)
        if searches:
            sections.append(Section(title(cell), [
                block for search in searches for block in _Search(cell, search).blocks()], level=2))
    head = Section("Search", [Text(
        "Trials are compared by validation accuracy alone; the test set plays no part. The "
        "brighter a field, the better; the frame marks the trial that was selected.")])
    return [head, *sections] if sections else []


class _Search:
    """The trials of one search of a cell."""

    def __init__(self, cell: CellExport, search: str) -> None:
        self.search, self.stage1 = search, search == STAGE1
        self.trials = [step for step in cell.steps if step.search and step.group == search]
        self.metric = cell.selection_metric if self.stage1 else "val_accuracy"
        self.selected = next((trial for trial in self.trials
                              if trial.folder == cell.selected.get(search)), None)
        self.name = f"{search.replace(' ', '-')}-{cell.dataset}-{cell.model}"
        differing = [axis for axis in SEARCHED if len(
            {trial.parameters.get(axis) for trial in self.trials}) > 1]
        self.axes = list(AXES) if self.stage1 else differing or ["learning_rate"]

    def blocks(self) -> list[Block]:
        """Return what the report shows of the search."""
        blocks: list[Block] = [Text(self._sentence())]
        if failed := [f"{trial.name}: {_reason(trial)}" for trial in self.trials
                      if trial.state in FAILED]:
            more = [f"and {len(failed) - MOST_ROWS} more, all in {self.name}.csv"
                    ] if len(failed) > MOST_ROWS else []
            blocks.append(Items([*failed[:MOST_ROWS], *more], "warning"))
        if any(self.score(trial) is not None for trial in self.trials):
            blocks.append(self._heat_maps() if self.stage1 else self._candidates())
        blocks.append(self._table())
        return blocks

    def score(self, trial: StepExport) -> float | None:
        """Return the accuracy by which a finished trial is compared, at its best epoch."""
        best = trial.training.best if trial.training else None
        return best.get(self.metric) if best else None

    def _sentence(self) -> str:
        finished = sum(trial.state in ("finished", "diverged") for trial in self.trials)
        text = f"{self.search.capitalize()}: {finished} of {len(self.trials)} trials finished"
        if stopped := sum(trial.state == "stopped early" for trial in self.trials):
            text += f", {stopped} were stopped early because they fell behind"
        if self.selected is not None:
            measure = "validation accuracy" + (
                " on the part that all validation fractions share"
                if self.metric == "common_accuracy" else "")
            text += (f"; selected: {self._point(self.selected)} with "
                     f"{percent(self.score(self.selected))} % ({measure})")
        return f"{text}."

    def _point(self, trial: StepExport) -> str:
        p = trial.parameters
        if not self.stage1:
            return ", ".join(f"{SEARCHED[axis]} = {p[axis]:g}" for axis in self.axes)
        return (f"learning rate {p['learning_rate']:g}, batch size {p['batch_size']}, "
                f"validation fraction {p['validation_fraction']:g}")

    def _heat_maps(self) -> Figure:
        """Return a map of learning rate × batch size for each validation fraction, in one scale."""
        rates, sizes, fractions = (
            sorted({trial.parameters[axis] for trial in self.trials}) for axis in AXES)
        scores = np.full((len(fractions), len(rates), len(sizes)), np.nan)
        failed = np.zeros(scores.shape, bool)
        for trial in self.trials:
            p, score = trial.parameters, self.score(trial)
            cell = (fractions.index(p["validation_fraction"]), rates.index(p["learning_rate"]),
                    sizes.index(p["batch_size"]))
            scores[cell] = np.nan if score is None else 100 * score
            failed[cell] = trial.state in FAILED
        low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
        drawing = figure(min(10.0, 1.6 + len(fractions) * (0.95 + 0.62 * len(sizes))),
                         max(2.3, 1.2 + 0.3 * len(rates)))
        panels = drawing.subplots(1, len(fractions), squeeze=False, sharey=True)[0]
        for k, panel in enumerate(panels):
            image = panel.imshow(scores[k], cmap=SURFACE, vmin=low,
                                 vmax=high if high > low else low + 1, aspect="auto",
                                 origin="lower")
            panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            panel.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
            panel.set_xlabel("batch size")
            panel.set_title(f"validation {fractions[k]:g}")
            plain(panel)
            for i, j in np.ndindex(scores.shape[1:]):
                _label(panel, j, i, scores[k, i, j], failed[k, i, j], low, high)
            p = self.selected.parameters if self.selected is not None else {}
            if p.get("validation_fraction") == fractions[k]:
                x, y = sizes.index(p["batch_size"]), rates.index(p["learning_rate"])
                for colour, width in (("white", 4.5), ("black", 2.0)):
                    panel.add_patch(_frame(x, y, colour, width))
        panels[0].set_ylabel("learning rate")
        bar = drawing.colorbar(image, ax=list(panels), shrink=0.9, aspect=24)
        bar.set_label("validation accuracy (%)", fontsize=9)
        bar.ax.tick_params(labelsize=8)
        caption = "Each number is a trial's validation accuracy in percent at its best epoch."
        if failed.any():
            caption += " × marks a trial that failed or diverged."
        if (np.isnan(scores) & ~failed).any():
            caption += " Empty fields are trials that were stopped early or have not finished."
        return Figure(
            f"{self.name}.png", png(drawing), "Heat maps of validation accuracy over learning rate "
            f"and batch size, from {low:.2f} to {high:.2f} percent", caption,
            width=min(900, int(drawing.get_size_inches()[0] * 92)))

    def _candidates(self) -> Figure:
        """Return the accuracy over the first searched axis, a line for each value of the other."""
        over, *other = self.axes
        lines = sorted({trial.parameters[other[0]] for trial in self.trials}) if other else [None]
        drawing = figure(5.2, 2.7)
        axes = drawing.subplots()
        scored = [(trial.parameters, 100 * score) for trial in self.trials
                  if (score := self.score(trial)) is not None]
        for line, style in zip(lines, looks(len(lines)), strict=True):
            values = sorted((p[over], score) for p, score in scored
                            if line is None or p[other[0]] == line)
            if values:
                axes.plot(*zip(*values, strict=True), **style, linewidth=1.6,
                          label=None if line is None else f"{SEARCHED[other[0]]} {line:g}")
        if other:
            axes.legend(fontsize=8, frameon=False)
        if self.selected is not None and (score := self.score(self.selected)) is not None:
            axes.plot([self.selected.parameters[over]], [100 * score], marker="o", markersize=12,
                      markerfacecolor="none", markeredgecolor=INK, markeredgewidth=1.6,
                      linestyle="none")
        axes.set_xlabel(SEARCHED[over])
        axes.set_ylabel("validation accuracy (%)")
        axes.set_xticks(sorted({p[over] for p, _ in scored}))
        plain(axes, grid="y")
        return Figure(f"{self.name}.png", png(drawing),
                      f"Validation accuracy over {SEARCHED[over]}",
                      "The ring marks the trial that was selected.", 520)

    def _table(self) -> Table:
        names = (["learning rate", "batch size", "validation"] if self.stage1
                 else [SEARCHED[axis] for axis in self.axes])
        head = [*names, "accuracy %", "best epoch", "epochs", "train s", "state"]
        ordered = sorted(self.trials, key=lambda trial: -(self.score(trial) or -1))
        rows = []
        for trial in ordered:
            result = trial.training
            costs = [NONE] * 3 if result is None else [
                str(result.best_epoch), str(result.epochs), f"{result.seconds:.0f}"]
            state = ("selected" if trial is self.selected
                     else f"{trial.state}: {trial.error}" if trial.error else trial.state)
            rows.append([*(number(trial.parameters[axis]) for axis in self.axes),
                         percent(self.score(trial)), *costs, state])
        cut = f" (the first {MOST_ROWS} of {len(rows)})" if len(rows) > MOST_ROWS else ""
        return Table(self.name, head, rows, frozenset(range(len(head) - 1)),
                     frozenset(i for i, trial in enumerate(ordered) if trial is self.selected),
                     f"The trials, best first{cut}", shown_rows=MOST_ROWS)


def _reason(trial: StepExport) -> str:
    return trial.error or "diverged, its loss was not finite"


def _label(panel: Any, x: int, y: int, score: float, failed: bool, low: float, high: float) -> None:
    if np.isnan(score):
        if failed:
            panel.text(x, y, "×", ha="center", va="center", fontsize=11, color=INK)
        return
    bright = high > low and (score - low) / (high - low) > 0.55
    panel.text(x, y, f"{score:.1f}", ha="center", va="center", fontsize=8,
               color="black" if bright else "white")


def _frame(x: int, y: int, colour: str, width: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=colour,
                     linewidth=width)
