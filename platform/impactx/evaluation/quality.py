"""The contract of a metric of maps: what it is given, and what it returns.

A metric is one class. This is a whole one, which `evaluation.metrics=[morf, fidelity, peak]` then
chooses:

    @map_metric
    class Peak(MapMetric):
        "The largest value of each map."

        metric: Literal["peak"] = "peak"

        def measure(self, subject: Subject) -> Measurement:
            return self.measurement(subject, {
                order: {"height": maps.max((1, 2, 3))} for order, maps in subject.maps.items()})

Its means and intervals appear in the result of the judgement, in MLflow as `peak_height_<order>`,
and in the report's table of further metrics; the values of each image are kept in map_scores.npz.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from impactx.evaluation.resampling import interval_of_mean
from impactx.evaluation.targets import Targets
from impactx.settings import EvaluationSettings
from impactx.settings.extensions import MapMetricSettings

Scores = Mapping[str, Mapping[str, np.ndarray]]


class Record(BaseModel):
    """Base of the typed results: immutable, written and read as plain JSON data."""

    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class Interval(Record):
    """A mean over images with its bootstrap interval.

    Attributes:
        mean: The mean, or None where no image has a value.
        low: The lower end of the interval, or None.
        high: The upper end of the interval, or None.
        images: The number of images that have a value.
    """

    mean: float | None
    low: float | None
    high: float | None
    images: int


class Band(Record):
    """A mean curve over images with its bootstrap interval, entry by entry.

    Attributes:
        mean: The means.
        low: The lower ends of the intervals.
        high: The upper ends of the intervals.
    """

    mean: list[float]
    low: list[float]
    high: list[float]


class MetricResult(Record):
    """What one metric says of one model's maps. A metric with more to say extends this class.

    Attributes:
        metric: The metric's name.
        values: By order (the name of the maps), then by the name of the value.
    """

    metric: str
    values: dict[str, dict[str, Interval]]

    def metrics(self) -> dict[str, float]:
        """Return the means for a table of runs, named `<metric>_<value>_<order>`."""
        return {f"{self.metric}_{name}_{order}": interval.mean
                for order, values in self.values.items() for name, interval in values.items()
                if interval.mean is not None}


@dataclass(frozen=True)
class Measurement:
    """What a metric returns.

    Attributes:
        result: Means with intervals.
        arrays: What is kept image by image, by name, N entries each. The report joins arrays
            named `<metric>.<order>.<value>` over all repeats.
    """

    result: MetricResult
    arrays: dict[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """A finished model, the N test images on which its maps are judged, and the maps.

    Attributes:
        score: The explained function: images (B, C, H, W), float32 in [0, 1] on `device`, to
            logits (B, K).
        network: The whole model in eval mode, frozen; it may be on any device.
        images: uint8 (N, H, W, C).
        rows: int64 (N,), the images' places in the test set. Random numbers of an image are drawn
            by its place and the seed, so that they do not depend on the images beside it.
        labels: int64 (N,), the true classes.
        predicted: int64 (N,), the classes that the model predicts.
        maps: By order, float32 (N, C, H, W).
        own: The order of the maps that the model itself makes, "decoder" or "attention", or None.
        targets: What the model's own maps were trained to predict, or None.
        device: Where scores are computed.
        batch_size: Images in one forward pass.
        settings: How models are judged: seed, resamples, confidence.
    """

    score: Callable[[Tensor], Tensor]
    network: nn.Module
    images: np.ndarray
    rows: np.ndarray
    labels: np.ndarray
    predicted: np.ndarray
    maps: Mapping[str, np.ndarray]
    own: str | None
    targets: Targets | None
    device: torch.device
    batch_size: int
    settings: EvaluationSettings

    @property
    def seed(self) -> int:
        """The seed of everything that a metric draws."""
        return self.settings.seed

    @property
    def pixels(self) -> Tensor:
        """The images as float32 (N, C, H, W) in [0, 1], on the device."""
        return pixels_of(self.images, self.device)

    def own_maps(self, network: nn.Module) -> np.ndarray:
        """Return the maps that a network with `with_maps` makes of the images.

        Args:
            network: Moved to the device.

        Returns:
            float32 (N, C, H, W).
        """
        return network_maps(network, self.pixels, self.batch_size)

    def band(self, values: np.ndarray) -> Band:
        """Return means over images with bootstrap intervals, paired among the columns.

        Args:
            values: float (N, Q).
        """
        low, high = interval_of_mean(values, resamples=self.settings.resamples, seed=self.seed,
                                     confidence=self.settings.confidence)
        return Band(mean=values.mean(0).tolist(), low=low.tolist(), high=high.tolist())

    def interval(self, values: np.ndarray) -> Interval:
        """Return the mean over images with its bootstrap interval.

        Args:
            values: float (N,); images whose value is not finite are left out.
        """
        usable = values[np.isfinite(values)]
        if not len(usable):
            return Interval(mean=None, low=None, high=None, images=0)
        band = self.band(usable[:, None])
        return Interval(mean=band.mean[0], low=band.low[0], high=band.high[0], images=len(usable))

    def intervals(self, scores: Scores) -> dict[str, dict[str, Interval]]:
        """Return the interval of each value: by order, then by name.

        Args:
            scores: By order and name, float (N,) each.
        """
        return {order: {name: self.interval(values) for name, values in named.items()}
                for order, named in scores.items()}


class MapMetric(MapMetricSettings, ABC):
    """A metric of maps: its fields are its settings, `measure` is what it does.

    Attributes:
        result: The class of its results, by which stored ones are read.
    """

    result: ClassVar[type[MetricResult]] = MetricResult

    @abstractmethod
    def measure(self, subject: Subject) -> Measurement | None:
        """Judge the maps of a model.

        Args:
            subject: The model, the test images and the maps.

        Returns:
            The values, or None where the metric says nothing of such a model.

        Raises:
            ValueError: The maps cannot be judged; the message says why.
        """

    def check(self, image_size: tuple[int, int]) -> None:
        """Check that the settings fit images of a size (height, width), before anything is run.

        Raises:
            ValueError: They do not; the message names the setting.
        """

    def evaluations(self, image_size: tuple[int, int], orders: int) -> int:
        """Return the forward passes that one image of a size takes, for the estimated cost.

        Args:
            image_size: (height, width).
            orders: The number of maps of each image.
        """
        return 0

    def measurement(self, subject: Subject, scores: Scores) -> Measurement:
        """Return values of each image as a measurement: intervals, and the values themselves.

        Args:
            subject: Whose maps they are of.
            scores: By order and name, float (N,) each; NaN where an image has no value.
        """
        return Measurement(
            MetricResult(metric=self.metric, values=subject.intervals(scores)),
            self.arrays(scores))

    def arrays(self, scores: Scores) -> dict[str, np.ndarray]:
        """Return values of each image by the names under which they are kept."""
        return {f"{self.metric}.{order}.{name}": values
                for order, named in scores.items() for name, values in named.items()}


def metrics_of(settings: EvaluationSettings) -> Sequence[MapMetric]:
    """Return the chosen metrics.

    Raises:
        TypeError: A registered class is not a MapMetric.
    """
    metrics = []
    for metric in settings.metrics:
        if not isinstance(metric, MapMetric):
            raise TypeError(f"{type(metric).__name__}: a metric of maps extends "
                            f"{MapMetric.__module__}.MapMetric")
        metrics.append(metric)
    return metrics


def pixels_of(images: np.ndarray, device: torch.device) -> Tensor:
    """Return uint8 images (N, H, W, C) as float32 (N, C, H, W) in [0, 1], on a device."""
    whole = torch.from_numpy(np.array(images)).to(device)
    return whole.permute(0, 3, 1, 2).float().div_(255).contiguous()


@torch.no_grad()
def network_maps(network: Any, pixels: Tensor, batch_size: int) -> np.ndarray:
    """Return what a network with `with_maps` makes of images.

    Args:
        network: Moved to the images' device.
        pixels: float32 (N, C, H, W) in [0, 1].
        batch_size: Images in one forward pass.

    Returns:
        float32 (N, C, H, W).
    """
    network = network.to(pixels.device)
    parts = [network.with_maps(part)[1] for part in torch.split(pixels, batch_size)]
    return torch.cat(parts).float().cpu().numpy()
