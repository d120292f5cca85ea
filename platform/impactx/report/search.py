"""The searches of a cell: Table 1's grid for A as heat maps, lambda for the approaches that have candidates."""

from __future__ import annotations

from typing import Any

import numpy as np

from impactx.report.blocks import Block, Figure, Items, Section, Table, Text
from impactx.report.numbers import NONE, number, percent
from impactx.report.style import INK, SURFACE, figure, looks, plain, png

STAGE1 = "stage 1"
AXES = ("learning_rate", "batch_size", "validation_fraction")
SEARCHED = {"lambda": "λ", "learning_rate": "learning rate"}  # by an approach, with A's other settings
FAILED = ("failed", "damaged", "diverged")  # states
MOST_ROWS = 10  # trials in a table, failures in a list; the CSV has all


def search_sections(export: dict[str, Any]) -> list[Section]:
    """One part for each cell that has begun its searches."""
    made = [Section("Search", [Text(
        "Trials are compared by validation accuracy alone; the test set plays no part. The brighter, the better; the "
        "frame marks what was selected.")])]
    for cell in export["cells"]:
        steps = dict.fromkeys(u["step"] for u in cell["units"] if u["role"] == "trial" and u["step"])
        if steps:
            blocks = [block for step in steps for block in _step(cell, step)]
            made.append(Section(f"{cell['dataset']} × {cell['model']}", blocks, level=2))
    return made if len(made) > 1 else []


def _step(cell: dict[str, Any], step: str) -> list[Block]:
    trials = [u for u in cell["units"] if u["step"] == step]
    metric = cell["selection_metric"] if step == STAGE1 else "val_accuracy"
    chosen = next((u for u in trials if u["folder"] == cell["selected"].get(step)), None)
    name = f"{step.replace(' ', '-')}-{cell['dataset']}-{cell['model']}"
    finished = sum(u["state"] in ("finished", "diverged") for u in trials)
    said = f"{step.capitalize()}: {finished} of {len(trials)} trials finished"
    if stopped := sum(u["state"] == "stopped early" for u in trials):
        said += f", {stopped} were stopped early because they fell behind"
    if chosen is not None:
        said += f"; selected {_point(chosen, trials)} with {percent(_score(chosen, metric))} % ({_words(metric)})"
    blocks: list[Block] = [Text(said + ".")]
    if failed := [f"{u['name']}: {_why(u)}" for u in trials if u["state"] in FAILED]:
        more = [f"and {len(failed) - MOST_ROWS} more, all in {name}.csv"] if len(failed) > MOST_ROWS else []
        blocks.append(Items([*failed[:MOST_ROWS], *more], "warning"))
    if any(_score(u, metric) is not None for u in trials):
        blocks.append(_heat_maps(trials, chosen, metric, name) if step == STAGE1
                      else _candidates(trials, chosen, metric, name))
    blocks.append(_table(trials, chosen, metric, name, step))
    return blocks


def _why(unit: dict[str, Any]) -> str:
    return unit["error"] or "diverged, its loss was not finite"


def _words(metric: str) -> str:
    return ("validation accuracy on the part that all validation fractions share" if metric == "common_accuracy"
            else "validation accuracy")


def _searched(trials: list[dict[str, Any]]) -> list[str]:
    """What an approach's trials differ in: lambda, the learning rate, or both."""
    return [axis for axis in SEARCHED if len({u["params"].get(axis) for u in trials}) > 1] or ["learning_rate"]


def _score(unit: dict[str, Any], metric: str) -> float | None:
    best = (unit["result"] or {}).get("best")
    return best[metric] if best else None


def _point(unit: dict[str, Any], trials: list[dict[str, Any]]) -> str:
    p = unit["params"]
    if unit["step"] != STAGE1:
        return ", ".join(f"{SEARCHED[axis]} = {p[axis]:g}" for axis in _searched(trials))
    return (f"learning rate {p['learning_rate']:g}, batch size {p['batch_size']}, "
            f"validation fraction {p['validation_fraction']:g}")


