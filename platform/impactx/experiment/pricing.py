"""What an experiment costs: the work that is left of each cell, times the rates that were measured.

Early stopping makes a training's length a range: patience + 1 epochs at least, `epochs` at most. What is known only
once stage 1 is over (the selected batch size and split) is a range as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from impactx.experiment.plan import Cell, Configuration, select
from impactx.experiment.rates import STAGE1, TrainingRate
from impactx.experiment.units import Artifacts, Unit
from impactx.timing import duration

MAPS = "maps"
HOUR = 3600.0


@dataclass(frozen=True)
class Range:
    """A smallest and a largest value."""

    low: float = 0.0
    high: float = 0.0

    def __add__(self, other: Range) -> Range:
        return Range(self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> Range:
        return Range(self.low * factor, self.high * factor)

    def say(self, text: Any) -> str:
        """Both ends by a function, or one where they read the same."""
        low, high = text(self.low), text(self.high)
        return low if low == high else f"{low} to {high}"


@dataclass(frozen=True)
class Slots:
    """How many pieces of work of a kind the cluster holds at once, and what each takes."""

    count: int
    cpus: float
    gpus: float


@dataclass(frozen=True)
class Probe:
    """Something to measure: of a cell, "stage 1", an approach's name or "maps"; batch_size: 0 for maps."""

    cell: Cell
    what: str
    batch_size: int = 0


def like(cell: Cell) -> tuple[Any, ...]:
    """Cells that are as fast as each other have the same."""
    return cell.model.name, cell.facts.image_size


def probes_of(cells: Sequence[Cell]) -> list[Probe]:
    """What must be measured to price these cells; of cells that are alike, one."""
    found = []
    for cell in {like(cell): cell for cell in reversed(cells)}.values():
        sizes = cell.settings.grid.batch_size
        found += [Probe(cell, STAGE1, size) for size in sizes]
        for name, approach in cell.settings.approaches.items():
            own = getattr(approach, "batch_size", None)
            found += [Probe(cell, name, size) for size in ([own] if own else sizes)]
        if cell.settings.approaches:
            found.append(Probe(cell, MAPS))
    return found


@dataclass
class Measured:
    """Rates by kind of slot ("trial", "model", "maps on CPUs", "maps on GPUs"), on a cluster of so many CPUs, GPUs."""

    slots: dict[str, Slots]
    cpus: float
    gpus: float
    _rates: dict[tuple[Any, ...], list[tuple[int, list[Any]]]] = field(default_factory=dict)

    def add(self, slot: str, probe: Probe, count: int, rates: list[Any]) -> None:
        """Rates of a probe on one kind of node, of which the cluster has `count` such slots."""
        self._rates.setdefault((slot, *like(probe.cell), probe.what, probe.batch_size), []).append((count, rates))

    def epoch(self, slot: str, cell: Cell, what: str, batch_size: int, train: int, validation: int) -> float:
        """Seconds of an epoch in such a slot, over the kinds of nodes (each takes as many as it is fast)."""
        found = self._rates[slot, *like(cell), what, batch_size]
        speed = sum(count * _mean([1 / rate.seconds(train, validation, batch_size) for rate in rates])
                    for count, rates in found)
        return sum(count for count, _ in found) / speed

    def maps(self, cell: Cell) -> dict[str, float]:
        """Maps a second by kind of slot, of all such slots together."""
        return {slot: sum(count * _mean(rates) for count, rates in self._rates[slot, *like(cell), MAPS, 0])
                for slot in self.slots if (slot, *like(cell), MAPS, 0) in self._rates}

    def lines(self) -> list[str]:
        """What was measured, for people."""
        found = []
        for (slot, model, size, what, batch), kinds in self._rates.items():
            for count, rates in kinds:
                where = f"  {slot} ({count} at once): {model} on {size[0]}x{size[1]}, {what}"
                if what == MAPS:
                    found.append(f"{where}: {_mean(rates):.3g} maps/s each")
                else:
                    mean = TrainingRate(*(_mean([getattr(r, name) for r in rates])
                                          for name in ("step", "image", "epoch")))
                    found.append(f"{where}, batch {batch}: {1000 * mean.step:.3g} ms a step, "
                                 f"{1000 * mean.image:.3g} ms a validation image")
        return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Item:
    """A step of a cell: how much of it there is, how much is left, and what that costs."""

    name: str
    what: str
    slot: str
    seconds: Range  # of all slots together
    slots: int

    def cpu_hours(self, measured: Measured) -> Range:
        """CPUs held, times hours."""
        return self.seconds * (measured.slots[self.slot].cpus / HOUR)

    def gpu_hours(self, measured: Measured) -> Range:
        """GPUs held, times hours."""
        return self.seconds * (measured.slots[self.slot].gpus / HOUR)

    def alone(self) -> Range:
        """Seconds on the whole cluster."""
        return self.seconds * (1 / self.slots)


@dataclass(frozen=True)
class CellPrice:
    """What is left of a cell."""

    cell: Cell
    items: list[Item]
    trials: int
    epochs: Range
    evaluations: int
    map_bytes: int
    exists: str


