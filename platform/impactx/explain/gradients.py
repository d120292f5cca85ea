"""Attributions from the gradient with respect to the image, by captum.

Both take points between a baseline (black, say) and the image, and multiply the gradients found there with image
minus baseline.  Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) sums along the straight line by a
quadrature rule; gradient SHAP (Lundberg and Lee 2017, as captum has it) averages over random points, baselines and
noise.  Both add up to f(image) - f(baseline) only approximately: neither is an additive attribution here.  The store
keeps both scores, so the gap can be computed of every map, and the result of a store
reports it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    completeness_gaps,
    names_of,
    open_images,
    rows_that_fit,
    until_it_fits,
)
from impactx.settings import GradientShapSettings, IntegratedGradientsSettings


class IntegratedGradientsAttribution:
    """captum.attr.IntegratedGradients for each image's class; base_values are the scores of the baselines."""

    additive = False

    def __init__(self, settings: IntegratedGradientsSettings) -> None:
        self.settings = settings
        self.captum = captum_attr(settings.method)

    @forward_precision("float32")
    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """See `Attribution.explain`. Raises AttributionError where `tolerance` is set and a map misses it."""
        s = self.settings
        x, y = open_images(images, labels, device)
        scores = ClassScores(score, s.explain, x, y, names_of(indices, len(x)))
        found = until_it_fits(lambda rows: self._maps(scores, rows), rows_that_fit(scores, memory_bytes))
        if s.tolerance is not None:
            _check_completeness(found, s.tolerance, scores.names)
        return found

    def _maps(self, scores: ClassScores, rows: int) -> Explanations:
        s, x, y = self.settings, scores.images, scores.labels
        baselines = parse_masker(s.masker).background(x)
        ends = scores.of_class(x, rows), scores.of_class(baselines, rows, "baseline of image")
        explainer, maps = self.captum.IntegratedGradients(scores), []
        for part in chunks(len(x), max(1, rows // s.steps)):
            maps.append(explainer.attribute(
                x[part], baselines[part], target=y[part], n_steps=s.steps, method="gausslegendre",
                internal_batch_size=rows if rows < s.steps * len(x[part]) else None).detach())
        return Explanations(scores.finite(torch.cat(maps)), *ends)


class GradientShapAttribution:
    """captum.attr.GradientShap for each image's class; base_values are the mean scores of its baselines.

    Every image has random numbers of its own, from the seed and its index: a map does not depend on the images beside
    it, on who makes it, or on the device.
    """

    additive = False

    def __init__(self, settings: GradientShapSettings) -> None:
        self.settings = settings
        self.captum = captum_attr(settings.method)

    @forward_precision("float32")
    def explain(self, score: Score, images: np.ndarray, labels: np.ndarray, *, device: torch.device | str = "cpu",
                memory_bytes: int = 2**29, indices: np.ndarray | None = None) -> Explanations:
        """See `Attribution.explain`."""
        x, y = open_images(images, labels, device)
        scores = ClassScores(score, self.settings.explain, x, y, names_of(indices, len(x)))
        return until_it_fits(lambda rows: self._maps(scores, rows), rows_that_fit(scores, memory_bytes))

    def _maps(self, scores: ClassScores, rows: int) -> Explanations:
        s, x, y = self.settings, scores.images, scores.labels
        baselines = torch.stack([parse_masker(name).background(x) for name in s.maskers], dim=1)  # (N, b, C, H, W)
        found = scores.of_class(x, rows)
        base = np.mean([scores.of_class(baselines[:, b], rows, "baseline of image") for b in range(len(s.maskers))], 0)
        explainer = self.captum.GradientShap(scores)
        maps = []
        for i, name in enumerate(scores.names):
            with _numbers_of(s.seed, name) as generator:
                noisy = x[i].expand(s.samples, *x[i].shape)
                if s.noise:
                    noisy = noisy + s.noise * torch.randn(noisy.shape, generator=generator).to(x.device)
                parts = [explainer.attribute(noisy[part], baselines[i], n_samples=1, stdevs=0.0, target=y[i])
                         for part in chunks(s.samples, rows)]
            maps.append(torch.cat([part.detach() for part in parts]).mean(0))
        return Explanations(scores.finite(torch.stack(maps)), found, base)


@contextlib.contextmanager
def _numbers_of(seed: int, index: int) -> Iterator[torch.Generator]:
    """Random numbers of one image: torch's by the generator, NumPy's global ones (captum's) for the block.

    Both states are as before afterwards.
    """
    ours = np.random.SeedSequence([seed, index]).generate_state(2)
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        np.random.seed(ours[0])
        try:
            yield torch.Generator().manual_seed(int(ours[1]))
        finally:
            np.random.set_state(numpy_state)


def _check_completeness(found: Explanations, tolerance: float, names: list[int]) -> None:
    gaps = completeness_gaps(found.maps, found.scores, found.base_values)
    wrong = np.flatnonzero(gaps > tolerance)
    if len(wrong):
        i = wrong[0]
        raise AttributionError(
            f"the map of image {names[i]} sums to {found.maps[i].sum(dtype=np.float64):.6g}, f(image) - f(baseline) is "
            f"{found.scores[i] - found.base_values[i]:.6g}: a gap of {gaps[i]:.2g}, above attribution.tolerance "
            f"{tolerance:g} ({len(wrong)} of {len(names)} maps); more attribution.steps make it smaller")
