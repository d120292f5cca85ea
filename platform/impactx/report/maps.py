"""Map quality (paper 5.2): MoRF curves, fidelity to the maps that are learned, costs, examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from impactx.evaluation.judgement import MapQuality
from impactx.evaluation.metrics.fidelity import FidelityResult
from impactx.evaluation.metrics.morf import LEAST, RANDOM, MorfResult
from impactx.evaluation.statistics import Estimate
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
from impactx.report.numbers import NONE, Bounds, percent
from impactx.report.results import entries, of_cell, title
from impactx.report.style import INK, SOFT, figure, plain, png, shown
from impactx.results.evidence_records import ApproachEvidence, CellEvidence, MapEvidence, OrderAreas
from impactx.results.export import JobExport
from impactx.storage import StorageError

Arrays = Mapping[str, np.ndarray]
Look = tuple[str, Any, float]
"""The colour, line style and width of an order."""

EXAMPLES = 8  # images of a figure
_LOOKS: dict[str, Look] = {  # the same wherever the order is drawn
    "decoder": ("#0072B2", "-", 2.4), "attention": ("#0072B2", "-", 2.4),
    "shap_predicted": ("#D55E00", "--", 1.8), "shap_true": ("#E69F00", "-.", 1.6),
    "shap_of_a": ("#009E73", (0, (5, 1, 1, 1, 1, 1)), 1.6),
    "mean_map": ("#CC79A7", (0, (3, 1)), 1.6), RANDOM: ("#57606a", ":", 2.0),
    LEAST: ("#1b1f24", (0, (1, 1)), 1.2)}
_OTHERS: list[Look] = [
    ("#56B4E9", "-.", 1.6), ("#000000", (0, (3, 1, 1, 1)), 1.4), ("#999999", "--", 1.4)]
_PREDICTORS = {
    "decoder": "the decoder", "mean_map": "the mean training map, for every image",
    "class_mean_of_true": "the mean map of the true class",
    "class_mean_of_predicted": "the mean map of the predicted class",
    "random_decoder": "a decoder with random weights"}


def map_sections(export: JobExport, arrays: Callable[[str], Arrays | None], missing: list[str]
                 ) -> list[Section]:
    """Return one section for each cell and approach whose maps were judged.

    Args:
        export: The job.
        arrays: Returns what a judgement left for each image, by the step's folder; None where it is
            gone, and StorageError where it is damaged.
        missing: A line is added for each file that is damaged.
    """
    class_names = {(cell.dataset, cell.model): cell.class_names for cell in export.cells}
    folders = {(row.dataset, row.model, row.approach, row.repeat): row.map_quality
               for cell in export.cells for row in cell.rows}
    sections = []
    for cell in export.evidence.cells:
        lost: list[str] = []
        for entry in cell.approaches:
            if entry.maps is None:
                continue
            of_repeat = {repeat: folders.get((cell.dataset, cell.model, entry.approach, repeat))
                         for repeat in entry.repeats}
            judged = _one_model(entry, of_repeat, arrays, lost)
            if judged is not None:
                names = class_names[cell.dataset, cell.model]
                sections.append(Section(f"{title(cell)}: {shown(entry.approach)}", _blocks(
                    cell, entry, entry.maps, names, *judged), level=2))
        missing += of_cell(export, cell, lost)
    if not sections:
        return []
    morf = any(entry.maps and entry.maps.orders for _, entry in entries(export))
    return [Section("Map quality", [Text(
        "MoRF (most relevant first, Samek et al.): the regions of an image are replaced by noise "
        "in the order that a map gives, and the probability of the class that is predicted for the "
        "whole image is followed. The faster it falls, the better the map says what the model "
        "looks at. Every order is judged on the model that its curve is drawn for, beside a random "
        "order and the model's first map read backwards.")] if morf else []), *sections]


def _one_model(entry: ApproachEvidence, folders: Mapping[int, str | None],
               arrays: Callable[[str], Arrays | None], missing: list[str]
               ) -> tuple[int, MapQuality, Arrays | None] | None:
    """Return repeat, judgement and arrays of the model whose curves, costs and examples are shown.

    That is the first repeat whose result and arrays can be read, else the first with a result; None
    where there is none. (Areas and fidelity are over all repeats.)
    """
    judged = [(repeat, quality)
              for repeat, quality in zip(entry.repeats, entry.map_quality, strict=True) if quality]
    for repeat, quality in judged:
        folder = folders.get(repeat)
        try:
            if folder and (of_images := arrays(folder)) is not None:
                return repeat, quality, of_images
        except StorageError as error:
            missing.append(f"{entry.approach} repeat {repeat}: {error}")
    return (*judged[0], None) if judged else None


def _blocks(cell: CellEvidence, entry: ApproachEvidence, maps: MapEvidence, names: Sequence[str],
            repeat: int, quality: MapQuality, arrays: Arrays | None) -> list[Block]:
    """Return what the report shows of one approach's maps."""
    approach, suffix = entry.approach, f"{cell.dataset}-{cell.model}-{entry.approach}"
    blocks: list[Block] = []
    if (morf := quality.of(MorfResult)) is not None and maps.orders:
        levels = maps.orders[RANDOM].aopc.over.replace("images", "test images")
        blocks += [
            Text(sentence(maps, quality, approach), "lead"),
            _curves(morf, approach, repeat, suffix),
            *_areas(maps, quality, morf, approach, suffix),
            Text(f"{quality.images:,} test images, {morf.regions} regions of "
                 f"{morf.region}×{morf.region} pixels. Intervals are over {levels}, paired where "
                 "two orders are compared; forward passes and times are those of repeat "
                 f"{repeat}, in one process.", "note")]
    if maps.fidelity and (fidelity := quality.of(FidelityResult)) is not None:
        blocks.append(_fidelity(maps, fidelity, suffix))
    if rows := _further(maps, quality, approach):
        blocks.append(Table(
            f"map-quality-{suffix}", ["metric", "value", "order", "mean", "interval"], rows,
            frozenset({3, 4}), caption="Further metrics of the maps"))
    if arrays is not None and len(arrays.get("shown", ())):
        blocks.append(_examples(arrays, approach, suffix, names))
    return blocks


