"""Fidelity: how well a decoder's maps predict the maps that it was trained on, on test images.

A number here means something only beside predictors that know less: the mean training map and the
class means (what is there to gain by looking at the image?), and a decoder with random weights
(Adebayo et al., "Sanity checks for saliency maps", 2018).
"""

from __future__ import annotations

import copy
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import nn

from impactx.evaluation.quality import MapMetric, Measurement, MetricResult, Subject
from impactx.models.seeding import seeded
from impactx.settings.extensions import map_metric

TOP_SHARE = 0.1
DECODER = "decoder"


class FidelityResult(MetricResult):
    """Fidelity of one model's decoder.

    The values stand by predictor ("decoder", "mean_map", "class_mean_of_true",
    "class_mean_of_predicted", "random_decoder"): "mse", "correlation" and "overlap" of its maps
    with the target (see `agreement`).

    Attributes:
        target: The order whose maps are predicted.
        scale: How they are scaled: "std", "max_abs" or "raw".
        top_share: The share of pixels of which the overlap is measured.
    """

    metric: str = "fidelity"
    target: str
    scale: str
    top_share: float


@map_metric
class Fidelity(MapMetric):
    """How well a decoder predicts the maps that it learns, beside predictors that know less."""

    result: ClassVar[type[MetricResult]] = FidelityResult

    metric: Literal["fidelity"] = "fidelity"
    top_share: float = Field(TOP_SHARE, gt=0, le=1, description=(
        "share of the most relevant pixels whose overlap is measured"))

    def measure(self, subject: Subject) -> Measurement | None:
        """See MapMetric.measure.

        It needs a decoder, its training targets, and the order of the same attribution's maps of
        A. Arrays: fidelity.<predictor>.<measure> (N,).
        """
        targets = subject.targets
        if subject.own != DECODER or targets is None or targets.order not in subject.maps:
            return None
        truth = targets.scaled(subject.maps[targets.order])
        random_decoder = randomised(subject.network, DECODER, subject.seed)
        predictors = {
            DECODER: subject.maps[DECODER],
            "mean_map": np.broadcast_to(targets.mean, truth.shape),
            "class_mean_of_true": targets.by_class[subject.labels],
            "class_mean_of_predicted": targets.by_class[subject.predicted],
            "random_decoder": subject.own_maps(random_decoder)}
        scores = {name: agreement(maps, truth, self.top_share)
                  for name, maps in predictors.items()}
        result = FidelityResult(values=subject.intervals(scores), target=targets.order,
                                scale=targets.scaling, top_share=self.top_share)
        return Measurement(result, self.arrays(scores))


def agreement(maps: np.ndarray, target: np.ndarray, top_share: float = TOP_SHARE
              ) -> dict[str, np.ndarray]:
    """Compare maps with a target, image by image.

    Args:
        maps: (N, C, H, W).
        target: The same shape, in the same units.
        top_share: The share of the most relevant pixels of which the overlap is measured.

    Returns:
        float64 (N,) each. mse: the mean squared difference. correlation: Pearson's, over all
        values of a map, NaN where one of the two is constant. overlap: the share of the
        `top_share` most relevant pixels (channels summed, at least 1 pixel; of equal ones the
        first) that the two have in common; chance gives about top_share.
    """
    a, b = (np.asarray(m, np.float64).reshape(len(m), -1) for m in (maps, target))
    x, y = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    size = np.sqrt((x * x).sum(1) * (y * y).sum(1))
    correlation = np.full(len(a), np.nan)
    # What is left of a constant map is rounding, relative to its values.
    varies = ((np.abs(x).max(1) > 1e-12 * np.abs(a).max(1))
              & (np.abs(y).max(1) > 1e-12 * np.abs(b).max(1)))
    np.divide((x * y).sum(1), size, out=correlation, where=varies & (size > 0))
    return {"mse": ((a - b) ** 2).mean(1), "correlation": correlation,
            "overlap": _overlap(maps, target, top_share)}


def _overlap(maps: np.ndarray, target: np.ndarray, top_share: float) -> np.ndarray:
    pixels = maps.shape[2] * maps.shape[3]
    count = max(1, round(top_share * pixels))
    shares = []
    for pair in zip(maps, target, strict=True):
        tops = [np.argsort(-np.asarray(one, np.float64).sum(0).ravel(), kind="stable")[:count]
                for one in pair]
        shares.append(len(np.intersect1d(tops[0], tops[1], assume_unique=True)) / count)
    return np.array(shares)


def randomised(model: nn.Module, part: str, seed: int) -> nn.Module:
    """Return a copy of a model with random weights in one part (Adebayo et al. 2018).

    Args:
        model: May be on any device.
        part: The name of the submodule.
        seed: Of the random weights, which are drawn on the CPU.

    Returns:
        The copy, on the CPU, in eval mode.
    """
    other = copy.deepcopy(model).cpu()
    with seeded(seed, f"randomised {part}"):
        for module in other.get_submodule(part).modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return other.eval()
