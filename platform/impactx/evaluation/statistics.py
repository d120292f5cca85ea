"""Means over repeats and test images with intervals: a two-level bootstrap of paired approaches.

A final model's quality on the test set varies for two reasons: which training it is (seeds of
split, start and order) and which images the test set happens to hold. Both are resampled together,
crossed: a resample draws the repeats with replacement, and the images with replacement, the same
images for every model (Owen, "The pigeonhole bootstrap", 2007). Approaches are paired: a gain is
the mean over repeats and images of the difference between the two models of one repeat on one
image, so what makes a split or an image hard for both cancels.

Intervals are percentiles of the resampled means. A handful of repeats makes percentiles too narrow,
and their tails, which a correction over many cells reads, far too short: no resample goes beyond
the best repeat. So the part of a resample's deviation that comes from its repeats alone is
stretched, rank by rank, to Student's t with S - 1 degrees of freedom and the standard error of the
S repeats (Hesterberg, "What teachers should know about the bootstrap", 2015, does so for one
quantile). Where the repeats are all that varies, intervals and p-values at every level are those of
the paired t test. p is two-sided: twice the smaller share of resamples on either side of 0, counted
with the estimate itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special

RESAMPLES, CONFIDENCE = 10_000, 0.95
_BLOCK = 2_000_000  # drawn indices held at once


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval, in the units of the values.

    Attributes:
        mean: The mean over repeats and images.
        spread: The sample standard deviation over repeats; None for one repeat.
        low: The lower end of the interval.
        high: The upper end of the interval.
        p: Of a difference, two-sided against 0; None for a plain mean.
        repeats: The number of repeats.
        images: The number of images.
        over: What the interval covers: "repeats and images", or "images" where there is one
            repeat; then it says nothing about another training.
    """

    mean: float
    spread: float | None
    low: float
    high: float
    p: float | None
    repeats: int
    images: int
    over: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def students_deviations(values: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """Return deviations of resampled means of a few values, stretched to Student's t.

    Args:
        values: float (S,).
        resampled: float (R,), means of S of them, drawn with replacement.

    Returns:
        float64 (R,): the quantiles of t(S - 1) * spread / sqrt(S) at (1/2 ... R - 1/2) / R, in the
        order of `resampled`; zeros for one value.
    """
    count, draws = len(values), len(resampled)
    deviations = np.zeros(draws)
    if count > 1:
        quantiles = special.stdtrit(count - 1, (np.arange(draws) + 0.5) / draws)
        # Sums in another order are ties.
        order = np.argsort(np.round(resampled, 12), kind="stable")
        deviations[order] = quantiles * values.std(ddof=1) / math.sqrt(count)
    return deviations


class TwoLevelBootstrap:
    """Resampled means of approaches, each a number of repeats on the same test images.

    Equal arguments give equal results.

    Args:
        values: By approach and repeat, N bools or floats each; image i of each is the same image.
        resamples: The number of resamples.
        seed: Of the draws.
        confidence: Of the intervals, in (0, 1).

    Raises:
        ValueError: There are no values, or the numbers of images differ.
    """

    def __init__(self, values: Mapping[str, Mapping[int, np.ndarray]], *,
                 resamples: int = RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE) -> None:
        counts = {len(v) for repeats in values.values() for v in repeats.values()}
        if len(counts) != 1 or 0 in counts or not all(values.values()):
            raise ValueError("a bootstrap needs at least one repeat of every approach, all on the "
                             f"same images: numbers of images are {sorted(counts)}, approaches "
                             f"{list(values)}")
        self.images, self.confidence = counts.pop(), confidence
        self.resamples, self._seed = resamples, seed
        models = [(name, repeat) for name, repeats in values.items() for repeat in sorted(repeats)]
        rows = np.stack([np.asarray(values[name][repeat], np.float64) for name, repeat in models])
        resampled = resample_images(rows, resamples, seed)
        self._mean: dict[str, dict[int, float]] = {}
        self._resampled: dict[str, dict[int, np.ndarray]] = {}
        for (name, repeat), row, means in zip(models, rows, resampled, strict=True):
            self._mean.setdefault(name, {})[repeat] = float(row.mean())
            self._resampled.setdefault(name, {})[repeat] = means

    def mean(self, approach: str) -> Estimate:
        """Return the mean of an approach."""
        repeats = list(self._mean[approach])
        return self._estimate([self._mean[approach][r] for r in repeats],
                              [self._resampled[approach][r] for r in repeats], test=False)

    def gain(self, approach: str, over: str) -> Estimate | None:
        """Return the mean paired difference approach - over, on the repeats that both have.

        Args:
            approach: The name of the approach.
            over: The name of the approach that it is compared with.

        Returns:
            The estimate, or None where they share no repeat.
        """
        repeats = [r for r in self._mean[approach] if r in self._mean[over]]
        if not repeats:
            return None
        mean, resampled = self._mean, self._resampled
        return self._estimate([mean[approach][r] - mean[over][r] for r in repeats],
                              [resampled[approach][r] - resampled[over][r] for r in repeats],
                              test=True)

    def _estimate(self, means: list[float], resampled: list[np.ndarray], *, test: bool
                  ) -> Estimate:
        count, values = len(means), np.array(means)
        centre = float(values.mean())
        # One draw of the repeats a resample, the same for every approach with as many repeats.
        generator = np.random.default_rng([self._seed, 1, count])
        chosen = generator.integers(0, count, (self.resamples, count))
        both = np.stack(resampled, 1)[np.arange(self.resamples)[:, None], chosen].mean(1)
        of_repeats = values[chosen].mean(1)
        both += centre - of_repeats + students_deviations(values, of_repeats)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(both, [tail, 1 - tail])
        slack = 1e-12  # sums in another order: a difference of exactly 0 must count as one
        smaller = min((both <= slack).sum() + 1, (both >= -slack).sum() + 1)
        p = min(1.0, 2 * smaller / (self.resamples + 1))
        return Estimate(centre, float(values.std(ddof=1)) if count > 1 else None,
                        float(low), float(high), float(p) if test else None, count, self.images,
                        "repeats and images" if count > 1 else "images")


def resample_images(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Average each row over images drawn with replacement, the same draw for every row.

    Args:
        rows: float64 (M, N).
        resamples: The number of resamples.
        seed: Of the draws.

    Returns:
        float64 (M, resamples).
    """
    count = rows.shape[1]
    generator = np.random.default_rng([seed, 0])
    means = np.empty((len(rows), resamples))
    step = max(1, _BLOCK // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        means[:, start:start + size] = rows @ times.T.astype(np.float64) / count
    return means


def interval_of_mean(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0,
                     confidence: float = CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Return percentile intervals of means over images, of many quantities, paired among them.

    Args:
        values: float (N, Q).
        resamples: The number of resamples.
        seed: Of the draws.
        confidence: Of the intervals, in (0, 1).

    Returns:
        The lower and the upper ends, float64 (Q,) each.
    """
    means = resample_images(np.ascontiguousarray(values.T, np.float64), resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=1)
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values by Holm's step-down procedure (1979).

    Args:
        p_values: In any order.

    Returns:
        The adjusted p-values, in the same order.
    """
    adjusted = [0.0] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted
