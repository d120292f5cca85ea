"""What an experiment costs: the work that is left of each cell, times the rates that were measured.

Early stopping makes a training's length a range: patience + 1 epochs at least, `epochs` at most. What is known only
once stage 1 is over (the selected batch size and split) is a range as well.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from impactx.experiment.measured import JUDGING, MAPS, Measured, Probe, like, made_by, made_of
from impactx.experiment.plan import BASELINE, Cell, Configuration
from impactx.experiment.rates import STAGE1
from impactx.experiment.survey import (
    Passes,
    Step,
    Survey,
    configuration_of,
    evaluations_of_map,
    shards_left,
    survey,
)
from impactx.experiment.units import Artifacts, Unit
from impactx.settings import AttributionSettings
from impactx.timing import duration

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


def counted(value: float) -> str:
    """A number of things for people."""
    return f"{value:,.0f}"


def probes_of(cells: Sequence[Cell]) -> list[Probe]:
    """What must be measured to price these cells; of cells that are alike, one."""
    found = []
    for cell in {like(cell): cell for cell in reversed(cells)}.values():
        sizes = cell.settings.grid.batch_size
        found += [Probe(cell, STAGE1, size) for size in sizes]
        for approach in cell.approaches():
            found += [Probe(cell, approach.name, size)
                      for size in dict.fromkeys(_batch_size(cell, approach.name, size) for size in sizes)]
        steps = survey(cell)
        found += [Probe(cell, MAPS, 0, made) for made in dict.fromkeys(made_of(unit) for unit in steps.stores.units)]
        makers = [one for judgement in steps.judged.values() for one in judgement.attributions]
        found += [Probe(cell, JUDGING, 0, made) for made in dict.fromkeys(map(made_by, makers))]
        found += [Probe(cell, one.name, 0, made_by(own.attribution)) for one in cell.approaches()
                  if (own := _own(cell, one.name, steps.points))]
    return found


@dataclass(frozen=True)
class Item:
    """A step of a cell: how much of it there is, how much is left, and what that costs.

    seconds: of all slots together; slots: that are busy at once, on average; pieces: that are done one by one in a
    slot, at most; longest: seconds of the longest of them, nothing where the average knows of it already.
    """

    name: str
    what: str
    slot: str
    seconds: Range
    slots: float
    pieces: float
    longest: Range = Range()

    def cpu_hours(self, measured: Measured) -> Range:
        """CPUs held, times hours."""
        return self.seconds * (measured.slots[self.slot].cpus / HOUR)

    def gpu_hours(self, measured: Measured) -> Range:
        """GPUs held, times hours."""
        return self.seconds * (measured.slots[self.slot].gpus / HOUR)

    def alone(self) -> Range:
        """Seconds on the whole cluster.

        At best the slots share it evenly, but for the longest piece; at worst that one begins last (Graham 1966), or
        each round of pieces takes as long as it.
        """
        low, high = self.seconds.low / self.slots, self.seconds.high / self.slots
        if not self.longest.high:
            return Range(low, high)
        rounds = math.ceil(self.pieces / self.slots)
        return Range(max(low, self.longest.low),
                     min(high + self.longest.high * (1 - 1 / self.slots), rounds * self.longest.high))


@dataclass(frozen=True)
class CellPrice:
    """What is left of a cell."""

    cell: Cell
    items: list[Item]
    trials: Range
    epochs: Range
    evaluations: Range  # forward passes of an image, to make maps and to judge them
    map_bytes: int
    exists: str


def price_cell(cell: Cell, measured: Measured, artifacts: Artifacts) -> CellPrice:
    """Count what is left of a cell and price it."""
    steps = survey(cell, artifacts)
    searches = {name: step for name, step in steps.searches.items() if step.left}
    searched = sum(len(step.left) for step in searches.values())
    trainings = sum(len(step.left) for step in steps.models.values())
    stage1, trials, epochs = _stage1(cell, steps, measured)
    maps, evaluations, images = _map_items(
        cell, [(unit, shards_left(cell, unit, artifacts)) for unit in steps.stores.left], measured)
    judging, passes = _judging(cell, steps, measured)
    others = [name for name in steps.models if name != BASELINE]
    for name, step in steps.models.items():
        if own := _own(cell, name, steps.points):
            of_search = len(searches[name].left) if name in searches else 0
            passes += own.maps * (own.evaluations * (len(step.left) + of_search))
    return CellPrice(
        cell, [stage1, _models(cell, "A's trainings", [BASELINE], steps, measured), *maps,
               *(_search(cell, name, step, steps.points, measured) for name, step in searches.items()),
               *([_models(cell, "final models", others, steps, measured)] if others else []), *judging],
        trials + Range(searched, searched), epochs + _length(cell) * (trainings + searched),
        Range(evaluations, evaluations) + passes, images * math.prod(cell.facts.image_size) * 3 * 4,
        ", ".join([f"{len(steps.stage1.made)} trials", *steps.exists()]))


def _length(cell: Cell) -> Range:
    """Epochs of a training."""
    training = cell.settings.training
    return Range(min(training.patience + 1, training.epochs), training.epochs)


def _shortest(cell: Cell) -> float:
    """Epochs of the shortest trial of stage 1."""
    grid, low = cell.settings.grid, _length(cell).low
    return min(grid.grace_epochs, low) if grid.strategy == "asha" else low


def _stage1(cell: Cell, steps: Survey, measured: Measured) -> tuple[Item, Range, Range]:
    """Stage 1's item, and its trials and their epochs: fewer than are left where the budget ends before them."""
    left, budget, slots = steps.stage1.left, steps.hours, measured.slots["trial"].count
    one = Range(_shortest(cell), _length(cell).high)
    epoch = [_epoch(measured, "trial", cell, STAGE1, configuration_of(unit)) for unit in left]
    seconds = [one * each for each in epoch]
    whole, longest = sum(seconds, Range()), _longest(seconds)
    trials, epochs = Range(len(left), len(left)), one * len(left)
    if epoch and budget.seconds < math.inf:
        # At least those begin that still do where all before them took longest; at most those that do where all
        # before them took shortest, but for as many as are under way and have trained nothing yet.
        begun = sum(seconds[:budget.begun], Range())
        lows, highs = sorted(each.low for each in seconds), [each.high for each in seconds]
        sure, perhaps = (sum(spent < budget.seconds for spent in itertools.accumulate(ends[:-1], initial=0.0))
                         for ends in (highs, lows))
        trials = Range(max(budget.begun, sure),
                       max(budget.begun, min(len(left), perhaps + slots - 1) if budget.seconds else 0))
        # What is under way when the hours are over goes on to its end.
        over = sum(sorted(highs)[-slots:]) if budget.seconds else 0.0
        whole = Range(max(min(whole.low, budget.seconds), begun.low, sum(lows[:sure])),
                      min(whole.high, max(budget.seconds + over, begun.high)))
        longest = Range(lows[0], longest.high)  # the longest may be among those that never begin
        epochs = Range(max(one.low * trials.low, whole.low / max(epoch)),
                       min(one.high * trials.high, whole.high / min(epoch)))
    text = f"{trials.say(counted)} of {len(steps.stage1.units)} trials left"
    if budget.seconds < math.inf:
        text += f", as {duration(budget.seconds)} of training are left (grid.max_hours)"
    return _item("stage 1", text, "trial", whole, trials.high, measured, longest), trials, epochs


