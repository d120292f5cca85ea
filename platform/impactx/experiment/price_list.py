"""The prices of a plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from impactx.experiment.pricing import HOUR, CellPrice, Item, Measured, Range, counted
from impactx.timing import duration


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _hours(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def price_list(prices: Sequence[CellPrice], measured: Measured) -> str:
    """The prices as text, cell by cell and in all."""
    lines = ["measured:", *measured.lines(), ""]
    for price in prices:
        lines += [price.cell.name + f"   (exists: {price.exists})"]
        for item in price.items:
            gpus = item.gpu_hours(measured)
            lines.append(f"  {item.name + ':':18} {item.what}; {item.cpu_hours(measured).say(_hours)} CPU-hours"
                         + (f", {gpus.say(_hours)} GPU-hours" if gpus.high else ""))
        lines += [f"  together: {line}" if k == 0 else f"            {line}" for k, line in enumerate(
            _sums([price], price.items, measured))]
        alone = sum((item.alone() for item in price.items), Range())
        lines.append(f"  alone on this cluster as it is now: {alone.say(duration)}")
    items = [item for price in prices for item in price.items]
    cpus = sum((item.cpu_hours(measured) for item in items), Range())
    gpus = sum((item.gpu_hours(measured) for item in items), Range())
    alone = [sum((item.alone() for item in price.items), Range()) for price in prices]
    # At best cells fill each other's gaps: then the devices bound it, or the longest cell; at worst none does.
    least = max([cpus.low * HOUR / measured.cpus, gpus.low * HOUR / measured.gpus if measured.gpus else 0.0,
                 *(one.low for one in alone)])
    whole = Range(least, sum(one.high for one in alone))
    first, *more = _sums(prices, items, measured)
    return "\n".join(lines + [
        "", f"in all: {first}", *(f"        {line}" for line in more),
        f"        {whole.say(duration)} on this cluster as it is now, without start-up "
        "times (about 15 s a final training) and what several workers of one training exchange"])


def _sums(prices: Sequence[CellPrice], items: Sequence[Item], measured: Measured) -> list[str]:
    """What is left of these cells together."""
    epochs, evaluations = (sum(parts, Range()) for parts in (
        (price.epochs for price in prices), (price.evaluations for price in prices)))
    cpus = sum((item.cpu_hours(measured) for item in items), Range())
    gpus = sum((item.gpu_hours(measured) for item in items), Range())
    return [f"{sum(price.trials for price in prices)} trials, {epochs.say(counted)} epochs, "
            f"{evaluations.say(counted)} evaluations, maps of at most "
            f"{_bytes(sum(price.map_bytes for price in prices))}",
            f"{cpus.say(_hours)} CPU-hours, {gpus.say(_hours)} GPU-hours"]
