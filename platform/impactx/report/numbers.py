"""Numbers as texts.

Accuracies are fractions in [0, 1]; they are shown in percent, and their differences in points.
"""

from __future__ import annotations

from typing import Any, Protocol

NONE = "–"


class Bounds(Protocol):
    """A mean with the ends of its interval; None where there are no values."""

    @property
    def mean(self) -> float | None:
        """The mean."""

    @property
    def low(self) -> float | None:
        """The lower end."""

    @property
    def high(self) -> float | None:
        """The upper end."""


def percent(value: float | None, digits: int = 2) -> str:
    """Return 0.7047 as 70.47."""
    return NONE if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None, digits: int = 2) -> str:
    """Return 0.0272 as +2.72, with a typographer's minus for negative values."""
    return NONE if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def interval(estimate: Bounds, *, signed: bool = False) -> str:
    """Return the interval of an estimate as [70.10, 70.84].

    Args:
        estimate: Of fractions.
        signed: Whether the values are differences.
    """
    show = points if signed else percent
    return f"[{show(estimate.low)}, {show(estimate.high)}]"


def probability(value: float) -> str:
    """Return a p-value as 0.031 or < 0.001."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: Any) -> str:
    """Return the number of a setting in its shortest form."""
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def quantity(value: float) -> str:
    """Return a count with its thousands separated."""
    return f"{value:,.0f}"