def _longest(pieces: Sequence[Range]) -> Range:
    return Range(max((each.low for each in pieces), default=0.0), max((each.high for each in pieces), default=0.0))


def _training(cell: Cell, what: str, slot: str, points: Sequence[Configuration], measured: Measured) -> Range:
    """Seconds of one training, by any of these points."""
    epochs = [_epoch(measured, slot, cell, what, point) for point in points]
    seconds = Range(_length(cell).low * min(epochs), _length(cell).high * max(epochs))
    if own := _own(cell, what, points):  # its workers share them
        rate = measured.maps_of(slot, cell, what, own.attribution) * measured.slots[slot].workers
        seconds += own.maps * (1 / rate)
    return seconds


@dataclass(frozen=True)
class OwnMaps:
    """The maps that one training makes itself; evaluations: of each."""

    attribution: AttributionSettings
    maps: Range
    evaluations: int


def _own(cell: Cell, what: str, points: Sequence[Configuration]) -> OwnMaps | None:
    """None where a training makes none."""
    approach = cell.settings.approaches.get(what)
    images = [cell.facts.train_images - _validation(cell, point) for point in points]
    if approach is None or not (most := approach.maps_in_training(max(images), round(_length(cell).high))):
        return None
    attribution = approach.own_attribution or cell.settings.attribution
    least = approach.maps_in_training(min(images), round(_length(cell).low))
    return OwnMaps(attribution, Range(least, most), attribution.evaluations(cell.facts.image_size) or 0)


def _search(cell: Cell, name: str, trials: Step, points: Sequence[Configuration], measured: Measured) -> Item:
    n, each = len(trials.left), _training(cell, name, "trial", points, measured)
    return _item(f"{name}'s search", f"{n} of {len(trials.units)} trials left", "trial", each * n, n, measured, each)


