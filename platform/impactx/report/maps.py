"""The quality of maps: MoRF curves, fidelity to what they learn, what one costs, and examples (paper, 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.metrics.fidelity import FidelityResult
from impactx.evaluation.metrics.morf import LEAST, RANDOM, MorfResult
from impactx.explain.maps.sheet import COLOURS, colour_limit
from impactx.report.blocks import Block, Figure, Section, Table, Text
from impactx.report.map_words import (
    OWN,
    estimated,
    order_name,
    sentence,
    signed,
    signed_bounds,
)
from impactx.report.numbers import NONE, percent
from impactx.report.results import named, of_cell
from impactx.report.style import INK, SOFT, figure, plain, png, shown
from impactx.storage import StorageError

Arrays = Mapping[str, np.ndarray]
EXAMPLES = 8  # images of a figure
# Colour, line style and width of an order: its own colour and dash wherever it is drawn.
_LOOKS: dict[str, tuple[str, Any, float]] = {
    "decoder": ("#0072B2", "-", 2.4), "attention": ("#0072B2", "-", 2.4), "shap_predicted": ("#D55E00", "--", 1.8),
    "shap_true": ("#E69F00", "-.", 1.6), "shap_of_a": ("#009E73", (0, (5, 1, 1, 1, 1, 1)), 1.6),
    "mean_map": ("#CC79A7", (0, (3, 1)), 1.6), RANDOM: ("#57606a", ":", 2.0), LEAST: ("#1b1f24", (0, (1, 1)), 1.2)}
_OTHERS = [("#56B4E9", "-.", 1.6), ("#000000", (0, (3, 1, 1, 1)), 1.4), ("#999999", "--", 1.4)]


def map_sections(export: Mapping[str, Any], arrays: Callable[[str], Arrays | None], missing: list[str]
                 ) -> list[Section]:
    """One part for each cell and approach whose maps were judged.

    arrays: what a unit that judged maps left, image by image, by its folder; None where it is gone, StorageError where
    it is damaged: then a line is added to missing.
    """
    folders = {(row["dataset"], row["model"], row["approach"], row["repeat"]): row.get("map_quality")
               for cell in export["cells"] for row in cell["rows"]}
    made = []
    for cell in export["evidence"]["cells"]:
        lost: list[str] = []
        for entry in cell["approaches"]:
            if entry["maps"] and (found := _one_model(cell, entry, folders, arrays, lost)):
                made.append(Section(f"{named(cell)}: {shown(entry['approach'])}", _judged(
                    entry, f"{cell['dataset']}-{cell['model']}-{entry['approach']}", cell_names(export, cell), *found),
                    level=2))
        missing += of_cell(export, cell, lost)
    if not made:
        return []
    morf = any(entry["maps"] and entry["maps"]["orders"]
               for cell in export["evidence"]["cells"] for entry in cell["approaches"])
    return [Section("Map quality", [Text(
        "MoRF (most relevant first, Samek et al.): the regions of an image are replaced by noise in the order that a "
        "map gives, and the probability of the class predicted for the whole image is followed. The faster it falls, "
        "the better the map says what the model looks at. Every order is judged on the model that it is drawn for, "
        "beside random order and the model's first map read backwards.")] if morf else []), *made]


def _one_model(cell: Mapping[str, Any], entry: Mapping[str, Any], folders: Mapping[tuple[Any, ...], str | None],
               arrays: Callable[[str], Arrays | None], missing: list[str]
               ) -> tuple[int, MapQuality, Arrays | None] | None:
    """Curves, costs and examples are those of one model (areas and fidelity are over all repeats): the first repeat
    whose result and arrays are there, else the first with a result; None where there is none.
    """
    judged = [(repeat, MapQuality.from_json(result))
              for repeat, result in zip(entry["repeats"], entry["map_quality"], strict=True) if result]
    for repeat, result in judged:
        folder = folders.get((cell["dataset"], cell["model"], entry["approach"], repeat))
        try:
            if folder and (found := arrays(folder)) is not None:
                return repeat, result, found
        except StorageError as error:
            missing.append(f"{entry['approach']} repeat {repeat}: {error}")
    return (*judged[0], None) if judged else None


def cell_names(export: Mapping[str, Any], cell: Mapping[str, Any]) -> list[str]:
    """The class names of a cell of the evidence."""
    return next(c["class_names"] for c in export["cells"]
                if (c["dataset"], c["model"]) == (cell["dataset"], cell["model"]))


def _judged(entry: Mapping[str, Any], tail: str, names: list[str], repeat: int, quality: MapQuality,
            arrays: Arrays | None) -> list[Block]:
    approach, maps = entry["approach"], entry["maps"]
    blocks: list[Block] = []
    if (morf := quality.of(MorfResult)) is not None and maps["orders"]:
        blocks += [
            Text(sentence(maps, quality, approach), "lead"), _curves(morf, approach, repeat, tail),
            *_aopc(maps, quality, morf, approach, tail),
            Text(f"{quality.images:,} test images, {morf.regions} regions of {morf.region}×{morf.region} "
                 f"pixels. Intervals are over {maps['orders'][RANDOM]['aopc']['over'].replace('images', 'test images')}"
                 ", paired where two orders are compared; forward passes and times are those of repeat "
                 f"{repeat}, in one process.", "note")]
    if maps["fidelity"] and (fidelity := quality.of(FidelityResult)) is not None:
        blocks.append(_fidelity(maps, fidelity, tail))
    if rows := _further(maps, quality, approach):
        blocks.append(Table(f"map-quality-{tail}", ["metric", "value", "order", "mean", "interval"], rows,
                            frozenset({3, 4}), caption="Further metrics of the maps"))
    if arrays is not None and len(arrays.get("shown", ())):
        blocks.append(_examples(arrays, approach, tail, names))
    return blocks


def _look(order: str, orders: list[str]) -> tuple[str, Any, float]:
    others = [o for o in orders if o not in _LOOKS]
    return _LOOKS[order] if order in _LOOKS else _OTHERS[others.index(order) % len(_OTHERS)]


def _further(maps: Mapping[str, Any], quality: MapQuality, approach: str) -> list[list[str]]:
    """Return the rows of the metrics that the report has no part of its own for.

    They are over all repeats where the values of each image were kept, else of the one model.
    """
    rows = []
    for metric, result in quality.results.items():
        if isinstance(result, (MorfResult, FidelityResult)):
            continue
        values = maps["metrics"].get(metric) or {
            order: {name: interval.model_dump() for name, interval in named.items()}
            for order, named in result.values.items()}
        rows += [[metric.replace("_", " "), name.replace("_", " "), order_name(order, approach),
                  *estimated(interval).partition(" ")[::2]]
                 for order, named in values.items() for name, interval in named.items()
                 if interval["mean"] is not None]
    return rows


def _curves(morf: MorfResult, approach: str, repeat: int, tail: str) -> Figure:
    made = figure(8.6, 3.9)
    axes, orders = made.subplots(), list(morf.curves)
    share = 100 * np.arange(morf.regions + 1) / morf.regions
    axes.axvspan(0, share[morf.early_regions], color="#eef1f4", linewidth=0)
    for order in orders:
        colour, dash, width = _look(order, orders)
        band = morf.curves[order].probability
        axes.fill_between(share, band.low, band.high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(share, band.mean, color=colour, linestyle=dash, linewidth=width,
                  label=order_name(order, approach))
    axes.set_xlabel("regions replaced by noise (%)")
    axes.set_ylabel("probability of the predicted class")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plain(axes, grid="y")
    return Figure(f"morf-{tail}.png", png(made), "MoRF curves: probability of the predicted class as regions go",
                  f"Repeat {repeat}: means over the images with their intervals; shaded: the first 16 % of the "
                  "regions.", 900)


def _aopc(maps: Mapping[str, Any], quality: MapQuality, morf: MorfResult, approach: str, tail: str) -> list[Table]:
    rows, further = [], []
    for order in sorted(maps["orders"], key=lambda o: -maps["orders"][o]["aopc"]["mean"]):
        of, seconds = maps["orders"][order], quality.seconds_per_map.get(order)
        row = [order_name(order, approach), *_bounded(of["aopc"], 100)]
        for gap in (of["over_random"], of["over_mean_map"], of["over_explainer"]):
            row += [signed(gap["mean"]), signed_bounds(gap)] if gap else [NONE, NONE]
        rows.append(row)
        tied = morf.ties.get(order)
        further.append([row[0], *(text for key, scale in (("all_regions", 100), ("logit", 1), ("logit_all_regions", 1))
                                  for text in _bounded(of[key], scale)),
                        NONE if tied is None else f"{100 * tied.images:.0f}",
                        str(quality.evaluations_per_map.get(order) or NONE),
                        NONE if seconds is None else f"{1000 * seconds:.2f}"])
    explainer = order_name(maps["explainer"], approach) if maps["explainer"] else "explainer"
    own = frozenset(i for i, row in enumerate(rows) if row[0] in {order_name(o, approach) for o in OWN})
    head = ["order by", "area", "interval", "over random", "interval", "over the mean map", "interval",
            f"over {explainer}", "interval"]
    more = ["order by", "area, all regions", "interval", "area, score", "interval", "area, score, all regions",
            "interval", "images with ties %", "forward passes", "ms a map"]
    return [Table(f"morf-{tail}", head, rows, frozenset(range(1, len(head))), own,
                  "Area over the MoRF curve over the first 16 % of the regions (AOPC), in points of probability: "
                  "larger is better"),
            Table(f"morf-more-{tail}", more, further, frozenset(range(1, len(more))), own,
                  "The same over all regions, and of the class's score before the softmax; ties between regions; "
                  "what a map costs")]


def _bounded(of: Mapping[str, float], scale: float) -> tuple[str, str]:
    digits = 1 if scale == 100 else 2
    low, mean, high = (f"{scale * of[key]:.{digits}f}".replace("-", "−") for key in ("low", "mean", "high"))
    return mean, f"[{low}, {high}]"


_PREDICTORS = {"decoder": "the decoder", "mean_map": "the mean training map, for every image",
               "class_mean_of_true": "the mean map of the true class",
               "class_mean_of_predicted": "the mean map of the predicted class",
               "random_decoder": "a decoder with random weights"}


def _fidelity(maps: Mapping[str, Any], fidelity: FidelityResult, tail: str) -> Table:
    measures = ("mse", "correlation", "overlap")
    rows = [[_PREDICTORS.get(name, name), *(estimated(of.get(measure)) for measure in measures),
             estimated((of.get("correlation") or {}).get("decoder_over"), sign=True)]
            for name, of in maps["fidelity"].items()]
    return Table(f"fidelity-{tail}", ["predictor of the map", "MSE", "correlation",
                                      f"overlap of the top {percent(fidelity.top_share, 0)} %",
                                      "decoder ahead by (correlation)"], rows,
                 frozenset({1, 2, 3, 4}), frozenset(i for i, name in enumerate(maps["fidelity"]) if name == "decoder"),
                 f"How well {order_name(fidelity.target, '')} is predicted on test images (maps scaled: "
                 f"{fidelity.scale}); the decoder is worth something where it beats the mean maps")


def _examples(arrays: Arrays, approach: str, tail: str, names: list[str]) -> Figure:
    """Rows like those of the paper's figures 3 to 5: image, class and score, SHAP map, own map, MoRF curves."""
    orders = [key.removeprefix("maps.") for key in arrays if key.startswith("maps.")]
    own = [order for order in orders if order in OWN]
    shap = [order for order in orders if order.endswith("_predicted")][:1]
    places, columns = np.asarray(arrays["shown"])[:EXAMPLES], shap + own
    drawn = [order for order in [*columns, RANDOM] if f"curve.{order}" in arrays]  # none without MoRF
    limits = {order: colour_limit(arrays[f"maps.{order}"]) for order in columns}
    wide = 1.5 * (1 + len(columns)) + (2.6 if drawn else 0.2)
    made = figure(wide, 1.42 * len(places) + 0.9)
    ratios = [1.0] * (1 + len(columns)) + [1.7] * bool(drawn)
    panels = made.subplots(len(places), len(ratios), squeeze=False, gridspec_kw={"width_ratios": ratios})
    for i, (row, place) in enumerate(zip(panels, places, strict=True)):
        predicted, label = int(arrays["predicted"][place]), int(arrays["labels"][place])
        row[0].imshow(arrays["images"][i], interpolation="nearest")
        score = f" {arrays[f'curve.{drawn[0]}'][place, 0]:.2f}" if drawn else ""
        row[0].set_title(f"{_short(names[predicted])}{score}"
                         + ("" if predicted == label else f"\n(is {_short(names[label])})"), fontsize=9)
        for panel, order in zip(row[1:], columns, strict=False):
            panel.imshow(arrays[f"maps.{order}"][i].sum(0), cmap=COLOURS, vmin=-limits[order], vmax=limits[order],
                         interpolation="nearest")
            if i == 0:
                panel.set_title(order_name(order, approach).replace(" of this model,", "\n").replace("'s ", "'s\n"),
                                fontsize=8.5, color=SOFT)
        for panel in row[:1 + len(columns)]:
            panel.set_axis_off()
        if drawn:
            _small_curves(row[-1], arrays, drawn, int(place), approach, first=i == 0, last=i == len(places) - 1)
    return Figure(f"examples-{tail}.png", png(made), "Test images with their class"
                  + (" and score, maps and MoRF curves" if drawn else " and maps"),
                  "Test images, one of each class first, none picked by hand. Red speaks for the class that a "
                  "map explains, blue against it: the predicted one in SHAP's, the true one in those that a decoder "
                  "learns; attention has no sign. Each column has one scale, symmetric around zero."
                  + (" Right: this image's MoRF curves (probability of the predicted class over the regions "
                     "replaced)." if drawn else ""), int(100 * wide))


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _small_curves(axes: Any, arrays: Arrays, orders: list[str], place: int, approach: str, *, first: bool,
                  last: bool) -> None:
    for order in orders:
        colour, dash, width = _look(order, orders)
        curve = arrays[f"curve.{order}"][place]
        axes.plot(np.linspace(0, 100, len(curve)), curve, color=colour, linestyle=dash, linewidth=0.75 * width,
                  label=order_name(order, approach))
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 100)
    axes.set_yticks([0, 1])
    plain(axes)
    axes.tick_params(labelsize=7.5, labelbottom=last, colors=INK)
    if first:
        axes.legend(fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    if last:
        axes.set_xlabel("regions replaced (%)", fontsize=8)