def price_cell(cell: Cell, measured: Measured, artifacts: Artifacts) -> CellPrice:
    """Count what is left of a cell and price it."""
    settings, training, facts = cell.settings, cell.settings.training, cell.facts
    length = Range(min(training.patience + 1, training.epochs), training.epochs)
    trials = cell.stage1_trials()
    left = [unit for unit in trials if artifacts.result(unit) is None and artifacts.stopped(unit) is None]
    shortest = min(settings.grid.grace_epochs, length.low) if settings.grid.strategy == "asha" else length.low
    trial_seconds = Range()
    for unit in left:
        epoch = _epoch(measured, "trial", cell, STAGE1, _configuration(unit))
        trial_seconds += Range(shortest * epoch, length.high * epoch)
    if settings.grid.max_hours is not None:
        most = settings.grid.max_hours * HOUR
        trial_seconds = Range(min(trial_seconds.low, most), min(trial_seconds.high, most))
    items = [_item("stage 1", f"{len(left)} of {len(trials)} trials left", "trial", trial_seconds, len(left), measured)]
    # Until the search is over, any of its points may be the selected one.
    results = {unit.key: result for unit in trials if (result := artifacts.result(unit)) is not None}
    chosen = [select(trials, results, cell.selection_metric)[0]] if not left and results else trials
    points = [_configuration(unit) for unit in chosen]
    names = {"A": STAGE1} | {name: name for name in settings.approaches}
    made = _made(cell, artifacts, points[0]) if len(points) == 1 else {}
    tries, final_seconds, trainings = 0, Range(), 0
    for label, what in names.items():
        epochs = [_epoch(measured, "model", cell, what, point) for point in points]
        count = settings.repeats - made.get(label, 0)
        trainings += count
        final_seconds += Range(length.low * min(epochs), length.high * max(epochs)) * count
        candidates = len(getattr(settings.approaches[label], "lambdas", [0])) if label != "A" else 1
        if candidates > 1:
            tries += candidates
            epochs = [_epoch(measured, "trial", cell, what, point) for point in points]
            trial = Range(length.low * min(epochs), length.high * max(epochs)) * candidates
            items.append(_item(f"search of {label}", f"{candidates} trials", "trial", trial, candidates, measured))
    items.insert(1, _item("final models", f"{trainings} trainings (A{''.join(f', {n}' for n in settings.approaches)}; "
                          f"{settings.repeats} repeats)", "model", final_seconds, trainings, measured))
    stores = settings.repeats - made.get(MAPS, 0) if settings.approaches else 0
    a_map = settings.attribution.evaluations(facts.image_size) or 0
    if stores:
        speed, images = measured.maps(cell), stores * facts.train_images
        for slot, rate in speed.items():
            share = rate / sum(speed.values())
            seconds = images * share / rate * measured.slots[slot].count
            items.append(_item(slot, f"{images * share:,.0f} maps, {images * share * a_map:,.0f} evaluations, "
                               f"{a_map * rate:,.0f} evaluations/s", slot, Range(seconds, seconds),
                               measured.slots[slot].count, measured))
    size = math.prod(facts.image_size) * 3 * 4
    exists = [f"{len(trials) - len(left)} trials"] + [f"{count} {name}" for name, count in made.items() if count]
    epochs = Range(shortest, length.high) * len(left) + length * (trainings + tries)
    return CellPrice(cell, items, len(left) + tries, epochs, stores * facts.train_images * a_map,
                     stores * facts.train_images * size, ", ".join(exists))


def _configuration(unit: Unit) -> Configuration:
    return Configuration(*(unit.params[k] for k in ("learning_rate", "batch_size", "validation_fraction")))


def _epoch(measured: Measured, slot: str, cell: Cell, what: str, point: Configuration) -> float:
    validation = round(cell.facts.train_images * point.validation_fraction)
    own = getattr(cell.settings.approaches.get(what), "batch_size", None)
    return measured.epoch(slot, cell, what, own or point.batch_size, cell.facts.train_images - validation, validation)


def _item(name: str, what: str, slot: str, seconds: Range, pieces: int, measured: Measured) -> Item:
    return Item(name, what, slot, seconds, max(1, min(pieces, measured.slots[slot].count)))


def _made(cell: Cell, artifacts: Artifacts, point: Configuration) -> dict[str, int]:
    """How many A and stores of maps are there already."""
    models = [(cell.stage1_model(point, r), r) for r in range(cell.settings.repeats)]
    found = [(a, r, result) for a, r in models if (result := artifacts.result(a)) is not None]
    stores = sum(artifacts.result(cell.maps(a, result, r)) is not None for a, r, result in found
                 if result["weights"]) if cell.settings.approaches else 0
    return {"A": len(found), MAPS: stores}


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
    epochs = sum((price.epochs for price in prices), Range())
    return "\n".join(lines + [
        "", f"in all: {sum(price.trials for price in prices)} trials, {epochs.say(lambda n: f'{n:,.0f}')} epochs, "
        f"{sum(price.evaluations for price in prices):,} evaluations, maps of at most "
        f"{_bytes(sum(price.map_bytes for price in prices))}",
        f"        {cpus.say(_hours)} CPU-hours, {gpus.say(_hours)} GPU-hours",
        f"        {whole.say(duration)} on this cluster as it is now, without start-up "
        "times (about 15 s a final training)"])