def _models(cell: Cell, title: str, names: Sequence[str], steps: Survey, measured: Measured) -> Item:
    """Final trainings that are done at once: A's by themselves, as maps and searches come between them and the rest."""
    pieces = []
    for name in names:
        if left := steps.models[name].left:
            what = STAGE1 if name == BASELINE else name
            pieces += [_training(cell, what, "model", steps.points, measured)] * len(left)
    named = ", ".join("A" if name == BASELINE else name for name in names)
    return _item(title, f"{len(pieces)} trainings ({named}; {cell.settings.repeats} repeats)", "model",
                 sum(pieces, Range()), len(pieces), measured, _longest(pieces))


def _map_items(cell: Cell, stores: Sequence[tuple[Unit, list[int]]], measured: Measured
               ) -> tuple[list[Item], int, int]:
    """Each kind of maps in each kind of slot, in proportion to its speed; evaluations and images of all.

    stores: with the number of maps in each shard that they lack.
    """
    items, evaluations, images = [], 0, 0
    for made in dict.fromkeys(made_of(unit) for unit, _ in stores):
        lacking = [shards for unit, shards in stores if made_of(unit) == made and shards]
        maps = sum(map(sum, lacking))
        attribution, target = json.loads(made)
        a_map = evaluations_of_map(cell, attribution, target, cell.facts.image_size) or 0
        evaluations, images = evaluations + maps * a_map, images + maps
        speed = measured.maps(cell, made)
        for slot, rate in speed.items():
            share, count = rate / sum(speed.values()), measured.slots[slot].count
            seconds = maps * share / rate * count
            # A store after the other, and no more of these workers at a store than it lacks shards.
            at_once = maps / sum(sum(shards) / min(count, len(shards)) for shards in lacking) if maps else count
            items.append(_item(slot, f"{maps * share:,.0f} by {attribution['method']}, {maps * share * a_map:,.0f} "
                               f"evaluations at {a_map * rate:,.0f}/s", slot, Range(seconds, seconds), at_once,
                               measured))
    return items, evaluations, images


def _judging(cell: Cell, steps: Survey, measured: Measured) -> tuple[list[Item], Range]:
    """The judgements that are left, and their forward passes."""
    left, size = [steps.judged[unit.key] for unit in steps.judgements.left], cell.facts.image_size
    if not left:
        return [], Range()
    maps, morf = ([passes for judgement in left for passes in judgement.maps(size)],
                  [judgement.morf(size) for judgement in left])
    pieces = [sum((_passes_seconds(cell, passes, measured) for passes in [*judgement.maps(size), judgement.morf(size)]),
                  Range()) for judgement in left]
    of_maps, of_morf = (sum((Range(one.least, one.most) for one in some), Range()) for some in (maps, morf))
    text = (f"maps of {len(left)} of {len(steps.judgements.units)} models on {left[0].images:,} test images, "
            f"{of_maps.say(counted)} evaluations, and {counted(of_morf.high)} forward passes of MoRF")
    # A cell judges no more models at once than it trains.
    at_once = max(1, min(len(left), measured.slots["model"].count, measured.slots[JUDGING].count))
    return [Item("judging", text, JUDGING, sum(pieces, Range()), at_once, len(left), _longest(pieces))
            ], of_maps + of_morf


def _passes_seconds(cell: Cell, passes: Passes, measured: Measured) -> Range:
    a_map = passes.attribution.evaluations(cell.facts.image_size) or 1
    each = passes.networks / (measured.maps_of(JUDGING, cell, JUDGING, passes.attribution) * a_map)
    return Range(passes.least, passes.most) * each


def _epoch(measured: Measured, slot: str, cell: Cell, what: str, point: Configuration) -> float:
    validation = _validation(cell, point)
    return measured.epoch(slot, cell, what, _batch_size(cell, what, point.batch_size), cell.facts.train_images - validation, validation)


def _batch_size(cell: Cell, what: str, of_a: int) -> int:
    """Of the trainings of an approach (or of A), where A's is `of_a`."""
    approach = cell.settings.approaches.get(what)
    return of_a if approach is None else approach.point(1.0, of_a, approach.candidates()[0])[1]


def _validation(cell: Cell, point: Configuration) -> int:
    return round(cell.facts.train_images * point.validation_fraction)


def _item(name: str, what: str, slot: str, seconds: Range, pieces: float, measured: Measured,
          longest: Range = Range()) -> Item:
    return Item(name, what, slot, seconds, max(1, min(pieces, measured.slots[slot].count)), pieces, longest)
