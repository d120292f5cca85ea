"""The maps that a model was trained to predict: their attribution, their scale and their means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from impactx.explain.maps.scale import largest_scale
from impactx.settings import AttributionSettings


@dataclass(frozen=True)
class Targets:
    """The training maps of a model's second stage.

    Attributes:
        attribution: What made them.
        order: The name of the order of the same attribution's maps of A on test images, which the
            model's own maps are to predict.
        scaling: How they were scaled: "std", "max_abs" or "raw" (the setting `maps.scale`).
        factor: What they were multiplied by; None: each map by its own factor (`largest_scale`).
        mean: The mean scaled training map, float64 (C, H, W).
        by_class: The mean scaled training map of each class, float64 (K, C, H, W).
    """

    attribution: AttributionSettings
    order: str
    scaling: str
    factor: float | None
    mean: np.ndarray
    by_class: np.ndarray

    def scaled(self, maps: np.ndarray) -> np.ndarray:
        """Return other maps (N, C, H, W) of the same attribution in the units of training."""
        if self.factor is not None:
            scale: np.ndarray | np.float32 = np.float32(self.factor)
        else:
            scale = largest_scale(maps)[:, None, None, None]
        return np.asarray(maps * scale)


def mean_maps(maps: np.ndarray, labels: np.ndarray, indices: np.ndarray, num_classes: int,
              scale: float | np.ndarray = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Average scaled maps, over all images and over those of each class.

    Args:
        maps: (N, C, H, W), may be memory-mapped.
        labels: int (N,).
        indices: Which maps are averaged; every class must be among them.
        num_classes: K.
        scale: One factor, or one for each of the N maps.

    Returns:
        The mean (C, H, W) and the means of the classes (K, C, H, W), float64.
    """
    sums, counts = np.zeros((num_classes, *maps.shape[1:])), np.zeros(num_classes)
    for start in range(0, len(indices), 1024):
        chosen = indices[start:start + 1024]
        factor = np.asarray(scale)[chosen].reshape(-1, 1, 1, 1) if np.ndim(scale) else scale
        block = np.asarray(maps[chosen], np.float64) * factor
        for label in np.unique(labels[chosen]):
            members = labels[chosen] == label
            sums[label] += block[members].sum(0)
            counts[label] += members.sum()
    return sums.sum(0) / counts.sum(), sums / counts.reshape(-1, 1, 1, 1)
