"""Table 2 beside the paper's numbers, and the worth of the explanations against the controls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from impactx.approaches.baseline import BASELINE
from impactx.experiment.paper import paper_accuracy
from impactx.report.blocks import Block, Figure, Section, Table, Text
from impactx.report.numbers import NONE, interval, number, percent, points, probability
from impactx.report.style import INK, SOFT, figure, look, plain, png, shown
from impactx.results.evidence import common_sentence
from impactx.results.evidence_records import ApproachEvidence, CellEvidence, VerdictKind
from impactx.results.export import CellExport, JobExport
from impactx.results.rows import mixed_precisions
from impactx.timing import duration

_WORDS: dict[VerdictKind, str] = {
    "helps": "help", "hurts": "hurt", "no difference": "make no difference larger than the margin",
    "cannot be told": "cannot be told"}
OVER = {"baseline": "A (baseline)", "lambda0": "same network, λ = 0", "shuffled": "shuffled maps"}


def tested(export: JobExport) -> list[CellEvidence]:
    """Return the cells in which at least one final model could be judged."""
    return [cell for cell in export.evidence.cells if cell.approaches]


def entries(export: JobExport) -> Iterator[tuple[CellEvidence, ApproachEvidence]]:
    """Yield every approach of every cell, with the cell."""
    for cell in export.evidence.cells:
        for entry in cell.approaches:
            yield cell, entry


def title(cell: CellExport | CellEvidence) -> str:
    """Return the name of a cell for readers."""
    return f"{cell.dataset} × {cell.model}"


def of_cell(export: JobExport, cell: CellExport | CellEvidence, lines: Iterable[str]) -> list[str]:
    """Return lines on a cell, which name the cell where there are several.

    Args:
        export: The job.
        cell: The cell.
        lines: Without its name.
    """
    return [f"{title(cell)}: {line}" if len(export.cells) > 1 else line for line in lines]


def sentences(export: JobExport) -> list[Block]:
    """Return the sentence on each cell, for the top of the page."""
    cells, pilot = tested(export), export.evidence.pilot
    if not cells and pilot:
        return [Text(f"The first {pilot} repeats are a pilot, whose accuracies are not shown. No "
                     "other final model has read the test set yet.", "lead")]
    if not cells:
        return [Text("No final model has read the test set yet, so nothing can be said about "
                     "accuracy.", "lead")]
    return [*(Text(f"{title(cell)}: {cell.sentence}", "lead") for cell in cells),
            *(Text(common_sentence(effect)) for effect in export.evidence.common)]


def table2(export: JobExport) -> list[Section]:
    """Return the accuracy of each approach, beside the paper's number and the difference.

    Args:
        export: The job.
    """
    if not tested(export):
        return []
    rows: list[list[str]] = []
    strong: set[int] = set()
    for cell, entry in entries(export):
        best = max(other.accuracy.mean for other in cell.approaches)
        if entry.accuracy.mean == best and len(cell.approaches) > 1:
            strong.add(len(rows))
        rows.append(_row(cell, entry))
    level = f"{100 * export.evidence.confidence:g} %"
    head = ["cell", "approach", "λ", "candidates", "repeats", "test %", f"{level} interval",
            "spread", "paper %", "ours − paper", "validation %", "time per model",
            "s per map at test"]
    note = (
        f"Means over repeats. The {level} intervals cover other repeats and other test images of "
        "the same kind; where there is one repeat, other test images alone. "
        "Spread: the standard deviation over repeats. Candidates: the size of an approach's own "
        "search, beside A's grid. The paper (arXiv 2502.12222v2, Table 2) gives one number for "
        "each cell, without a spread. The best approach of a cell is bold. Time per model: process "
        "seconds in total, including its classifier A and its maps. Map at test: what a prediction "
        "needs beside the network. The accuracy of each final model comes from one reading of the "
        "test set, and nothing was chosen by it. (Maps are judged on test images afterwards.)")
    return [Section("Table 2: test accuracy", [
        Table("table2", head, rows, frozenset(range(2, len(head))), frozenset(strong)),
        _accuracies(export), Text(note, "note"), *_parts(export), *_other_code(export),
        *_precisions(export)])]


def _row(cell: CellEvidence, entry: ApproachEvidence) -> list[str]:
    """Return an approach's row of Table 2."""
    accuracy, paper = entry.accuracy, entry.paper
    seconds, map_seconds = entry.seconds_in_all, entry.map_seconds
    return [title(cell), shown(entry.approach), number(entry.weight), number(entry.candidates),
            str(len(entry.repeats)), percent(accuracy.mean), interval(accuracy),
            percent(accuracy.spread), percent(paper),
            NONE if paper is None else points(accuracy.mean - paper),
            percent(entry.val_accuracy.mean), NONE if seconds is None else duration(seconds),
            NONE if map_seconds is None else f"{map_seconds:.3f}"]


