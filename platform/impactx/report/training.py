"""The final trainings' curves, and what everything cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from impactx.report.blocks import Figure, Section, Table, Text
from impactx.report.numbers import NONE, quantity
from impactx.report.results import named
from impactx.report.style import figure, look, plain, png, shown
from impactx.timing import duration


def curve_sections(export: Mapping[str, Any]) -> list[Section]:
    """Validation accuracy over the epochs of every final training."""
    figures = [f for cell in export["cells"] if (f := _curves(cell)) is not None]
    return [Section("Training", [*figures, Text(
        "One line for each repeat; the dot is the best epoch, whose weights are kept. Training ends when the "
        "validation accuracy has not risen for as many epochs as training.patience says.", "note")])] if figures else []


def _curves(cell: Mapping[str, Any]) -> Figure | None:
    models = [u for u in cell["units"] if u["role"] == "model" and u["result"] and u["result"].get("history")]
    if not models:
        return None
    approaches = list(dict.fromkeys(u["params"]["approach"] for u in models))
    made = figure(8.6, 3.3)
    axes = made.subplots()
    for unit in models:
        rows, name = unit["result"]["history"], unit["params"]["approach"]
        style = look(name, approaches)
        label = shown(name) if unit is next(u for u in models if u["params"]["approach"] == name) else None
        axes.plot([row["epoch"] for row in rows], [100 * row["val_accuracy"] for row in rows], color=style["color"],
                  linestyle=style["linestyle"], linewidth=1.4, label=label)
        # An ensemble's best value is that of both its members, the curve the second's alone: no dot on that.
        best = unit["result"]["best"]
        if best and any(row["epoch"] == best.get("epoch") and row["val_accuracy"] == best["val_accuracy"]
                        for row in rows):
            axes.plot([best["epoch"]], [100 * best["val_accuracy"]], color=style["color"], marker=style["marker"],
                      markersize=6)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(named(cell), loc="left", fontsize=10.5)
    axes.legend(fontsize=8.5, frameon=False, loc="lower right")
    plain(axes, grid="y")
    return Figure(f"training-{cell['dataset']}-{cell['model']}.png", png(made),
                  f"Validation accuracy over the epochs of the final trainings of {named(cell)}", width=860)


def cost_sections(export: Mapping[str, Any]) -> list[Section]:
    """How many trainings, maps and readings of the test set there were, and their time."""
    rows = []
    for cell in export["cells"]:
        steps: dict[str, list[Mapping[str, Any]]] = {}
        for unit in cell["units"]:
            if unit["result"]:
                steps.setdefault(_step(unit), []).append(unit)
        rows += [[named(cell), step, str(len(units)), _amount(units), *_times(units)] for step, units in steps.items()]
    if not rows:
        return []
    head = ["cell", "step", "finished", "amount", "time in all", "time of each"]
    return [Section("Costs", [Table("costs", head, rows, frozenset({2, 3, 4, 5})), *_test_maps(export), Text(
        "Times are those of the processes that did the work, added up: several at once make the wait shorter than the "
        "sum; of a store of maps of which an earlier job had made a part, those of all maps at the pace of the rest. A "
        "step that an earlier job had finished counts with the time that it took then.", "note")])]


def _test_maps(export: Mapping[str, Any]) -> list[Text]:
    """What approaches cost at test time that need a map of every image."""
    found = {(cell["dataset"], cell["model"], row["approach"]): row["map_seconds"]
             for cell in export["cells"] for row in cell["rows"] if row.get("map_seconds") is not None}
    return [Text(f"{dataset} × {model}: each prediction of {shown(approach)} needs a map of the image first: "
                 f"{seconds:.3f} s in one process.") for (dataset, model, approach), seconds in found.items()]


def _step(unit: Mapping[str, Any]) -> str:
    if unit["role"] == "trial":
        return f"search, {unit['step']}"
    if unit["role"] == "model":
        return f"final trainings, {shown(unit['params']['approach'])}"
    # Stores of the same kind, one a repeat: of other attributions, targets or images they cost something else.
    return unit["name"].rpartition(" repeat ")[0] or unit["name"] if unit["role"] == "maps" else str(unit["role"])


def _amount(units: list[Mapping[str, Any]]) -> str:
    results = [u["result"] for u in units]
    if "epochs" in results[0]:
        return f"{quantity(sum(r['epochs'] for r in results))} epochs"
    return f"{quantity(sum(r['images'] for r in results))} images" if "images" in results[0] else NONE


def _times(units: list[Mapping[str, Any]]) -> tuple[str, str]:
    results = [u["result"] for u in units]
    if units[0]["role"] == "maps":
        known = [r for r in results if r.get("process_seconds")]
        if not known:  # of an earlier version
            return NONE, NONE
        seconds = sum(r["process_seconds"] for r in known)
        rate = sum(r["images"] for r in known) / seconds
        return (NONE if len(known) < len(results) else duration(seconds)), f"{rate:.1f} maps/s"
    seconds_of = [r["seconds"] for r in results if "seconds" in r]
    if not seconds_of:
        return NONE, NONE
    return duration(sum(seconds_of)), duration(sum(seconds_of) / len(seconds_of))
