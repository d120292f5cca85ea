"""A metric of maps of one's own: how few pixels a map's relevance stands on."""

from typing import Literal

import numpy as np

from impactx.evaluation.quality import MapMetric, Measurement, Subject
from impactx.settings.extensions import map_metric


@map_metric
class Sparseness(MapMetric):
    """Gini index of a map's absolute values: 0 where all are equal, near 1 where one has it all.

    Chalasani et al., "Concise explanations of neural networks using adversarial training", 2020.
    """

    metric: Literal["sparseness"] = "sparseness"
    power: float = 1.0

    def measure(self, subject: Subject) -> Measurement:
        """Measure every map of every order."""
        return self.measurement(subject, {
            order: {"gini": self.gini(maps)} for order, maps in subject.maps.items()})

    def gini(self, maps: np.ndarray) -> np.ndarray:
        """Return the index of each map (N, C, H, W); NaN for a map of zeros."""
        values = np.sort(np.abs(maps.astype(float)).reshape(len(maps), -1) ** self.power, axis=1)
        count, sums = values.shape[1], values.sum(1)
        ranks = 2 * np.arange(1, count + 1) - count - 1
        return np.divide(values @ ranks, count * sums, out=np.full(len(maps), np.nan), where=sums > 0)
