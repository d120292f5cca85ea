"""A gain over several cells: the mean effect, and how much cells differ where that can be told.

With fewer than five cells the effect is the mean of these cells, and covers no other cell: a
repeat's gain is its mean over the cells, so that whatever a repeat shares between cells is counted.
From five cells on it is a random-effects estimate, which covers further cells like these, with the
interval of Hartung and Knapp (2001). Its weights are equal: weights from the variances of a handful
of repeats give wrong verdicts far more often than they say (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from impactx.evaluation.statistics import Estimate, Parts, estimate

CELLS_FOR_HETEROGENEITY = 5


@dataclass(frozen=True)
class CellGain:
    """The paired gain of one approach over another in one cell.

    Attributes:
        comparison: The approach and what it is compared with.
        repeats: The numbers of the repeats, in order.
        parts: The gains of these repeats.
        images: The number of test images.
    """

    comparison: tuple[str, str]
    repeats: Sequence[int]
    parts: Parts
    images: int


@dataclass(frozen=True)
class CommonEffect:
    """A gain over several cells, as a fraction.

    Attributes:
        approach, over: What is compared.
        cells: The names of the cells.
        mean: The mean gain.
        low, high: The ends of its interval.
        p: Two-sided against 0.
        between: The standard deviation of the cells' true gains; None where the cells are fewer
            than CELLS_FOR_HETEROGENEITY, which cannot tell it.
    """

    approach: str
    over: str
    cells: list[str]
    mean: float
    low: float
    high: float
    p: float
    between: float | None


def common_effect(cells: Mapping[str, CellGain], confidence: float) -> CommonEffect | None:
    """Return the gain over several cells.

    Args:
        cells: At least two, by their names.
        confidence: Of the interval, in (0, 1).

    Returns:
        The effect; None where the cells are few and share no repeat.

    Raises:
        ValueError: The cells compare different approaches.
    """
    gains = list(cells.values())
    comparisons = {gain.comparison for gain in gains}
    if len(comparisons) != 1:
        raise ValueError("cells of different approaches have no common effect: " + ", ".join(
            f"{name}: {gain.comparison[0]} over {gain.comparison[1]}"
            for name, gain in cells.items()))
    (approach, over), = comparisons
    between = None
    if len(gains) >= CELLS_FOR_HETEROGENEITY:
        means = np.array([gain.parts.of_repeats.mean() for gain in gains])
        effect = estimate(means, len(gains), confidence=confidence)
        own = np.mean([_variance(gain, confidence) for gain in gains])
        between = math.sqrt(max(0.0, float(means.var(ddof=1) - own)))
    else:
        shared = sorted(set.intersection(*(set(gain.repeats) for gain in gains)))
        if not shared:
            return None
        effect = _mean_of_cells(gains, shared, confidence)
    return CommonEffect(approach, over, list(cells), effect.mean, effect.low, effect.high,
                        effect.p or 0.0, between)


def _variance(gain: CellGain, confidence: float) -> float:
    own = estimate(gain.parts.of_repeats, gain.images, within_images=gain.parts.within_images,
                   of_images=gain.parts.of_images, confidence=confidence, test=False)
    return own.error_of_repeats ** 2 + own.error_of_images ** 2


def _mean_of_cells(gains: Sequence[CellGain], shared: Sequence[int], confidence: float
                   ) -> Estimate:
    """Return the mean of a few cells in the repeats that all of them have."""
    count = len(gains)
    of_repeats = np.mean([[gain.parts.of_repeats[list(gain.repeats).index(r)] for r in shared]
                          for gain in gains], axis=0)
    # Cells of one data set share their images, so their errors may add up in full.
    return estimate(
        of_repeats, min(gain.images for gain in gains), confidence=confidence,
        within_images=math.sqrt(sum(gain.parts.within_images ** 2 for gain in gains)) / count,
        of_images=sum(gain.parts.of_images for gain in gains) / count)
