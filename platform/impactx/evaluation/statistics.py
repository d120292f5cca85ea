"""Means over repeats and test images with intervals: a two-level bootstrap, paired across approaches.

A final model's quality on the test set varies for two reasons: which training it is (seeds of split, start and
order) and which images the test set happens to hold.  Both are resampled together, crossed: a resample draws the
repeats with replacement, and the images with replacement, the same images for every model (Owen, "The pigeonhole
bootstrap", 2007).  Approaches are paired: a gain is the mean over repeats and images of the difference between the
two models of one repeat on one image, so what makes a split or an image hard for both falls out.

Intervals are percentiles of the resampled means.  A handful of repeats makes percentiles too narrow, and their tails,
which a correction over many cells reads, far too short: no resample goes beyond the best repeat.  So what a resample
deviates by because of its repeats alone is stretched, rank by rank, to Student's t with S - 1 degrees of freedom and
the standard error of the S repeats (Hesterberg, "What teachers should know about the bootstrap", 2015, does so for
one quantile).  Where the repeats are all that varies, intervals and p-values at every level are those of the paired
t test.  p is twosided: twice the smaller share of resamples on either side of 0, counted with the estimate itself.
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

    spread: sample standard deviation over repeats, None for one; low, high: the interval; p: of a difference against
    0 (two-sided), None for a plain mean; over: what the interval covers: "repeats and images", or "images" where
    there is one repeat, and then it says nothing about another training.
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
        """Plain data."""
        return asdict(self)


def students_deviations(values: np.ndarray, resampled: np.ndarray) -> np.ndarray:
    """Deviations of resampled means of a few values, stretched to Student's t.

    values: float (S,); resampled: (R,) means of S of them, drawn with replacement.  Returns float64 (R,): the quantiles
    of t(S - 1) * spread / sqrt(S) at (1/2 ... R - 1/2) / R, in the order of `resampled`; zeros for one value.
    """
    count, draws = len(values), len(resampled)
    found = np.zeros(draws)
    if count > 1:
        quantiles = special.stdtrit(count - 1, (np.arange(draws) + 0.5) / draws)
        order = np.argsort(np.round(resampled, 12), kind="stable")  # sums in another order are ties
        found[order] = quantiles * values.std(ddof=1) / math.sqrt(count)
    return found


class TwoLevelBootstrap:
    """Resampled means of approaches, each a number of repeats on the same test images.

    values: by approach and repeat, the same number N of bools or floats, image i of each the same image.
    Equal arguments give equal results. Raises ValueError for no values, or images that do not agree in number.
    """

    def __init__(self, values: Mapping[str, Mapping[int, np.ndarray]], *, resamples: int = RESAMPLES, seed: int = 0,
                 confidence: float = CONFIDENCE) -> None:
        counts = {len(v) for repeats in values.values() for v in repeats.values()}
        if len(counts) != 1 or 0 in counts or not all(values.values()):
            raise ValueError(f"a bootstrap needs at least one repeat of every approach, all on the same images: "
                             f"numbers of images are {sorted(counts)}, approaches {list(values)}")
        self.images, self.confidence, self.resamples, self._seed = counts.pop(), confidence, resamples, seed
        places = [(name, repeat) for name, repeats in values.items() for repeat in sorted(repeats)]
        rows = np.stack([np.asarray(values[name][repeat], np.float64) for name, repeat in places])
        found = resample_images(rows, resamples, seed)
        self._mean: dict[str, dict[int, float]] = {}
        self._resampled: dict[str, dict[int, np.ndarray]] = {}
        for (name, repeat), row, means in zip(places, rows, found, strict=True):
            self._mean.setdefault(name, {})[repeat] = float(row.mean())
            self._resampled.setdefault(name, {})[repeat] = means

    def mean(self, approach: str) -> Estimate:
        """The mean of an approach."""
        repeats = list(self._mean[approach])
        return self._estimate([self._mean[approach][r] for r in repeats],
                              [self._resampled[approach][r] for r in repeats], test=False)

    def gain(self, approach: str, over: str) -> Estimate | None:
        """The mean paired difference approach - over, on the repeats that both have; None where they share none."""
        repeats = [r for r in self._mean[approach] if r in self._mean[over]]
        if not repeats:
            return None
        return self._estimate([self._mean[approach][r] - self._mean[over][r] for r in repeats],
                              [self._resampled[approach][r] - self._resampled[over][r] for r in repeats], test=True)

    def _estimate(self, means: list[float], resampled: list[np.ndarray], *, test: bool) -> Estimate:
        count, values = len(means), np.array(means)
        centre = float(values.mean())
        # One draw of the repeats a resample, the same for every approach with as many repeats.
        chosen = np.random.default_rng([self._seed, 1, count]).integers(0, count, (self.resamples, count))
        both = np.stack(resampled, 1)[np.arange(self.resamples)[:, None], chosen].mean(1)
        of_repeats = values[chosen].mean(1)
        both += centre - of_repeats + students_deviations(values, of_repeats)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(both, [tail, 1 - tail])
        slack = 1e-12  # sums in another order: a difference of exactly 0 must count as one
        p = min(1.0, 2 * min((both <= slack).sum() + 1, (both >= -slack).sum() + 1) / (self.resamples + 1))
        return Estimate(centre, float(values.std(ddof=1)) if count > 1 else None, float(low), float(high),
                        float(p) if test else None, count, self.images,
                        "repeats and images" if count > 1 else "images")


def resample_images(rows: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of each row over images drawn with replacement, the same draw for every row.

    rows: float64 (M, N); returns float64 (M, resamples).
    """
    count = rows.shape[1]
    generator = np.random.default_rng([seed, 0])
    found = np.empty((len(rows), resamples))
    step = max(1, _BLOCK // count)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = generator.integers(0, count, (size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        found[:, start:start + size] = rows @ times.T.astype(np.float64) / count
    return found


def interval_of_mean(values: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0, confidence: float = CONFIDENCE
                     ) -> tuple[np.ndarray, np.ndarray]:
    """Percentile intervals of means over images, for many quantities at once, paired among them.

    values: float (N, Q); returns low and high, float64 (Q,) each.
    """
    means = resample_images(np.ascontiguousarray(values.T, np.float64), resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=1)
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): adjusted p-values, in the given order."""
    found = [0.0] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[i]))
        found[i] = worst
    return found