def _other_code(export: JobExport) -> list[Block]:
    """Return which rows hold what other code than the job's has computed."""
    rows = [f"{title(cell)}, {row.approach} repeat {row.repeat} ({row.other_code})"
            for cell in export.cells for row in cell.rows if row.other_code]
    return [Text("Reused, though other code than this job's computed it (reuse = any_code): "
                 + "; ".join(rows) + ".", "warning")] if rows else []


def _precisions(export: JobExport) -> list[Block]:
    """Return a warning where the table mixes precisions."""
    mixed = mixed_precisions([row for cell in export.cells for row in cell.rows])
    return [Text(f"Not all of this table is of one precision: {'. '.join(mixed)}.", "warning")
            ] if mixed else []


def _parts(export: JobExport) -> list[Block]:
    """Return a warning for each data set of which a part was used."""
    beside = " The paper's numbers are for all images, so they are not shown beside these."
    return [Text(f"{name}: models learn from a part of the data set, {dataset.subset:,} training "
                 f"images (datasets.{name}.subset). "
                 "All repeats draw from the same ones, so no interval covers others."
                 + (beside if any(paper_accuracy(name, model, BASELINE)
                                  for model in export.settings.models) else ""), "warning")
            for name, dataset in export.settings.datasets.items() if dataset.subset]


