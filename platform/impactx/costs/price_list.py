"""The prices of a plan as text."""

from __future__ import annotations

from collections.abc import Sequence

from impactx.costs.measured import Measured
from impactx.costs.pricing import HOUR, CellPrice, Item, Range, counted
from impactx.timing import duration


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _hours(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def price_list(prices: Sequence[CellPrice], measured: Measured, cells_at_once: int) -> str:
    """The prices as text, cell by cell and in all. cells_at_once: that the job has under way."""
    lines = ["measured:", *measured.lines(), ""]
    for price in prices:
        lines += [price.cell.name + f"   (exists: {price.exists})"]
        for item in price.items:
            gpus = item.gpu_hours()
            cpus = item.cpu_hours().text(_hours)
            lines.append(f"  {item.name + ':':18} {item.text}; {cpus} CPU-hours"
                         + (f", {gpus.text(_hours)} GPU-hours" if gpus.high else ""))
        first, *more = _sums([price], price.items)
        lines += [f"  together: {first}", *(f"            {line}" for line in more)]
        lines += [f"  not priced: {number} of {title}" for title, number in price.unpriced.items()]
        alone = sum((item.alone() for item in price.items), Range())
        lines.append(f"  alone on this cluster as it is now: {alone.text(duration)}")
    items = [item for price in prices for item in price.items]
    whole = _whole(prices, items, measured, min(cells_at_once, len(prices)))
    first, *more = _sums(prices, items)
    return "\n".join(lines + [
        "", f"in all: {first}", *(f"        {line}" for line in more),
        f"        {whole.text(duration)} on this cluster as it is now, without start-up "
        "times (about 15 s a final training) and what several workers of one training exchange"])


def _whole(prices: Sequence[CellPrice], items: Sequence[Item], measured: Measured, at_once: int
           ) -> Range:
    """Seconds of these cells, so many of which are under way at once.

    At best cells fill each other's gaps: then it is bound by the devices, by the slots of each kind
    (of trials the settings may allow fewer than fit, of all cells together), by the longest cell,
    and by how many go side by side. At worst no cell gains by the others.
    """
    cpus = sum(item.cpu_hours().low for item in items)
    gpus = sum(item.gpu_hours().low for item in items)
    by_slot: dict[tuple[str, str], float] = {}  # of each model, which has shares of its own
    for price in prices:
        for item in price.items:
            key = price.cell.model.name, item.slot
            by_slot[key] = by_slot.get(key, 0.0) + item.seconds.low / item.where.count
    alone = [sum((item.alone() for item in price.items), Range()) for price in prices]
    least = max([cpus * HOUR / measured.cpus, gpus * HOUR / measured.gpus if measured.gpus else 0.0,
                 *by_slot.values(), *(one.low for one in alone),
                 sum(one.low for one in alone) / at_once])
    return Range(least, sum(one.high for one in alone))


def _sums(prices: Sequence[CellPrice], items: Sequence[Item]) -> list[str]:
    """What is left of these cells together."""
    epochs, evaluations = (sum(parts, Range()) for parts in (
        (price.epochs for price in prices), (price.evaluations for price in prices)))
    cpus = sum((item.cpu_hours() for item in items), Range())
    gpus = sum((item.gpu_hours() for item in items), Range())
    trials = sum((price.trials for price in prices), Range())
    return [f"{trials.text(counted)} trials, {epochs.text(counted)} epochs, "
            f"{evaluations.text(counted)} evaluations, maps of at most "
            f"{_bytes(sum(price.map_bytes for price in prices))}",
            f"{cpus.text(_hours)} CPU-hours, {gpus.text(_hours)} GPU-hours"]
