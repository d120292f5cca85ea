"""The judgement of a finished model's maps on test images: every order, by every metric."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, cast

import numpy as np
import torch
from pydantic import BeforeValidator, SerializeAsAny
from torch import nn

from impactx.evaluation.orders import Order, orders_of
from impactx.evaluation.quality import (
    MapMetric,
    MetricResult,
    Record,
    Subject,
    metrics_of,
    network_maps,
    pixels_of,
)
from impactx.evaluation.targets import Targets
from impactx.explain.attribution import Attribution, AttributionError
from impactx.explain.partition.fast import fast_score
from impactx.explain.precision import forward_precision
from impactx.settings import AttributionSettings, EvaluationSettings
from impactx.settings.extensions import map_metric
from impactx.settings.masker import MaskerError

R = TypeVar("R", bound=MetricResult)
SHOWN = 20  # images whose maps are kept for figures, one of each class first


class MapQualityError(ValueError):
    """A model's maps cannot be judged; the message says why."""


def _read_result(value: Any) -> Any:
    """Read a metric's result by the class that the metric declares, else by the common one."""
    if not isinstance(value, Mapping):
        return value
    name = value.get("metric")
    metric = map_metric.get(name) if name in map_metric.names() else None
    kind = metric.result if metric is not None and issubclass(metric, MapMetric) else MetricResult
    return kind.model_validate(value)


class MapQuality(Record):
    """What the maps of one model are worth.

    Attributes:
        images: The number of test images.
        over: What the intervals cover: "images".
        seconds: What the judgement took.
        seconds_per_map: By order, of maps that were made here.
        evaluations_per_map: By order, forward passes; None where the attribution does not say.
        results: By metric; a metric that says nothing of such a model has none.
    """

    images: int
    over: str = "images"
    seconds: float
    seconds_per_map: dict[str, float]
    evaluations_per_map: dict[str, int | None]
    results: dict[str, Annotated[SerializeAsAny[MetricResult], BeforeValidator(_read_result)]]

    def of(self, kind: type[R]) -> R | None:
        """Return the result of a class such as `MorfResult`, or None where there is none."""
        return next((result for result in self.results.values() if isinstance(result, kind)), None)

    def metrics(self) -> dict[str, float]:
        """Return what a table of runs shows: each metric's means, and costs."""
        values = {name: value for result in self.results.values()
                  for name, value in result.metrics().items()}
        costs = {f"seconds_per_map_{name}": value for name, value in self.seconds_per_map.items()}
        return values | costs | {"map_images": float(self.images)}

    def summary(self, metric: str) -> str:
        """Return a metric's first value of each order, for a line of progress."""
        result = self.results.get(metric)
        firsts = {} if result is None else {
            order: next(iter(values.values())) for order, values in result.values.items() if values}
        return ", ".join(f"{order} {first.mean:.3f}" for order, first in firsts.items()
                         if first.mean is not None)


@dataclass(frozen=True)
class JudgedModel:
    """A finished model.

    Attributes:
        network: The whole model on the CPU, in eval mode, frozen.
        classifier: The same as a classifier: images (B, C, H, W) in [0, 1] to logits (B, K).
        open_a: Opens the classifier A that the model was built on; None where there is none.
        targets: What its own maps were trained to predict, or None.
        own_is_trained: False for a decoder that was trained with lambda = 0: it is as random as
            at its start, and its maps are not judged.
    """

    network: nn.Module
    classifier: nn.Module
    open_a: Callable[[], nn.Module] | None = None
    targets: Targets | None = None
    own_is_trained: bool = True


@dataclass(frozen=True)
class JudgedImages:
    """Test images on which maps are judged.

    Attributes:
        rows: int64 (N,), their places in the test set.
        images: uint8 (N, H, W, C).
        labels: int64 (N,).
    """

    rows: np.ndarray
    images: np.ndarray
    labels: np.ndarray


