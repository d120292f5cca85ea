"""Integrated gradients, by captum.

Sundararajan, Taly and Yan, "Axiomatic Attribution for Deep Networks", 2017, arXiv 1703.01365: the
gradients along the straight line from a baseline to the image are summed by a quadrature rule and
multiplied with image minus baseline. A map adds up to f(image) - f(baseline) approximately only, so
this is no additive attribution here; the store keeps both scores, and the result of a store reports
the gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from impactx.explain.attribution import (
    AttributionError,
    BatchedAttribution,
    Explanations,
    attribution,
)
from impactx.explain.masking import parse_masker
from impactx.explain.scores import ClassScores, chunks, completeness_gaps
from impactx.settings.base import MaskerName, Positive


@attribution
class IntegratedGradients(BatchedAttribution):
    """Integrated gradients (Sundararajan et al. 2017), by captum; approximately additive."""

    method: Literal["integrated_gradients"] = "integrated_gradients"
    masker: MaskerName = Field("0", description=(
        "the baseline: a colour in [0,1] (0, black, is the authors' choice) or blur(k,k)"))
    steps: int = Field(50, ge=1, le=10_000, description=(
        "points of the Gauss-Legendre rule; 50 is captum's default"))
    tolerance: Positive | None = Field(None, description=(
        "a map whose sum misses f(image) - f(baseline) by more than this share of the sum of its "
        "absolute values is an error; null: the gap is reported only"))

    requires: ClassVar[tuple[str, ...]] = ("captum",)

    def evaluations(self, size: tuple[int, int] | None = None) -> int | None:
        """See `Attribution.evaluations`: a gradient for each step, and the scores of both ends."""
        return 3 * self.steps + 2

    def maps_of(self, scores: ClassScores, rows: int) -> Explanations:
        """See `BatchedAttribution.maps_of`; base values are the scores of the baselines.

        Raises:
            AttributionError: `tolerance` is set, and a map misses it.
        """
        from captum import attr

        x, y = scores.images, scores.labels
        baselines = parse_masker(self.masker).background(x)
        ends = scores.of_class(x, rows), scores.of_class(baselines, rows, "baseline of image")
        explainer, maps = attr.IntegratedGradients(scores), []
        for part in chunks(len(x), max(1, rows // self.steps)):
            maps.append(explainer.attribute(
                x[part], baselines[part], target=y[part], n_steps=self.steps,
                method="gausslegendre",
                internal_batch_size=rows if rows < self.steps * len(x[part]) else None).detach())
        explanations = Explanations(scores.finite(torch.cat(maps)), *ends)
        if self.tolerance is not None:
            _check_completeness(explanations, self.tolerance, scores.names)
        return explanations


def _check_completeness(
    explanations: Explanations, tolerance: float, names: Sequence[int]
) -> None:
    maps, scores, base_values = explanations.maps, explanations.scores, explanations.base_values
    gaps = completeness_gaps(maps, scores, base_values)
    wrong = np.flatnonzero(gaps > tolerance)
    if len(wrong):
        i = wrong[0]
        raise AttributionError(
            f"the map of image {names[i]} sums to {maps[i].sum(dtype=np.float64):.6g}, "
            f"f(image) - f(baseline) is {scores[i] - base_values[i]:.6g}: a gap of {gaps[i]:.2g}, "
            f"above attribution.tolerance {tolerance:g} ({len(wrong)} of {len(names)} maps); more "
            "attribution.steps make it smaller")
