"""The step that judges a final model's maps on test images, by `impactx.evaluation.judgement`.

It reads the test images after the test has: it chooses nothing, it only describes a finished model.
"""

from __future__ import annotations

import io
import time
from typing import Any

import numpy as np
import torch

from impactx.datasets.dataset import Dataset
from impactx.datasets.splits import stratified_draw
from impactx.evaluation.judgement import JudgedImages, JudgedModel, MapQualityError, judge
from impactx.evaluation.orders import Order, order_of_a, orders_of
from impactx.evaluation.targets import Targets, mean_maps
from impactx.experiment.model_source import open_model
from impactx.experiment.units import MAP_SCORES, Unit, WorkError
from impactx.experiment.work import split_of
from impactx.experiment.workplace import Workplace
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.store import MapStore, map_scale
from impactx.settings import AttributionSettings, EvaluationSettings, parse_attribution


def judge_maps(unit: Unit, place: Workplace, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Judge a final model's maps and keep the result and, image by image, map_scores.npz.

    Args:
        unit: The step, of the role "map_quality".
        place: Where data, checkpoints and maps lie.
        device: Where everything is computed.

    Returns:
        A `MapQuality` as plain data.

    Raises:
        WorkError: The maps cannot be made or judged.
    """
    torch.set_num_threads(place.threads)
    keep_freed_memory()
    if (done := place.artifacts.result(unit)) is not None:
        return done
    started = time.perf_counter()
    settings = EvaluationSettings.model_validate(unit.recipe["evaluation"])
    data = place.dataset(unit.inputs["dataset"])
    test = data.load_test()
    count = images_judged(settings, len(test.labels), len(np.unique(test.labels)))
    rows = stratified_draw(test.labels, count, settings.seed)
    images = JudgedImages(rows, test.images[rows], np.asarray(test.labels[rows], np.int64))
    try:
        quality, arrays = judge(
            _model(unit, place, data), images, settings, parse_attribution(unit.recipe["attribution"]),
            device=torch.device(device), memory_bytes=place.memory_bytes)
    except MapQualityError as error:
        raise WorkError(f"{unit.name}: {error}") from error
    result = quality.model_copy(update={"seconds": time.perf_counter() - started}).to_json()
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    place.artifacts.finish(unit, result, {MAP_SCORES: stream.getvalue()})
    return result


def images_judged(settings: EvaluationSettings, test_images: int, classes: int) -> int:
    """Return how many of the test images are drawn: at least one of each class."""
    return max(min(settings.map_images, test_images), classes)


def own_is_trained(unit: Unit) -> bool:
    """Return False for a model with a decoder that was trained with lambda = 0."""
    return unit.params.get("lambda") != 0


def orders_of_unit(unit: Unit, learned: AttributionSettings | None) -> list[Order]:
    """Return the attributions' maps that a step compares.

    Args:
        unit: The step.
        learned: What made the maps that the model was trained to predict, or None.
    """
    return orders_of(EvaluationSettings.model_validate(unit.recipe["evaluation"]),
                     parse_attribution(unit.recipe["attribution"]), learned=learned, has_a="a" in unit.inputs)


def _model(unit: Unit, place: Workplace, data: Dataset) -> JudgedModel:
    network = place.checkpoint(unit.inputs["checkpoint"], unit.recipe["weights"]).model
    classifier = open_model({"kind": "unit", "folder": unit.inputs["checkpoint"]}, place, unit.recipe["weights"])

    def open_a() -> torch.nn.Module:
        return open_model({"kind": "unit", "folder": unit.inputs["a"]}, place, unit.recipe["a"])

    return JudgedModel(network.eval().requires_grad_(False), classifier, open_a if "a" in unit.inputs else None,
                       _targets(unit, place, data), own_is_trained(unit))


def _targets(unit: Unit, place: Workplace, data: Dataset) -> Targets | None:
    """Read the maps that the model was trained to predict. Raises StoreError."""
    if "maps" not in unit.inputs:
        return None
    store = MapStore.open(place.artifacts.storage, unit.inputs["maps"], unit.recipe["maps"])
    maps, split, scaling = place.map_array(store, data), split_of(unit, data), unit.recipe["scale"]
    scale = map_scale(maps, split.train, scaling)
    mean, by_class = mean_maps(maps, data.train.labels, split.train, data.num_classes, scale)
    attribution = parse_attribution(store.spec.recipe["attribution"])
    return Targets(attribution, order_of_a(attribution), scaling, None if isinstance(scale, np.ndarray) else scale,
                   mean, by_class)
