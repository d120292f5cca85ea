"""Numbers as texts: accuracies are fractions in [0, 1] and are shown in percent, differences of them in points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NONE = "–"


def percent(value: float | None, digits: int = 2) -> str:
    """0.7047 as 70.47."""
    return NONE if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None, digits: int = 2) -> str:
    """0.0272 as +2.72, with a real minus."""
    return NONE if value is None else f"{100 * value:+.{digits}f}".replace("-", "−")


def interval(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """An estimate's interval (mean, low, high) as [70.10, 70.84]."""
    if estimate is None:
        return NONE
    show = points if signed else percent
    return f"[{show(estimate['low'])}, {show(estimate['high'])}]"


def probability(value: float | None) -> str:
    """A p value: 0.031, < 0.001."""
    return NONE if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def number(value: Any) -> str:
    """A setting's number in its shortest form."""
    return NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def quantity(value: float) -> str:
    """A count with thousands apart."""
    return f"{value:,.0f}"