def _accuracies(export: JobExport) -> Figure:
    cells = tested(export)
    lines = sum(len(cell.approaches) for cell in cells) + len(cells)
    drawing = figure(8.6, 0.9 + 0.3 * lines)
    panels = drawing.subplots(len(cells), 1, squeeze=False, gridspec_kw={
        "height_ratios": [len(cell.approaches) + 1 for cell in cells]})[:, 0]
    for panel, cell in zip(panels, cells, strict=True):
        names = [entry.approach for entry in cell.approaches]
        for y, entry in enumerate(cell.approaches):
            accuracy, style = entry.accuracy, look(entry.approach, names)
            panel.plot([100 * accuracy.low, 100 * accuracy.high], [y, y], color=style["color"],
                       linewidth=2.2)
            panel.plot([100 * accuracy.mean], [y], color=style["color"], marker=style["marker"],
                       markersize=7, linestyle="none",
                       label="ours, with interval" if y == 0 else None)
            if entry.paper is not None:
                panel.plot([100 * entry.paper], [y], marker="D", markersize=7,
                           markerfacecolor="none", markeredgecolor=INK, linestyle="none",
                           label="the paper's number" if y == 0 else None)
        panel.set_yticks(range(len(names)), [shown(name) for name in names])
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_title(title(cell), loc="left", fontsize=10.5)
        plain(panel, grid="x")
        panel.margins(x=0.08)
    panels[-1].set_xlabel("test accuracy (%)")
    panels[0].legend(fontsize=8.5, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return Figure("table2.png", png(drawing), "Test accuracy of every approach with its interval, "
                  "and the paper's numbers", width=860)


def controls(export: JobExport) -> list[Section]:
    """Return the gains over A and over the controls, as a table and as a picture.

    Args:
        export: The job.
    """
    rows = [[title(cell), shown(entry.approach), OVER.get(over, shown(over)), points(gain.mean),
             interval(gain, signed=True), probability(gain.p), str(gain.repeats),
             _paper_gain(cell, entry, over)]
            for cell, entry in entries(export) for over, gain in entry.gains.items()]
    if not rows:
        return []
    head = ["cell", "approach", "over", "gain (points)", "interval", "p", "repeats", "paper"]
    return [Section("What the explanations are worth", [
        Text("IMPACTX has a whole second network that A does not have. So the gain over A alone "
             "does not show that the explanations make the difference: for that, IMPACTX has to be "
             "better than the same network trained without them (λ = 0) and with maps of other "
             "images (shuffled)."),
        _forest(export), Table("gains", head, rows, frozenset(range(3, len(head)))),
        Text("Gains are paired: the same repeat (split, seeds) and the same test image on both "
             "sides. p is two-sided, and neither p nor an interval is corrected.", "note"),
        *_verdicts(export)])]


def _verdicts(export: JobExport) -> list[Block]:
    """Return the verdicts as a table: which are corrected, and what the repeats could show."""
    verdicts = [(cell, name, verdict) for cell in export.evidence.cells
                for name, verdict in cell.verdicts.items()]
    if not verdicts:
        return []
    corrected = any(verdict.p_helps_holm is not None or verdict.p_hurts_holm is not None
                    for *_, verdict in verdicts)
    margin = f"{export.evidence.margin:g} points"
    head = ["cell", "approach", "the explanations", "p, help", "p, hurt",
            *(["p, help, Holm", "p, hurt, Holm"] if corrected else []),
            "could be shown (points)", f"repeats for {margin}"]
    rows = []
    for cell, name, one in verdicts:
        p_values = [one.p_helps, one.p_hurts,
                    *([one.p_helps_holm, one.p_hurts_holm] if corrected else [])]
        rows.append([title(cell), shown(name), _WORDS[one.verdict],
                     *(NONE if p is None else probability(p) for p in p_values),
                     percent(one.detectable), number(one.repeats_for_margin)])
    note = (f"Explanations help where every gain, over A and over the controls, is above 0; they "
            "hurt where a control is better; they make no difference larger than the margin where "
            f"two one-sided tests show every gain over a control to be within {margin}. Could be "
            "shown: the smallest true difference from the controls that these repeats show with "
            f"80 % power. Repeats: how many show {margin}, or that no difference is larger, with "
            "the same power.")
    if corrected:
        note += " Holm: corrected over all verdicts of the job."
    return [Table("verdicts", head, rows, frozenset(range(3, len(head)))), Text(note, "note")]


def _paper_gain(cell: CellEvidence, entry: ApproachEvidence, over: str) -> str:
    published = {other.approach: other.paper for other in cell.approaches}
    accuracy, reference = published.get(entry.approach), published.get(over)
    return NONE if accuracy is None or reference is None else points(accuracy - reference)


def _forest(export: JobExport) -> Figure:
    lines = [(cell, entry, over, gain) for cell, entry in entries(export)
             for over, gain in entry.gains.items()]
    drawing = figure(8.6, 0.9 + 0.27 * len(lines))
    axes = drawing.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    several = len(tested(export)) > 1
    for y, (cell, entry, _, gain) in enumerate(lines):
        style = look(entry.approach, [other.approach for other in cell.approaches])
        axes.plot([100 * gain.low, 100 * gain.high], [y, y], color=style["color"], linewidth=2.2)
        axes.plot([100 * gain.mean], [y], color=style["color"], marker=style["marker"],
                  markersize=7)
        if y and (lines[y - 1][0] is not cell or lines[y - 1][1] is not entry):
            axes.axhline(y - 0.5, color=SOFT, linewidth=0.5)
    axes.set_yticks(range(len(lines)), [
        f"{title(cell) + ': ' if several else ''}{shown(entry.approach)} over "
        f"{OVER.get(over, shown(over))}" for cell, entry, over, _ in lines])
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlabel("gain in test accuracy (points)")
    plain(axes, grid="x")
    return Figure("gains.png", png(drawing), "Gains over A and over the controls with their "
                  "intervals; the line is at zero",
                  "An interval that reaches the line shows no difference.", 860)