def _look(order: str, orders: Sequence[str]) -> Look:
    others = [other for other in orders if other not in _LOOKS]
    return _LOOKS[order] if order in _LOOKS else _OTHERS[others.index(order) % len(_OTHERS)]


def _further(maps: MapEvidence, quality: MapQuality, approach: str) -> list[list[str]]:
    """Return the rows of the metrics that the report has no part of its own for.

    They are over all repeats where the values of each image were kept, else of the one model.
    """
    rows = []
    for metric, result in quality.results.items():
        if isinstance(result, (MorfResult, FidelityResult)):
            continue
        values: Mapping[str, Mapping[str, Bounds]] = maps.metrics.get(metric) or result.values
        rows += [[metric.replace("_", " "), name.replace("_", " "), order_name(order, approach),
                  *estimated(interval).partition(" ")[::2]]
                 for order, of_order in values.items() for name, interval in of_order.items()
                 if interval.mean is not None]
    return rows


def _curves(morf: MorfResult, approach: str, repeat: int, suffix: str) -> Figure:
    drawing = figure(8.6, 3.9)
    axes, orders = drawing.subplots(), list(morf.curves)
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
    return Figure(f"morf-{suffix}.png", png(drawing),
                  "MoRF curves: probability of the predicted class as regions are replaced",
                  f"Repeat {repeat}: means over the images with their intervals; shaded: the first "
                  "16 % of the regions.", 900)


def _areas(maps: MapEvidence, quality: MapQuality, morf: MorfResult, approach: str, suffix: str
           ) -> list[Table]:
    """Return the table of areas over the MoRF curves, and that of further areas and of costs."""
    ordered = sorted(maps.orders, key=lambda order: -maps.orders[order].aopc.mean)
    own = frozenset(i for i, order in enumerate(ordered) if order in OWN)
    explainer = order_name(maps.explainer, approach) if maps.explainer else "explainer"
    head = ["order by", "area", "interval", "over random", "interval", "over the mean map",
            "interval", f"over {explainer}", "interval"]
    rows = [[order_name(order, approach), *_differences(maps.orders[order])] for order in ordered]
    more = ["order by", "area, all regions", "interval", "area, score", "interval",
            "area, score, all regions", "interval", "images with ties %", "forward passes",
            "ms per map"]
    further = [[order_name(order, approach), *_costs(order, maps.orders[order], quality, morf)]
               for order in ordered]
    return [Table(f"morf-{suffix}", head, rows, frozenset(range(1, len(head))), own,
                  "Area over the MoRF curve over the first 16 % of the regions (AOPC), in points "
                  "of probability: larger is better"),
            Table(f"morf-more-{suffix}", more, further, frozenset(range(1, len(more))), own,
                  "The area over all regions, and of the class's score before the softmax; ties "
                  "between regions; the cost of a map")]


def _differences(areas: OrderAreas) -> list[str]:
    cells = [*_bounded(areas.aopc, 100)]
    for gap in (areas.over_random, areas.over_mean_map, areas.over_explainer):
        cells += [signed(gap), signed_bounds(gap)] if gap else [NONE, NONE]
    return cells


def _costs(order: str, areas: OrderAreas, quality: MapQuality, morf: MorfResult) -> list[str]:
    tied, seconds = morf.ties.get(order), quality.seconds_per_map.get(order)
    return [*_bounded(areas.all_regions, 100), *_bounded(areas.logit, 1),
            *_bounded(areas.logit_all_regions, 1),
            NONE if tied is None else f"{100 * tied.images:.0f}",
            str(quality.evaluations_per_map.get(order) or NONE),
            NONE if seconds is None else f"{1000 * seconds:.2f}"]


