"""The curves of the final trainings, and what everything cost."""

from __future__ import annotations

from collections.abc import Sequence

from impactx.experiment.steps.base import Result
from impactx.experiment.steps.maps import Maps, MapsResult
from impactx.experiment.steps.training import Model, Trial
from impactx.report.blocks import Figure, Section, Table, Text
from impactx.report.numbers import NONE, quantity
from impactx.report.results import title
from impactx.report.style import figure, look, plain, png, shown
from impactx.results.export import CellExport, JobExport, StepExport
from impactx.timing import duration


def curve_sections(export: JobExport) -> list[Section]:
    """Return the validation accuracy over the epochs of every final training.

    Args:
        export: The job.
    """
    figures = [one for cell in export.cells if (one := _curves(cell)) is not None]
    return [Section("Training", [*figures, Text(
        "There is one line for each repeat. The dot marks the best epoch, whose weights are kept. "
        "A training ends when the validation accuracy has not risen for as many epochs as "
        "training.patience says.", "note")])] if figures else []


def _curves(cell: CellExport) -> Figure | None:
    models = [(str(step.parameters["approach"]), result) for step in cell.steps
              if step.kind == Model.kind and (result := step.training) and result.history]
    if not models:
        return None
    approaches = list(dict.fromkeys(approach for approach, _ in models))
    labelled: set[str] = set()
    drawing = figure(8.6, 3.3)
    axes = drawing.subplots()
    for approach, result in models:
        style = look(approach, approaches)
        axes.plot([row["epoch"] for row in result.history],
                  [_percent(row["val_accuracy"]) for row in result.history],
                  color=style["color"], linestyle=style["linestyle"], linewidth=1.4,
                  label=None if approach in labelled else shown(approach))
        labelled.add(approach)
        # The best value of an ensemble is that of both its members, and the curve that of the
        # second alone: then no dot lies on the curve.
        best = result.best
        if best and any(row["epoch"] == best.get("epoch")
                        and row["val_accuracy"] == best["val_accuracy"] for row in result.history):
            axes.plot([best["epoch"]], [_percent(best["val_accuracy"])], color=style["color"],
                      marker=style["marker"], markersize=6)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(title(cell), loc="left", fontsize=10.5)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    plain(axes, grid="y")
    return Figure(f"training-{cell.dataset}-{cell.model}.png", png(drawing),
                  f"Validation accuracy over the epochs of the final trainings of {title(cell)}",
                  width=860)


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def cost_sections(export: JobExport) -> list[Section]:
    """Return how many steps of each sort were done, and their time.

    Args:
        export: The job.
    """
    rows = []
    for cell in export.cells:
        groups: dict[str, list[Result]] = {}
        for step in cell.steps:
            if step.result is not None:
                groups.setdefault(_sort(step), []).append(step.result)
        rows += [[title(cell), sort, str(len(results)), _amount(results), *_times(results)]
                 for sort, results in groups.items()]
    if not rows:
        return []
    head = ["cell", "step", "finished", "amount", "time in all", "time of each"]
    return [Section("Costs", [
        Table("costs", head, rows, frozenset({2, 3, 4, 5})), *_test_maps(export), Text(
            "Times are summed over the processes that did the work: where several work at once, "
            "the job takes less than the sum. Where an earlier job had made a part of the maps, "
            "their time is estimated from the speed of the others. A step that an earlier job had "
            "finished counts with the time that it took then.", "note")])]


def _test_maps(export: JobExport) -> list[Text]:
    """Return the cost at test time of approaches that need a map of every image."""
    seconds = {(row.dataset, row.model, row.approach): row.map_seconds
               for cell in export.cells for row in cell.rows if row.map_seconds is not None}
    return [Text(f"{dataset} × {model}: each prediction of {shown(approach)} needs a map of the "
                 f"image first: {value:.3f} s in one process.")
            for (dataset, model, approach), value in seconds.items()]


def _sort(step: StepExport) -> str:
    """Return how the table of costs names a step and those that are counted with it."""
    if step.kind == Trial.kind:
        return f"search, {step.group}" if step.search else "search"
    if step.kind == Model.kind:
        return f"final trainings, {shown(step.parameters['approach'])}"
    if step.kind == Maps.kind:
        # One store for each repeat; other attributions, targets or images have other costs.
        return step.name.rpartition(" repeat ")[0] or step.name
    return step.kind


def _amount(results: Sequence[Result]) -> str:
    """Return the number of epochs or images, where the kind of step counts them."""
    for unit in ("epochs", "images"):
        amounts = [getattr(result, unit, None) for result in results]
        if amounts[0] is not None:
            return f"{quantity(sum(amount or 0 for amount in amounts))} {unit}"
    return NONE


def _times(results: Sequence[Result]) -> tuple[str, str]:
    stores = [result for result in results if isinstance(result, MapsResult)]
    if not stores:
        seconds = sum(result.seconds for result in results)
        return duration(seconds), duration(seconds / len(results))
    timed = [(store.images, store.process_seconds) for store in stores if store.process_seconds]
    if not timed:
        return NONE, NONE
    seconds = sum(of_store for _, of_store in timed)
    speed = sum(images for images, _ in timed) / seconds
    return NONE if len(timed) < len(stores) else duration(seconds), f"{speed:.1f} maps/s"
