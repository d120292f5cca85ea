"""What a number of repeats can show: the difference with 80 % power, and the repeats for a margin.

The errors of a gain are taken as they were estimated (see `evaluation.statistics`): that of the
repeats falls with the root of their number, that of the images stays. Power is the share of jobs in
which the tests would show it, averaged over how the spread would come out again.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from impactx.evaluation.statistics import Estimate

POWER, MOST_REPEATS = 0.8, 10_000
_SHARES = (np.arange(400) + 0.5) / 400


def detectable(gain: Estimate, level: float) -> float:
    """Return the smallest true difference that these repeats show to be one, with 80 % power.

    Args:
        gain: The estimate, from at least 2 repeats.
        level: Of the two-sided test, in (0, 1).

    Returns:
        The difference in the units of the estimate.
    """
    error, halves = _thresholds(gain, gain.repeats, level)
    if error == 0:
        return 0.0
    low, high = 0.0, 2 * float(halves.max())
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if _shows(gain, gain.repeats, middle, level) else (middle, high)
    return high


def repeats_for(gain: Estimate, margin: float, level: float, margin_level: float) -> int | None:
    """Return how many repeats would settle a difference of the margin, with 80 % power either way.

    With so many, a true difference of the margin is shown to be one, and a true difference of 0 is
    shown to be smaller than the margin.

    Args:
        gain: The estimate, from at least 2 repeats.
        margin: Above 0, in the units of the estimate.
        level: Of the two-sided test of the gain, in (0, 1).
        margin_level: Of each of the two one-sided tests of the margin, in (0, 0.5).

    Returns:
        The number, at least 2; None where even MOST_REPEATS are too few, as where the test images
        are.
    """
    def enough(count: int) -> bool:
        return (_shows(gain, count, margin, level)
                and _bounds(gain, count, margin, 2 * margin_level))

    if not enough(MOST_REPEATS):
        return None
    low, high = 1, MOST_REPEATS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _thresholds(gain: Estimate, repeats: int, level: float) -> tuple[float, np.ndarray]:
    """Return the standard error with `repeats` repeats, and half the width of the interval.

    The half width is an array: one for each of many equally likely spreads.
    """
    of_repeats = gain.error_of_repeats * math.sqrt(gain.repeats / repeats)
    spreads = np.sqrt(special.chdtri(repeats - 1, 1 - _SHARES) / (repeats - 1))
    t, z = (-float(special.stdtrit(count - 1, level / 2)) for count in (repeats, gain.images))
    halves = np.hypot(t * of_repeats * spreads, z * gain.error_of_images)
    return math.hypot(of_repeats, gain.error_of_images), halves


def _shows(gain: Estimate, repeats: int, difference: float, level: float) -> bool:
    """Return whether so many repeats show a true difference to be above 0, with enough power."""
    error, halves = _thresholds(gain, repeats, level)
    if error == 0:
        return True
    return float(special.ndtr((difference - halves) / error).mean()) >= POWER


def _bounds(gain: Estimate, repeats: int, margin: float, level: float) -> bool:
    """Return whether so many repeats show that no difference exceeds the margin where it is 0."""
    error, halves = _thresholds(gain, repeats, level)
    if error == 0:
        return True
    room = np.maximum(margin - halves, 0) / error
    return float((2 * special.ndtr(room) - 1).mean()) >= POWER
