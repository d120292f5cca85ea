"""Occlusion (Zeiler and Fergus 2014, section 2.1), by captum: what hiding a square costs the score.

A pixel's value is the mean of f(image) - f(image with the square hidden) over the squares that hold it; squares hide
all channels together, so the channels of a map are equal.  There is no base value, and nothing adds up.
"""

from __future__ import annotations

import numpy as np
import torch

from impactx.explain.attribution import Explanations
from impactx.explain.masking import parse_masker
from impactx.explain.precision import forward_precision
from impactx.explain.scores import (
    AttributionError,
    ClassScores,
    Score,
    captum_attr,
    chunks,
    names_of,
    open_images,
    rows_that_fit,
    until_it_fits,
)
from impactx.settings import OcclusionSettings


class OcclusionAttribution:
    """captum.attr.Occlusion for each image's class."""

    additive = False

    def __init__(self, settings: OcclusionSettings) -> None:
        self.settings = settings
        self.captum = captum_attr(settings.method)

    @forward_precision("float32")
    @torch.no_grad()
    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """See `Attribution.explain`. Raises AttributionError where the window is larger than the image."""
        s = self.settings
        x, y = open_images(images, labels, device)
        height, width = x.shape[2:]
        if s.window > min(height, width):
            raise AttributionError(f"attribution.window = {s.window} is larger than the images ({height}x{width})")
        scores = ClassScores(score, s.explain, x, y, names_of(indices, len(x)))
        return until_it_fits(lambda rows: self._maps(scores, rows), rows_that_fit(scores, memory_bytes))

    def _maps(self, scores: ClassScores, rows: int) -> Explanations:
        s, x, y = self.settings, scores.images, scores.labels
        channels, height, width = x.shape[1:]
        found = scores.of_class(x, rows)
        hidden = parse_masker(s.masker).background(x)
        squares = s.evaluations((height, width)) or 1
        together = max(1, rows // squares)  # images with all their squares in one forward, or one with some of them
        maps = [self.captum.Occlusion(scores).attribute(
            x[part], sliding_window_shapes=(channels, s.window, s.window), strides=(channels, s.stride, s.stride),
            baselines=hidden[part], target=y[part], perturbations_per_eval=min(squares, max(1, rows // together)))
            for part in chunks(len(x), together)]
        return Explanations(scores.finite(torch.cat(maps)), found, np.full(len(x), np.nan))
