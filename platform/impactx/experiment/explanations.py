"""The judgement of a final model's maps on test images: MoRF curves, fidelity to what they learn, and their cost.

The unit reads the test images after the test unit has: it chooses nothing, it only describes a finished model.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from impactx.datasets.splits import stratified_draw
from impactx.evaluation import fidelity, morf
from impactx.evaluation.statistics import interval_of_mean
from impactx.experiment.model_source import open_model
from impactx.experiment.subject import (
    Learned,
    Subject,
    add_explained_maps,
    add_own_maps,
    network_maps,
    own_network,
)
from impactx.experiment.units import MAP_SCORES, Unit, WorkError
from impactx.experiment.workplace import Workplace
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.partition.fast import fast_score
from impactx.explain.precision import forward_precision
from impactx.settings import EvaluationSettings

SHOWN = 20  # images whose maps are kept for figures, one a class first
RANDOM, LEAST = "random", "least_relevant_first"


def judge_maps(unit: Unit, place: Workplace, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Judge a final model's maps; keeps the result and, image by image, map_scores.npz.

    The result, where an *interval* is {mean, low, high} over the images and a part is "early" (the first 16 % of the
    regions) or "all":

        images, region (side in pixels), regions, early_regions, over ("images": what the intervals cover), seconds
        morf      by order
          probability, logit        of the class predicted for the whole image, with k regions replaced: an interval
                                    of lists, k = 0 ... regions
          aopc                      {probability, logit: {part: interval}}: larger, the class is lost sooner
          aopc_over_random          the same of the paired difference; aopc_over_<order> over the explainer's map of
                                    the predicted class
          tied_images, tied_regions share of images with regions of equal relevance, and their mean number
        fidelity  None for a model without a decoder, or without the orders own and of_a; else
          target, scale, top_share
          predictors                by name {mse, correlation, overlap: interval and images (that have the measure)}
        seconds_per_map, evaluations_per_map    by order, of maps that were made here

    Orders: decoder or attention (the model's own), <attribution>_predicted and <attribution>_true (of the model
    itself), <attribution>_of_a (of A for the true class), with shap for the partition explainer; mean_map, random, and
    least_relevant_first (of the first order that there is).

    map_scores.npz: rows (in the test set), labels, predicted, all (n,); aopc.<order>.<probability or logit>.<part>
    (n,); curve.<order>, float32 (n, regions + 1), probabilities; fidelity.<predictor>.<measure> (n,); shown: places
    among the n whose images (uint8) and maps.<order> (float32) are kept.
    Raises WorkError.
    """
    torch.set_num_threads(place.threads)
    keep_freed_memory()
    if (done := place.artifacts.result(unit)) is not None:
        return done
    started, where = time.perf_counter(), torch.device(device)
    settings = EvaluationSettings.model_validate(unit.recipe["evaluation"])
    data = place.dataset(unit.inputs["dataset"])
    test = data.load_test()
    count = images_judged(settings, len(test.labels), len(np.unique(test.labels)))
    rows = stratified_draw(test.labels, count, settings.seed)
    subject = Subject(unit, place, where, settings, rows, test.images[rows], np.asarray(test.labels[rows], np.int64))
    arrays: dict[str, np.ndarray] = {"rows": rows, "labels": subject.labels}
    with forward_precision("float32", where):  # as maps are made: TF32 is for training
        result = _judge(subject, arrays)
    result |= {"images": len(rows), "over": "images", "seconds_per_map": subject.seconds,
               "evaluations_per_map": subject.evaluations, "seconds": time.perf_counter() - started}
    _keep_shown(subject, arrays)
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    place.artifacts.finish(unit, result, {MAP_SCORES: stream.getvalue()})
    return result


def images_judged(settings: EvaluationSettings, test_images: int, classes: int) -> int:
    """How many of so many test images of so many classes are drawn: one a class at least."""
    return max(min(settings.map_images, test_images), classes)