def _bounded(estimate: Estimate, scale: float) -> tuple[str, str]:
    digits = 1 if scale == 100 else 2
    low, mean, high = (f"{scale * value:.{digits}f}".replace("-", "−")
                       for value in (estimate.low, estimate.mean, estimate.high))
    return mean, f"[{low}, {high}]"


def _fidelity(maps: MapEvidence, fidelity: FidelityResult, suffix: str) -> Table:
    rows = []
    for name, values in maps.fidelity.items():
        correlation = values.get("correlation")
        rows.append([
            _PREDICTORS.get(name, name),
            *(estimated(values.get(measure)) for measure in ("mse", "correlation", "overlap")),
            estimated(correlation.decoder_over if correlation else None, sign=True)])
    head = ["predictor of the map", "MSE", "correlation",
            f"overlap of the top {percent(fidelity.top_share, 0)} %",
            "decoder ahead by (correlation)"]
    return Table(
        f"fidelity-{suffix}", head, rows, frozenset({1, 2, 3, 4}),
        frozenset(i for i, name in enumerate(maps.fidelity) if name == "decoder"),
        f"How well {order_name(fidelity.target, '')} is predicted on test images (maps scaled: "
        f"{fidelity.scale}); the decoder is worth something where it is better than the mean maps")


def _examples(arrays: Arrays, approach: str, suffix: str, names: Sequence[str]) -> Figure:
    """Return rows like those of the paper's figures 3 to 5.

    A row has the image with class and score, the SHAP map, the model's own map and MoRF curves.
    """
    orders = [key.removeprefix("maps.") for key in arrays if key.startswith("maps.")]
    own = [order for order in orders if order in OWN]
    shap = [order for order in orders if order.endswith("_predicted")][:1]
    images, columns = np.asarray(arrays["shown"])[:EXAMPLES], shap + own
    drawn = [order for order in [*columns, RANDOM] if f"curve.{order}" in arrays]  # with MoRF
    limits = {order: colour_limit(arrays[f"maps.{order}"]) for order in columns}
    width = 1.5 * (1 + len(columns)) + (2.6 if drawn else 0.2)
    drawing = figure(width, 1.42 * len(images) + 0.9)
    ratios = [1.0] * (1 + len(columns)) + [1.7] * bool(drawn)
    panels = drawing.subplots(len(images), len(ratios), squeeze=False,
                              gridspec_kw={"width_ratios": ratios})
    for i, (row, image) in enumerate(zip(panels, images, strict=True)):
        predicted, label = int(arrays["predicted"][image]), int(arrays["labels"][image])
        row[0].imshow(arrays["images"][i], interpolation="nearest")
        score = f" {arrays[f'curve.{drawn[0]}'][image, 0]:.2f}" if drawn else ""
        wrong = "" if predicted == label else f"\n(is {_short(names[label])})"
        row[0].set_title(f"{_short(names[predicted])}{score}{wrong}", fontsize=9)
        for panel, order in zip(row[1:], columns, strict=False):
            panel.imshow(arrays[f"maps.{order}"][i].sum(0), cmap=COLOURS, vmin=-limits[order],
                         vmax=limits[order], interpolation="nearest")
            if i == 0:
                panel.set_title(order_name(order, approach).replace(
                    " of this model,", "\n").replace("'s ", "'s\n"), fontsize=8.5, color=SOFT)
        for panel in row[:1 + len(columns)]:
            panel.set_axis_off()
        if drawn:
            _small_curves(row[-1], arrays, drawn, int(image), approach, first=i == 0,
                          last=i == len(images) - 1)
    caption = (
        "Test images, one of each class first, none picked by hand. Red speaks for the class that "
        "a map explains, blue against it: the predicted class in the maps by SHAP, the true class "
        "in those that a decoder learns; attention has no sign. Each column has one scale, "
        "symmetric around zero.")
    if drawn:
        caption += (" Right: the MoRF curves of the image (probability of the predicted class over "
                    "the regions replaced).")
    alt = "Test images with their class" + (
        " and score, maps and MoRF curves" if drawn else " and maps")
    return Figure(f"examples-{suffix}.png", png(drawing), alt, caption, int(100 * width))


def _short(name: str) -> str:
    return name if len(name) <= 16 else name[:15] + "…"


def _small_curves(axes: Any, arrays: Arrays, orders: Sequence[str], image: int, approach: str, *,
                  first: bool, last: bool) -> None:
    for order in orders:
        colour, dash, width = _look(order, orders)
        curve = arrays[f"curve.{order}"][image]
        axes.plot(np.linspace(0, 100, len(curve)), curve, color=colour, linestyle=dash,
                  linewidth=0.75 * width, label=order_name(order, approach))
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 100)
    axes.set_yticks([0, 1])
    plain(axes)
    axes.tick_params(labelsize=7.5, labelbottom=last, colors=INK)
    if first:
        axes.legend(fontsize=7.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1.0))
    if last:
        axes.set_xlabel("regions replaced (%)", fontsize=8)