def _heat_maps(trials: list[dict[str, Any]], chosen: dict[str, Any] | None, metric: str, name: str) -> Figure:
    """One map of learning rate × batch size for each validation fraction, with one scale."""
    rates, sizes, fractions = (sorted({u["params"][axis] for u in trials}) for axis in AXES)
    scores = np.full((len(fractions), len(rates), len(sizes)), np.nan)
    failed = np.zeros(scores.shape, bool)
    for unit in trials:
        at = tuple(values.index(unit["params"][axis]) for values, axis in zip(
            (fractions, rates, sizes), ("validation_fraction", "learning_rate", "batch_size"), strict=True))
        score = _score(unit, metric)
        scores[at] = np.nan if score is None else 100 * score
        failed[at] = unit["state"] in FAILED
    low, high = float(np.nanmin(scores)), float(np.nanmax(scores))
    made = figure(min(10.0, 1.6 + len(fractions) * (0.95 + 0.62 * len(sizes))), max(2.3, 1.2 + 0.3 * len(rates)))
    panels = made.subplots(1, len(fractions), squeeze=False, sharey=True)[0]
    for k, panel in enumerate(panels):
        shown_as = panel.imshow(scores[k], cmap=SURFACE, vmin=low, vmax=high if high > low else low + 1, aspect="auto",
                                origin="lower")
        panel.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        panel.set_yticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        panel.set_xlabel("batch size")
        panel.set_title(f"validation {fractions[k]:g}")
        plain(panel)
        for i, j in np.ndindex(scores.shape[1:]):
            _label(panel, j, i, scores[k, i, j], failed[k, i, j], low, high)
        if chosen is not None and chosen["params"]["validation_fraction"] == fractions[k]:
            where = sizes.index(chosen["params"]["batch_size"]), rates.index(chosen["params"]["learning_rate"])
            for colour, width in (("white", 4.5), ("black", 2.0)):
                panel.add_patch(_frame(*where, colour, width))
    panels[0].set_ylabel("learning rate")
    bar = made.colorbar(shown_as, ax=list(panels), shrink=0.9, aspect=24)
    bar.set_label("validation accuracy (%)", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return Figure(f"{name}.png", png(made), f"Heat maps of validation accuracy over learning rate and batch size, "
                  f"from {low:.2f} to {high:.2f} percent",
                  "Each number is a trial's validation accuracy in percent at its best epoch."
                  + (" × marks a trial that failed or diverged." if failed.any() else "")
                  + (" Empty fields are trials that were stopped early or have not finished."
                     if (np.isnan(scores) & ~failed).any() else ""),
                  width=min(900, int(made.get_size_inches()[0] * 92)))


def _label(panel: Any, x: int, y: int, score: float, failed: bool, low: float, high: float) -> None:
    if np.isnan(score):
        if failed:
            panel.text(x, y, "×", ha="center", va="center", fontsize=11, color=INK)
        return
    bright = high > low and (score - low) / (high - low) > 0.55
    panel.text(x, y, f"{score:.1f}", ha="center", va="center", fontsize=8, color="black" if bright else "white")


def _frame(x: int, y: int, colour: str, width: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=colour, linewidth=width)


def _candidates(trials: list[dict[str, Any]], chosen: dict[str, Any] | None, metric: str, name: str) -> Figure:
    over, *other = _searched(trials)
    what, lines = SEARCHED[over], sorted({u["params"][other[0]] for u in trials}) if other else [None]
    made = figure(5.2, 2.7)
    axes = made.subplots()
    for line, style in zip(lines, looks(len(lines)), strict=True):
        found = sorted((u["params"][over], 100 * s) for u in trials if (s := _score(u, metric)) is not None
                       and (line is None or u["params"][other[0]] == line))
        if found:
            axes.plot(*zip(*found, strict=True), **style, linewidth=1.6,
                      label=None if line is None else f"{SEARCHED[other[0]]} {line:g}")
    if other:
        axes.legend(fontsize=8, frameon=False)
    if chosen is not None and (score := _score(chosen, metric)) is not None:
        axes.plot([chosen["params"][over]], [100 * score], marker="o", markersize=12, markerfacecolor="none",
                  markeredgecolor=INK, markeredgewidth=1.6, linestyle="none")
    axes.set_xlabel(what)
    axes.set_ylabel("validation accuracy (%)")
    axes.set_xticks(sorted({u["params"][over] for u in trials if _score(u, metric) is not None}))
    plain(axes, grid="y")
    return Figure(f"{name}.png", png(made), f"Validation accuracy over {what}", "The ring marks what was selected.",
                  520)


def _table(trials: list[dict[str, Any]], chosen: dict[str, Any] | None, metric: str, name: str, step: str) -> Table:
    searched = ["learning rate", "batch size", "validation"] if step == STAGE1 else [
        SEARCHED[axis] for axis in _searched(trials)]
    head = [*searched, "accuracy %", "best epoch", "epochs", "train s", "state"]
    ordered = sorted(trials, key=lambda u: -(_score(u, metric) or -1))
    rows = []
    for unit in ordered:
        p, result = unit["params"], unit["result"] or {}
        point = [number(p[axis]) for axis in (AXES if step == STAGE1 else _searched(trials))]
        rows.append([*point, percent(_score(unit, metric)), number(result.get("best_epoch")),
                     number(result.get("epochs")), f"{result['seconds']:.0f}" if "seconds" in result else NONE,
                     "selected" if unit is chosen else
                     f"{unit['state']}: {_why(unit)}" if unit["error"] else unit["state"]])
    return Table(name, head, rows, frozenset(range(len(head) - 1)),
                 frozenset(i for i, u in enumerate(ordered) if u is chosen),
                 f"The trials, best first{f' (the first {MOST_ROWS} of {len(rows)})' if len(rows) > MOST_ROWS else ''}",
                 shown_rows=MOST_ROWS)
