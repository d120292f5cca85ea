"""How good a model's probabilities are, beyond the class that they choose."""

from __future__ import annotations

import numpy as np

BINS = 15


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS
                               ) -> float:
    """Return the expected calibration error (Guo et al. 2017).

    It is |accuracy - mean confidence| of each bin, weighted by the bin's share of the images.
    Confidence is the largest probability; the bins are of equal width,
    ((b - 1) / bins, b / bins], as theirs.

    Args:
        probabilities: (N, K) in [0, 1].
        labels: int (N,).
        bins: The number of bins.
    """
    confidence = np.asarray(probabilities, np.float64).max(1)
    hits = probabilities.argmax(1) == labels
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    places = np.searchsorted(inner, confidence, side="left")
    gaps = np.bincount(places, hits - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def negative_log_likelihood(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of -log p(true class), in nats.

    A probability that underflowed to 0 counts as float32's smallest normal number.

    Args:
        probabilities: (N, K) in [0, 1].
        labels: int (N,).
    """
    chosen = np.asarray(probabilities, np.float64)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(chosen, np.finfo(np.float32).tiny)).mean())


def per_class_accuracy(probabilities: np.ndarray, labels: np.ndarray) -> list[float | None]:
    """Return the share of each class's images that are classified right, in the labels' order.

    Args:
        probabilities: (N, K) in [0, 1].
        labels: int (N,).

    Returns:
        K values; None for a class without images.
    """
    hits = probabilities.argmax(1) == labels
    classes = probabilities.shape[1]
    count = np.bincount(labels, minlength=classes)
    right = np.bincount(labels, hits, minlength=classes)
    return [float(r / n) if n else None for r, n in zip(right, count, strict=True)]