def _judge(subject: Subject, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Make the maps, and judge them."""
    unit, place = subject.unit, subject.place
    model = open_model({"kind": "unit", "folder": unit.inputs["checkpoint"]}, place, unit.recipe["weights"])
    # The frozen form is about twice as fast on a CPU; there are thousands of forwards for each image.
    score = fast_score(model.to(subject.device), tuple(subject.pixels.shape[1:]), split=False)  # type: ignore[arg-type]
    with torch.no_grad():
        scores = torch.cat([score(part) for part in subject.pixels.split(subject.batch_size)])
    subject.predicted = arrays["predicted"] = scores.argmax(1).cpu().numpy()
    learned = Learned.of(unit, place)
    own = add_own_maps(subject)
    add_explained_maps(subject, model, learned)
    if learned is not None and "mean_map" in subject.settings.orders:
        subject.maps["mean_map"] = np.broadcast_to(learned.mean.astype(np.float32),
                                                   (len(subject.rows), *learned.mean.shape))
    found = _morf(subject, score, arrays)
    found["fidelity"] = None if own != "decoder" or learned is None else _fidelity(subject, own, learned, arrays)
    return found


def _morf(subject: Subject, score: Any, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    settings, rows = subject.settings, subject.rows
    size = subject.images.shape[1:3]
    try:
        grid = morf.grid_of((size[0], size[1]), settings.region)
    except ValueError as error:
        raise WorkError(f"evaluation.region: {error}") from error
    values = {name: morf.relevance(maps, grid) for name, maps in subject.maps.items()}
    orders = {name: morf.most_relevant_first(v) for name, v in values.items()}
    orders[RANDOM] = morf.random_order(rows, grid, settings.seed)
    if values:
        orders[LEAST] = morf.most_relevant_first(-next(iter(values.values())))
    noise = morf.noise_of(rows, (subject.images.shape[3], size[0], size[1]), settings.seed)
    try:
        found = morf.curves(score, subject.pixels, torch.from_numpy(noise).to(subject.device), orders, grid,
                            batch_size=subject.batch_size)
    except ValueError as error:
        raise WorkError(f"{subject.unit.name}: {error}") from error
    areas = {name: {"probability": _areas(c.probability, grid), "logit": _areas(c.logit, grid)}
             for name, c in found.items()}
    against = [RANDOM] + [name for name in values if name.endswith("_predicted")][:1]
    described: dict[str, Any] = {}
    for name, c in found.items():
        described[name] = {
            "probability": _band(c.probability, settings), "logit": _band(c.logit, settings),
            "aopc": _each(areas[name], settings)}
        for other in against:
            if other != name:
                described[name][f"aopc_over_{other}"] = _each(
                    {q: {p: areas[name][q][p] - areas[other][q][p] for p in areas[name][q]} for q in areas[name]},
                    settings)
        if name in values:
            tied = morf.ties(values[name])
            described[name] |= {"tied_images": float((tied > 0).mean()),
                                "tied_regions": float(tied[tied > 0].mean()) if tied.any() else 0.0}
        arrays[f"curve.{name}"] = c.probability.astype(np.float32)
        arrays |= {f"aopc.{name}.{q}.{p}": v for q, parts in areas[name].items() for p, v in parts.items()}
    return {"morf": described, "region": grid.side, "regions": grid.count, "early_regions": grid.early}


def _areas(curve: np.ndarray, grid: morf.Grid) -> dict[str, np.ndarray]:
    return {"early": morf.aopc(curve, grid.early), "all": morf.aopc(curve, grid.count)}


def _band(values: np.ndarray, settings: EvaluationSettings) -> dict[str, list[float]]:
    low, high = interval_of_mean(values, resamples=settings.resamples, seed=settings.seed,
                                 confidence=settings.confidence)
    return {"mean": values.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}


def _interval(values: np.ndarray, settings: EvaluationSettings) -> dict[str, float | None]:
    band = _band(values[:, None], settings) if len(values) else {"mean": [None], "low": [None], "high": [None]}
    return {key: value[0] for key, value in band.items()}


def _each(areas: Mapping[str, Mapping[str, np.ndarray]], settings: EvaluationSettings) -> dict[str, Any]:
    return {quantity: {part: _interval(values, settings) for part, values in parts.items()}
            for quantity, parts in areas.items()}


def _fidelity(subject: Subject, own: str, learned: Learned, arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """The decoder's maps against those that it learns, beside predictors that do not look at the image."""
    target = f"{learned.attribution.title}_of_a"
    if target not in subject.maps:
        return None
    truth = learned.scaled(subject.maps[target])
    random_decoder = fidelity.randomised(own_network(subject), "decoder", subject.settings.seed)
    predictors = {
        own: subject.maps[own], "mean_map": np.broadcast_to(learned.mean, truth.shape),
        "class_mean_of_true": learned.by_class[subject.labels],
        "class_mean_of_predicted": learned.by_class[subject.predicted],
        "random_decoder": network_maps(random_decoder, subject)}
    described: dict[str, Any] = {}
    for name, maps in predictors.items():
        described[name] = {}
        for measure, values in fidelity.agreement(maps, truth).items():
            usable = values[np.isfinite(values)]  # a constant map has no correlation
            described[name][measure] = _interval(usable, subject.settings) | {"images": len(usable)}
            arrays[f"fidelity.{name}.{measure}"] = values
    return {"target": target, "scale": learned.how, "top_share": fidelity.TOP_SHARE, "predictors": described}


def _keep_shown(subject: Subject, arrays: dict[str, np.ndarray]) -> None:
    _, first = np.unique(subject.labels, return_index=True)
    others = np.setdiff1d(np.arange(len(subject.labels)), first)
    shown = np.concatenate([first, others])[:SHOWN]
    arrays |= {"shown": shown, "images": subject.images[shown]}
    arrays |= {f"maps.{name}": np.ascontiguousarray(maps[shown], np.float32) for name, maps in subject.maps.items()}


def map_metrics(result: Mapping[str, Any]) -> dict[str, float]:
    """What a table of runs shows of a judgement: areas of the predicted class's probability, fidelity, costs."""
    found = {f"morf_aopc_{name}": order["aopc"]["probability"]["early"]["mean"]
             for name, order in result["morf"].items()}
    found |= {f"morf_aopc_all_{name}": order["aopc"]["probability"]["all"]["mean"]
              for name, order in result["morf"].items()}
    predictors = (result["fidelity"] or {"predictors": {}})["predictors"]
    found |= {f"fidelity_{measure}_{name}": value["mean"] for name, measures in predictors.items()
              for measure, value in measures.items() if value["mean"] is not None}
    return found | {f"seconds_per_map_{name}": value for name, value in result["seconds_per_map"].items()} | {
        "map_images": float(result["images"])}
