"""Table 2 beside the paper's numbers, and what the explanations are worth: the controls, and a sentence a cell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from impactx.approaches.baseline import BASELINE
from impactx.experiment.paper import paper_accuracy
from impactx.report.blocks import Block, Figure, Section, Table, Text
from impactx.report.numbers import NONE, interval, number, percent, points, probability
from impactx.report.style import INK, SOFT, figure, look, plain, png, shown
from impactx.timing import duration

OVER = {"baseline": "A (baseline)", "lambda0": "same network, λ = 0", "shuffled": "shuffled maps"}
Entry = Mapping[str, Any]


def tested(export: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of the evidence in which at least one final model could be judged."""
    return [cell for cell in export["evidence"]["cells"] if cell["approaches"]]


def entries(export: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Entry]]:
    """Every (cell, approach) of the evidence."""
    for cell in export["evidence"]["cells"]:
        for entry in cell["approaches"]:
            yield cell, entry


def named(cell: Mapping[str, Any]) -> str:
    """A cell's name for readers."""
    return f"{cell['dataset']} × {cell['model']}"


def of_cell(export: Mapping[str, Any], cell: Mapping[str, Any], lines: Iterable[str]) -> list[str]:
    """Lines on a cell, which say of which where there are several."""
    return [f"{named(cell)}: {line}" if len(export["cells"]) > 1 else line for line in lines]


def sentences(export: Mapping[str, Any]) -> list[Block]:
    """The plain sentence of each cell, at the top of the page."""
    found = tested(export)
    if not found:
        return [Text("No final model has read the test set yet: there is nothing to say about accuracy.", "lead")]
    return [Text(f"{named(cell)}: {cell['sentence']}", "lead") for cell in found]


def table2(export: Mapping[str, Any]) -> list[Section]:
    """Accuracy of each approach with its interval, the paper's number and the difference."""
    if not tested(export):
        return []
    rows, strong = [], set()
    for cell, entry in entries(export):
        best = max(e["accuracy"]["mean"] for e in cell["approaches"])
        if entry["accuracy"]["mean"] == best and len(cell["approaches"]) > 1:
            strong.add(len(rows))
        accuracy, paper = entry["accuracy"], entry["paper"]
        rows.append([named(cell), shown(entry["approach"]), number(entry["weight"]), number(entry["candidates"]),
                     str(len(entry["repeats"])), percent(accuracy["mean"]), interval(accuracy),
                     percent(accuracy["spread"]), percent(paper),
                     points(accuracy["mean"] - paper) if paper is not None else NONE,
                     percent(entry["val_accuracy"]["mean"]),
                     duration(entry["seconds_in_all"]) if entry["seconds_in_all"] is not None else NONE,
                     f"{entry['map_seconds']:.3f}" if entry["map_seconds"] is not None else NONE])
    shares = f"{100 * export['evidence']['confidence']:g} %"
    head = ["cell", "approach", "λ", "candidates", "repeats", "test %", f"{shares} interval", "spread", "paper %",
            "ours − paper", "validation %", "time a model", "s a map at test"]
    return [Section("Table 2: test accuracy", [
        Table("table2", head, rows, frozenset(range(2, len(head))), frozenset(strong)), _accuracies(export),
        Text(f"Means over repeats; the {shares} intervals are from a bootstrap over {_what(export)}. Spread: standard "
             "deviation over repeats. Candidates: how many an approach's search had, beside A's grid. The paper (arXiv "
             "2502.12222v2, Table 2) gives one number a cell, without a spread. The best of a cell is bold. Time a "
             "model: of the processes that made one, its A and its maps included. A map at test: what a prediction "
             "needs beside the network. Each final model's accuracy comes from one reading of the test set; nothing "
             "was chosen by it. (Maps are judged on test images afterwards.)", "note"), *_parts(export), *_other_code(export)])]


def _other_code(export: Mapping[str, Any]) -> list[Block]:
    """Which rows hold what other code than the job's has computed."""
    rows = [f"{row['dataset']} × {row['model']}, {row['approach']} repeat {row['repeat']} ({row['other_code']})"
            for cell in export["cells"] for row in cell["rows"] if row.get("other_code")]
    return [Text("Reused, though other code than this job's computed it (reuse = any_code): " + "; ".join(rows) + ".",
                 "warning")] if rows else []


def _parts(export: Mapping[str, Any]) -> list[Block]:
    """What was not done on a whole data set."""
    models = export["settings"]["models"]
    known = " The paper's numbers, of all images, do not stand beside these."
    return [Text(f"{name}: models learn from a part of the data set, {dataset['subset']:,} training images "
                 f"(datasets.{name}.subset)."
                 + (known if any(paper_accuracy(name, model, BASELINE) for model in models) else ""), "warning")
            for name, dataset in export["settings"]["datasets"].items() if dataset.get("subset")]


