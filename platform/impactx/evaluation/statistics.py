"""Means over repeats and test images with their intervals, of paired approaches.

A final model's quality on the test set varies for two reasons: which training it is (seeds of
split, start and order) and which images the test set happens to hold. Approaches are paired: a gain
is the mean over repeats and images of the difference between the two models of one repeat on one
image, so what makes a split or an image hard for both cancels.

The error of such a mean has two independent parts, and an interval covers both:

* of the repeats, a = s / sqrt(S), where s is the standard deviation of the S repeats' own means.
  It holds also what an image does to one repeat alone. Where s is smaller than that alone would
  make it, as with two repeats that happen to be equal, that is taken instead.
* of the images, b: how much the mean would vary with the test images if there were endless repeats.
  It is estimated from the repeats' mean on each image, less what one repeat alone adds to it.

The interval is mean +- sqrt((t(S - 1) a)^2 + (t(N - 1) b)^2), with Student's quantiles t at the
level asked for (Graybill and Wang, JASA 75, 1980). It is the paired t test where only the repeats
vary, and the test over images where only they do. In between it covers more than it says, never
less: the chance of a miss is convex in the share of either part, and right at both ends. One
repeat has no s; its interval is over the images alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import special

CONFIDENCE = 0.95
SMALLEST_P = 1e-12  # what is smaller is given as this


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
        error_of_repeats: The standard error that comes from the repeats; 0 for one repeat.
        error_of_images: The standard error that comes from the images.
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
    error_of_repeats: float
    error_of_images: float
    over: str

    def as_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)

    def within(self, margin: float, level: float) -> bool:
        """Return whether two one-sided tests show that the true value lies within +- margin.

        Args:
            margin: Above 0, in the units of the values.
            level: Of each test, in (0, 0.5).
        """
        half = half_width(self.error_of_repeats, self.error_of_images, self.repeats, self.images,
                          2 * level)
        return abs(self.mean) + half < margin


def half_width(of_repeats: float, of_images: float, repeats: int, images: int, level: float
               ) -> float:
    """Return half the width of the interval of a mean.

    Args:
        of_repeats: The standard error that comes from the repeats.
        of_images: The standard error that comes from the images.
        repeats: The number of repeats, at least 1.
        images: The number of images, at least 1.
        level: 1 - confidence, in (0, 1].
    """
    t, z = (-float(special.stdtrit(max(count - 1, 1), level / 2)) for count in (repeats, images))
    return math.hypot(t * of_repeats, z * of_images)


def p_value(mean: float, of_repeats: float, of_images: float, repeats: int, images: int) -> float:
    """Return the level at which the interval begins to hold 0, two-sided, at least SMALLEST_P.

    Args:
        mean: The mean.
        of_repeats: As of `half_width`, and so are the following.
        of_images: A standard error.
        repeats: Their number.
        images: Their number.
    """
    if of_images == 0 or of_repeats == 0:
        count, error = (repeats, of_repeats) if of_images == 0 else (images, of_images)
        if error == 0:
            return SMALLEST_P if mean else 1.0
        return max(2 * float(special.stdtr(max(count - 1, 1), -abs(mean) / error)), SMALLEST_P)
    low, high = math.log(SMALLEST_P), 0.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        shown = half_width(of_repeats, of_images, repeats, images, math.exp(middle)) < abs(mean)
        low, high = (low, middle) if shown else (middle, high)
    return math.exp(high)


def estimate(of_repeats: np.ndarray, images: int, *, within_images: float = 0.0,
             of_images: float = 0.0, confidence: float = CONFIDENCE, test: bool = True
             ) -> Estimate:
    """Return the estimate of a mean from the means of its repeats.

    Args:
        of_repeats: float (S,), the mean of each repeat.
        images: The number of images behind each of them.
        within_images: What the images do to one repeat alone, as a standard deviation of a
            repeat's mean: the least that is taken for the spread.
        of_images: The standard error that the images give to the mean of endless repeats; of a
            single repeat, to its mean.
        confidence: Of the interval, in (0, 1).
        test: Whether p is wanted.
    """
    count, mean = len(of_repeats), float(of_repeats.mean())
    spread = float(of_repeats.std(ddof=1)) if count > 1 else None
    error = 0.0 if spread is None else max(spread, within_images) / math.sqrt(count)
    half = half_width(error, of_images, count, images, 1 - confidence)
    return Estimate(
        mean=mean, spread=spread, low=mean - half, high=mean + half,
        p=p_value(mean, error, of_images, count, images) if test else None, repeats=count,
        images=images, error_of_repeats=error, error_of_images=of_images,
        over="images" if spread is None else "repeats and images")


@dataclass(frozen=True)
class Parts:
    """Values of some repeats on the same images, taken apart.

    Attributes:
        of_repeats: float64 (S,), the mean of each repeat.
        within_images, of_images: As of `estimate`.
    """

    of_repeats: np.ndarray
    within_images: float
    of_images: float

    @classmethod
    def of(cls, values: np.ndarray) -> Parts:
        """Take values apart.

        Args:
            values: float64 (S, N), of S repeats on N images.
        """
        repeats, images = values.shape
        means = values.mean(1)
        if images == 1:
            return cls(means, 0.0, 0.0)
        centred = values - means[:, None]
        variance = float(centred.mean(0).var(ddof=1))
        alone = float(centred.var(0, ddof=1).mean()) if repeats > 1 else 0.0
        return cls(means, math.sqrt(alone / images),
                   math.sqrt(max(0.0, variance - alone / repeats) / images))


class CrossedMeans:
    """Means and gains of approaches, each a number of repeats on the same test images.

    Args:
        values: By approach and repeat, N bools or floats each; image i of each is the same image.
        confidence: Of the intervals, in (0, 1).

    Raises:
        ValueError: There are no values, or the numbers of images differ.
    """

    def __init__(self, values: Mapping[str, Mapping[int, np.ndarray]], *,
                 confidence: float = CONFIDENCE) -> None:
        counts = {len(v) for repeats in values.values() for v in repeats.values()}
        if len(counts) != 1 or 0 in counts or not all(values.values()):
            raise ValueError("means need at least one repeat of every approach, all on the same "
                             f"images: numbers of images are {sorted(counts)}, approaches "
                             f"{list(values)}")
        self.images, self.confidence = counts.pop(), confidence
        self._values = {name: {repeat: np.asarray(repeats[repeat], np.float64)
                               for repeat in sorted(repeats)} for name, repeats in values.items()}

    def mean(self, approach: str) -> Estimate:
        """Return the mean of an approach."""
        return self._estimate(Parts.of(np.stack(list(self._values[approach].values()))), False)

    def gain(self, approach: str, over: str) -> Estimate | None:
        """Return the mean paired difference approach - over, on the repeats that both have.

        Args:
            approach: The name of the approach.
            over: The name of the approach that it is compared with.

        Returns:
            The estimate, or None where they share no repeat.
        """
        repeats = self.shared(approach, over)
        return self._estimate(self.parts(approach, over, repeats), True) if repeats else None

    def shared(self, approach: str, over: str) -> list[int]:
        """Return the repeats that two approaches both have, in order."""
        return [r for r in self._values[approach] if r in self._values[over]]

    def parts(self, approach: str, over: str, repeats: Sequence[int]) -> Parts:
        """Return the paired differences approach - over in some repeats, taken apart."""
        ours, others = self._values[approach], self._values[over]
        return Parts.of(np.stack([ours[r] - others[r] for r in repeats]))

    def _estimate(self, parts: Parts, test: bool) -> Estimate:
        return estimate(parts.of_repeats, self.images, within_images=parts.within_images,
                        of_images=parts.of_images, confidence=self.confidence, test=test)


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
