"""Percentile intervals of means over images: a plain bootstrap, for the curves of one model."""

from __future__ import annotations

import numpy as np

from impactx.evaluation.statistics import CONFIDENCE

RESAMPLES = 10_000
_BLOCK = 2_000_000  # drawn indices held at once


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