def _what(export: Mapping[str, Any]) -> str:
    kinds = dict.fromkeys(entry["accuracy"]["over"] for _, entry in entries(export))
    return " or, where there is one repeat only, over ".join(sorted(kinds, key=len, reverse=True)).replace(
        "repeats and images", "repeats and test images together")


def _accuracies(export: Mapping[str, Any]) -> Figure:
    cells = tested(export)
    lines = sum(len(cell["approaches"]) for cell in cells) + len(cells)
    made = figure(8.6, 0.9 + 0.3 * lines)
    panels = made.subplots(len(cells), 1, squeeze=False, gridspec_kw={
        "height_ratios": [len(cell["approaches"]) + 1 for cell in cells]})[:, 0]
    for panel, cell in zip(panels, cells, strict=True):
        names = [entry["approach"] for entry in cell["approaches"]]
        for y, entry in enumerate(cell["approaches"]):
            accuracy, style = entry["accuracy"], look(entry["approach"], names)
            panel.plot([100 * accuracy["low"], 100 * accuracy["high"]], [y, y], color=style["color"], linewidth=2.2)
            panel.plot([100 * accuracy["mean"]], [y], color=style["color"], marker=style["marker"], markersize=7,
                       linestyle="none", label="ours, with interval" if y == 0 else None)
            if entry["paper"] is not None:
                panel.plot([100 * entry["paper"]], [y], marker="D", markersize=7, markerfacecolor="none",
                           markeredgecolor=INK, linestyle="none", label="the paper's number" if y == 0 else None)
        panel.set_yticks(range(len(names)), [shown(name) for name in names])
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_title(named(cell), loc="left", fontsize=10.5)
        plain(panel, grid="x")
        panel.margins(x=0.08)
    panels[-1].set_xlabel("test accuracy (%)")
    panels[0].legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return Figure("table2.png", png(made), "Test accuracy of every approach with its interval, and the paper's numbers",
                  width=860)


def controls(export: Mapping[str, Any]) -> list[Section]:
    """The gains over A and over the controls, with intervals, as a table and as a picture."""
    rows = [[named(cell), shown(entry["approach"]), OVER.get(over, shown(over)), points(gain["mean"]),
             interval(gain, signed=True), probability(gain["p"]), probability(gain.get("p_holm")),
             str(gain["repeats"]), _paper_gain(cell, entry, over)]
            for cell, entry in entries(export) for over, gain in entry["gains"].items()]
    if not rows:
        return []
    head = ["cell", "approach", "over", "gain (points)", "interval", "p", "p, Holm", "repeats", "paper"]
    return [Section("What the explanations are worth", [
        Text("A and IMPACTX differ by a whole second network. So the gain over A alone does not show that the "
             "explanations make the difference: for that, IMPACTX has to be ahead of the same network trained without "
             "them (λ = 0) and with maps of other images (shuffled)."),
        _forest(export), Table("gains", head, rows, frozenset(range(3, len(head)))),
        Text("Gains are paired: the same repeat (split, seeds) and the same test image on both sides. p is two-sided; "
             "p, Holm is corrected over the cells that make the same comparison, and what the sentences go by. "
             "Intervals are not corrected.", "note")])]


def _paper_gain(cell: Mapping[str, Any], entry: Entry, over: str) -> str:
    published = {e["approach"]: e["paper"] for e in cell["approaches"]}
    ours, theirs = published.get(entry["approach"]), published.get(over)
    return points(ours - theirs) if ours is not None and theirs is not None else NONE


def _forest(export: Mapping[str, Any]) -> Figure:
    lines = [(cell, entry, over, gain) for cell, entry in entries(export) for over, gain in entry["gains"].items()]
    made = figure(8.6, 0.9 + 0.27 * len(lines))
    axes = made.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    several = len(tested(export)) > 1
    for y, (cell, entry, _, gain) in enumerate(lines):
        style = look(entry["approach"], [e["approach"] for e in cell["approaches"]])
        axes.plot([100 * gain["low"], 100 * gain["high"]], [y, y], color=style["color"], linewidth=2.2)
        axes.plot([100 * gain["mean"]], [y], color=style["color"], marker=style["marker"], markersize=7)
        if y and (lines[y - 1][0] is not cell or lines[y - 1][1] is not entry):
            axes.axhline(y - 0.5, color=SOFT, linewidth=0.5)
    axes.set_yticks(range(len(lines)), [
        f"{named(cell) + ': ' if several else ''}{shown(entry['approach'])} over {OVER.get(over, shown(over))}"
        for cell, entry, over, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("gain in test accuracy (points)")
    plain(axes, grid="x")
    return Figure("gains.png", png(made), "Gains over A and over the controls with their intervals; the line is zero",
                  "An interval that meets the line shows no difference.", 860)