def judge(model: JudgedModel, test: JudgedImages, settings: EvaluationSettings,
          attribution: AttributionSettings, *, device: torch.device, memory_bytes: int
          ) -> tuple[MapQuality, dict[str, np.ndarray]]:
    """Make a model's maps on test images, and judge them by every metric.

    Orders: "decoder" or "attention" (the model's own), <attribution>_predicted and
    <attribution>_true (of the model itself), <attribution>_of_a (of A for the true class), with
    "shap" for the partition explainer; mean_map.

    Args:
        model: Moved to the device.
        test: The images.
        settings: Which orders and metrics.
        attribution: The experiment's.
        device: Where everything is computed, in float32: TF32 is for training.
        memory_bytes: Working memory, which limits the batches.

    Returns:
        The values, and arrays by name: rows, labels, predicted (N,); those of the metrics; shown:
        places among the N whose images (uint8) and maps.<order> (float32) are kept.

    Raises:
        MapQualityError: A map cannot be made, or a metric refuses.
    """
    started = time.perf_counter()
    most = 4096 if device.type == "cuda" else 250
    batch_size = max(1, min(most, memory_bytes // (32 * test.images[0].size)))
    with forward_precision("float32", device):
        maker = _Maker(model, test, settings, attribution, device, memory_bytes, batch_size)
        subject = maker.subject()
        arrays = {"rows": test.rows, "labels": test.labels, "predicted": subject.predicted,
                  **_shown(subject)}
        results: dict[str, MetricResult] = {}
        for metric in metrics_of(settings):
            try:
                measured = metric.measure(subject)
            except ValueError as error:
                raise MapQualityError(f"the metric {metric.metric}: {error}") from error
            if measured is None:
                continue
            if twice := arrays.keys() & measured.arrays.keys():
                raise MapQualityError(f"the metric {metric.metric} returns arrays named "
                                      f"{', '.join(sorted(twice))}, which exist already: a name "
                                      f"begins with the metric's own, {metric.metric}")
            results[metric.metric] = measured.result
            arrays |= measured.arrays
    quality = MapQuality(
        images=len(test.rows), seconds=time.perf_counter() - started, results=results,
        seconds_per_map=maker.seconds, evaluations_per_map=maker.evaluations)
    return quality, arrays


def _shown(subject: Subject) -> dict[str, np.ndarray]:
    """Return the images and maps of the first images, one of each class before all others."""
    _, first = np.unique(subject.labels, return_index=True)
    others = np.setdiff1d(np.arange(len(subject.labels)), first)
    shown = np.concatenate([first, others])[:SHOWN]
    return {"shown": shown, "images": subject.images[shown]} | {
        f"maps.{name}": np.ascontiguousarray(maps[shown], np.float32)
        for name, maps in subject.maps.items()}


class _Maker:
    """Makes the maps of a judgement, and measures what they cost."""

    def __init__(self, model: JudgedModel, test: JudgedImages, settings: EvaluationSettings,
                 attribution: AttributionSettings, device: torch.device, memory_bytes: int,
                 batch_size: int) -> None:
        self.model, self.test, self.settings, self.attribution = model, test, settings, attribution
        self.device, self.memory_bytes, self.batch_size = device, memory_bytes, batch_size
        self.maps: dict[str, np.ndarray] = {}
        self.seconds: dict[str, float] = {}
        self.evaluations: dict[str, int | None] = {}

    def subject(self) -> Subject:
        """Return the model with its maps of every order."""
        model, test, targets = self.model, self.test, self.model.targets
        height, width, channels = test.images.shape[1:]
        # Each image takes thousands of forwards; the faster form checks itself against the model.
        score = fast_score(model.classifier.to(self.device), (channels, height, width), split=False)
        pixels = pixels_of(test.images, self.device)
        with torch.no_grad():
            scores = torch.cat([score(part) for part in torch.split(pixels, self.batch_size)])
        del pixels
        predicted = scores.argmax(1).cpu().numpy()
        own = self._make_own()
        for order in orders_of(self.settings, self.attribution, has_a=model.open_a is not None,
                               learned=targets.attribution if targets is not None else None):
            self._explain(order, predicted)
        if targets is not None and "mean_map" in self.settings.orders:
            self.maps["mean_map"] = np.broadcast_to(targets.mean.astype(np.float32),
                                                    (len(test.rows), *targets.mean.shape))
        return Subject(
            score=score, network=model.network, images=test.images, rows=test.rows,
            labels=test.labels, predicted=predicted, maps=self.maps, own=own, targets=targets,
            device=self.device, batch_size=self.batch_size, settings=self.settings)

    def _make_own(self) -> str | None:
        """Add the maps that the model itself makes, in its own units; return their order."""
        network = self.model.network
        if (not hasattr(network, "with_maps") or not self.model.own_is_trained
                or "own" not in self.settings.orders):
            return None
        name = "decoder" if hasattr(network, "decoder") else "attention"
        started = time.perf_counter()
        self.maps[name] = network_maps(network, pixels_of(self.test.images, self.device),
                                       self.batch_size)
        self.seconds[name] = (time.perf_counter() - started) / len(self.test.rows)
        self.evaluations[name] = 1
        return name

    def _explain(self, order: Order, predicted: np.ndarray) -> None:
        """Add the maps of an attribution."""
        test, attribution = self.test, cast(Attribution, order.attribution)
        classes = predicted if order.classes == "predicted" else test.labels
        explained = self.model.classifier
        if order.of_a and self.model.open_a is not None:
            explained = self.model.open_a().to(self.device)
        height, width, channels = test.images.shape[1:]
        maps = np.empty((len(classes), channels, height, width), np.float32)
        anew = np.ones(len(classes), bool)
        if order.beside is not None:  # the same model's maps for the same class
            maps, anew = np.array(self.maps[order.beside]), classes != predicted
        if anew.any():
            started = time.perf_counter()
            try:
                maps[anew] = attribution.explain(
                    explained, test.images[anew], classes[anew], device=self.device,
                    memory_bytes=self.memory_bytes, indices=test.rows[anew]).maps
            except (AttributionError, MaskerError) as error:
                raise MapQualityError(f"maps by {order.attribution.method}, on test images: "
                                      f"{error}") from error
            self.seconds[order.name] = (time.perf_counter() - started) / int(anew.sum())
        self.evaluations[order.name] = attribution.evaluations((height, width))
        self.maps[order.name] = maps
