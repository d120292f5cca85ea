"""What an experiment costs: the work that is left of each cell, times the rates that were measured.

Early stopping makes a training's length a range: from patience + 1 epochs to `epochs`. What is
known only once stage 1 is over (the selected batch size and split) is a range as well.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from impactx.approaches.baseline import BASELINE
from impactx.costs.count import Count, CountedGroup, count, shards_left
from impactx.costs.judging import Passes, passes_of
from impactx.costs.measured import JUDGING, MAPS, Making, Measured, Probe, Slots, likeness
from impactx.experiment.artifacts import Artifacts
from impactx.experiment.cell import Cell, Configuration
from impactx.experiment.steps.maps import Maps
from impactx.experiment.steps.quality import MapQuality
from impactx.experiment.steps.training import Model, Trial
from impactx.explain.attribution import Attribution
from impactx.settings.extensions import AttributionSettings
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

    def text(self, write: Callable[[float], str]) -> str:
        """Return both ends as text, or one where they read the same."""
        low, high = write(self.low), write(self.high)
        return low if low == high else f"{low} to {high}"


def counted(value: float) -> str:
    """Return a number of things for people."""
    return f"{value:,.0f}"


def probes_of(cells: Sequence[Cell]) -> list[Probe]:
    """Return what must be measured to price cells; of cells that are alike, one is measured."""
    probes: list[Probe] = []
    for cell in {likeness(cell): cell for cell in reversed(cells)}.values():
        sizes, flow = cell.settings.grid.batch_size, count(cell)
        probes += [Probe(cell, BASELINE, size) for size in sizes]
        for name in cell.approaches:
            own = {_batch_size(cell, name, size) for size in sizes}
            probes += [Probe(cell, name, size) for size in sorted(own)]
        makings = [Making(step.attribution, step.target) for step in flow.steps(Maps)]
        probes += [Probe(cell, MAPS, making=making) for making in dict.fromkeys(makings)]
        judged = [Making(part) for step in flow.steps(MapQuality)
                  for part in [step.attribution, *(order.attribution for order in step.orders)]]
        probes += [Probe(cell, JUDGING, making=making) for making in dict.fromkeys(judged)]
        probes += [Probe(cell, name, making=Making(own_maps.attribution))
                   for name in cell.approaches
                   if (own_maps := _own_maps(cell, name, flow.points))]
    return probes


def _batch_size(cell: Cell, subject: str, batch_size: int) -> int:
    """Return the batch size by which an approach is trained where the grid selected this one."""
    if subject == BASELINE:
        return batch_size
    approach = cell.approaches[subject]
    return approach.point(1.0, batch_size, approach.candidates()[0])[1]


@dataclass(frozen=True)
class Item:
    """A part of a cell's work: how much of it is left, and what that costs.

    Attributes:
        name: Of the part; text: What it is.
        slot: The kind of slot that it is done in; where: Those of the cell's model.
        seconds: Of all slots together.
        slots: That are busy at once, on average.
        pieces: That are done one by one in a slot, at most.
        longest: Seconds of the longest piece; nothing where the average knows of it already.
    """

    name: str
    text: str
    slot: str
    where: Slots
    seconds: Range
    slots: float
    pieces: float
    longest: Range = Range()

    def cpu_hours(self) -> Range:
        """Return CPUs held, times hours."""
        return self.seconds * (self.where.cpus / HOUR)

    def gpu_hours(self) -> Range:
        """Return GPUs held, times hours."""
        return self.seconds * (self.where.gpus / HOUR)

    def alone(self) -> Range:
        """Return the seconds that the part takes on the whole cluster.

        At best the slots share it evenly, but for the longest piece; at worst that one begins last
        (Graham 1966), or each round of pieces takes as long as it.
        """
        low, high = self.seconds.low / self.slots, self.seconds.high / self.slots
        if not self.longest.high:
            return Range(low, high)
        rounds = math.ceil(self.pieces / self.slots)
        return Range(max(low, self.longest.low),
                     min(high + self.longest.high * (1 - 1 / self.slots),
                         rounds * self.longest.high))


@dataclass(frozen=True)
class CellPrice:
    """What is left of a cell.

    Attributes:
        evaluations: Forward passes of an image, to make maps and to judge them.
        unpriced: Steps that nobody can price, by the title of their group.
        exists: What is finished, for people.
    """

    cell: Cell
    items: list[Item]
    trials: Range
    epochs: Range
    evaluations: Range
    map_bytes: int
    unpriced: dict[str, int]
    exists: str


def price_cell(cell: Cell, measured: Measured, artifacts: Artifacts) -> CellPrice:
    """Count what is left of a cell, and price it."""
    flow = count(cell, artifacts)
    price = _Pricing(flow, measured)
    stage1, trials, epochs = price.stage1()
    searches = {name: group for name, group in flow.searches.items() if name != BASELINE}
    searched = sum(len(group.left) for group in searches.values())
    models = flow.left(Model)
    maps, evaluations, images = price.maps(
        [(step, shards_left(step, cell, artifacts)) for step in flow.left(Maps)])
    judging, passes = price.judging()
    for name in cell.approaches:
        if own := _own_maps(cell, name, flow.points):
            trainings = sum(step.approach_name == name for step in [*models, *flow.left(Trial)])
            passes += own.maps * (own.evaluations * trainings)
    others = [name for name in cell.approaches if any(
        step.approach_name == name for step in flow.steps(Model))]
    items = [stage1, price.models("A's trainings", [BASELINE]), *maps,
             *(price.search(name, group) for name, group in searches.items() if group.left),
             *([price.models("final models", others)] if others else []), *judging]
    return CellPrice(
        cell, items, trials + Range(searched, searched),
        epochs + price.length * (len(models) + searched),
        Range(evaluations, evaluations) + passes, images * math.prod(cell.facts.image_size) * 3 * 4,
        unpriced_of(flow), exists(flow))


def exists(flow: Count) -> str:
    """Return what of a flow is finished, for people."""
    parts = [f"{len(group.done)} of {group.title}" for group in flow.groups if group.done]
    return ", ".join(parts) or "nothing"


def unpriced_of(flow: Count) -> dict[str, int]:
    """Return how many steps are left that no rate is measured for, by the title of their group."""
    left = {group.title: sum(step.kind not in _PRICED for step in group.left)
            for group in flow.groups}
    return {title: number for title, number in left.items() if number}


_PRICED = {Trial.kind, Model.kind, Maps.kind, MapQuality.kind, "test"}  # a test takes seconds


@dataclass(frozen=True)
class OwnMaps:
    """The maps that one training makes of its own network; evaluations: of each."""

    attribution: AttributionSettings
    maps: Range
    evaluations: int


def _own_maps(cell: Cell, name: str, points: Sequence[Configuration]) -> OwnMaps | None:
    """Return what trainings of an approach make themselves; None where they make none."""
    if name not in cell.approaches:
        return None
    approach = cell.approaches[name]
    images = [cell.facts.train_images - validation_images(cell, point) for point in points]
    length = epochs_of(cell)
    most = approach.maps_in_training(max(images), round(length.high))
    if not most:
        return None
    attribution = cell.attribution(approach)
    least = approach.maps_in_training(min(images), round(length.low))
    return OwnMaps(attribution, Range(least, most), evaluations_of(attribution, cell))


def evaluations_of(attribution: AttributionSettings, cell: Cell, target: str = "label") -> int:
    """Return the evaluations of one map; 0 where they are not known."""
    if not isinstance(attribution, Attribution):
        return 0
    size = cell.facts.image_size
    if target == "class_weighted":
        return attribution.weighted_evaluations(size, cell.facts.num_classes) or 0
    return attribution.evaluations(size) or 0


def epochs_of(cell: Cell) -> Range:
    """Return the epochs of a training."""
    training = cell.settings.training
    return Range(min(training.patience + 1, training.epochs), training.epochs)


def validation_images(cell: Cell, point: Configuration) -> int:
    """Return the number of images of the validation part."""
    return round(cell.facts.train_images * point.validation_fraction)


class _Pricing:
    """Prices the parts of one counted flow."""

    def __init__(self, flow: Count, measured: Measured) -> None:
        self.flow, self.cell, self.measured = flow, flow.cell, measured
        self.length, self.slots = epochs_of(flow.cell), measured.slots_of(flow.cell)

    def _epoch(self, slot: str, subject: str, point: Configuration) -> float:
        validation = validation_images(self.cell, point)
        return self.measured.epoch(
            slot, self.cell, subject, _batch_size(self.cell, subject, point.batch_size),
            self.cell.facts.train_images - validation, validation)

    def _item(self, name: str, text: str, slot: str, seconds: Range, pieces: float,
              longest: Range = Range()) -> Item:  # noqa: B008
        where = self.slots[slot]
        return Item(name, text, slot, where, seconds, max(1, min(pieces, where.count)), pieces,
                    longest)

    def stage1(self) -> tuple[Item, Range, Range]:
        """Return stage 1's item, its trials and their epochs.

        They are fewer than are left where the budget ends before them.
        """
        search = self.flow.searches[BASELINE]
        left = [trial for trial in search.left if isinstance(trial, Trial)]
        budget, slots = search.seconds_left, self.slots["trial"].count
        one = Range(self._shortest(), self.length.high)
        epoch = [self._epoch("trial", BASELINE, Configuration.of(trial)) for trial in left]
        seconds = [one * each for each in epoch]
        whole, longest = sum(seconds, Range()), _longest(seconds)
        trials, epochs = Range(len(left), len(left)), one * len(left)
        if epoch and budget < math.inf:
            # At least those begin that still do where all before them took longest; at most those
            # that do where all before them took shortest, but for as many as are under way and have
            # trained nothing yet.
            begun = sum(seconds[:search.begun], Range())
            lows, highs = sorted(each.low for each in seconds), [each.high for each in seconds]
            sure, perhaps = (
                sum(spent < budget for spent in itertools.accumulate(ends[:-1], initial=0.0))
                for ends in (highs, lows))
            most = min(len(left), perhaps + slots - 1) if budget else 0
            trials = Range(max(search.begun, sure), max(search.begun, most))
            # What is under way when the hours are over goes on to its end.
            over = sum(sorted(highs)[-slots:]) if budget else 0.0
            whole = Range(max(min(whole.low, budget), begun.low, sum(lows[:sure])),
                          min(whole.high, max(budget + over, begun.high)))
            # The longest may be among those that never begin.
            longest = Range(lows[0], longest.high)
            epochs = Range(max(one.low * trials.low, whole.low / max(epoch)),
                           min(one.high * trials.high, whole.high / min(epoch)))
        text = f"{trials.text(counted)} of {len(search.group.steps)} trials left"
        if budget < math.inf:
            text += f", as {duration(budget)} of training are left (grid.max_hours)"
        return (self._item("stage 1", text, "trial", whole, trials.high, longest), trials, epochs)

    def _shortest(self) -> float:
        """Return the epochs of the shortest trial of stage 1."""
        grid, low = self.cell.settings.grid, self.length.low
        return min(grid.grace_epochs, low) if grid.strategy == "asha" else low

    def _training(self, subject: str, slot: str) -> Range:
        """Return the seconds of one training, by any point that may be selected."""
        epochs = [self._epoch(slot, subject, point) for point in self.flow.points]
        seconds = Range(self.length.low * min(epochs), self.length.high * max(epochs))
        # The workers of a training share the maps that it makes.
        if own := _own_maps(self.cell, subject, self.flow.points):
            rate = self.measured.maps_of(slot, self.cell, subject, own.attribution)
            seconds += own.maps * (1 / (rate * self.slots[slot].workers))
        return seconds

    def search(self, name: str, group: CountedGroup) -> Item:
        """Return the item of an approach's search."""
        number, each = len(group.left), self._training(name, "trial")
        text = f"{number} of {len(group.group.steps)} trials left"
        return self._item(f"{name}'s search", text, "trial", each * number, number, each)

    def models(self, title: str, names: Sequence[str]) -> Item:
        """Return the item of final trainings that are done at once."""
        left = self.flow.left(Model)
        pieces = [self._training(name, "model") for name in names
                  for step in left if step.approach_name == name]
        listed = ", ".join("A" if name == BASELINE else name for name in names)
        text = f"{len(pieces)} trainings ({listed}; {self.cell.settings.repeats} repeats)"
        return self._item(title, text, "model", sum(pieces, Range()), len(pieces), _longest(pieces))

    def maps(self, stores: Sequence[tuple[Maps, list[int]]]) -> tuple[list[Item], int, int]:
        """Return items of the maps in each kind of slot, in proportion to its speed.

        Args:
            stores: With the number of maps in each shard that they lack.

        Returns:
            The items, and the evaluations and maps of all.
        """
        items: list[Item] = []
        evaluations, images = 0, 0
        makings = {Making(step.attribution, step.target): step for step, _ in stores}
        for making, step in makings.items():
            lacking = [shards for other, shards in stores
                       if shards and Making(other.attribution, other.target) == making]
            maps = sum(map(sum, lacking))
            a_map = evaluations_of(step.attribution, self.cell, step.target)
            evaluations, images = evaluations + maps * a_map, images + maps
            speed = self.measured.maps(self.cell, making, max(map(len, lacking), default=0))
            for slot, rate in speed.items():
                share, places = rate / sum(speed.values()), self.slots[slot].count
                seconds = maps * share / rate * places
                # A store after the other, and no more workers at a store than it lacks shards.
                at_once = maps / sum(sum(shards) / min(places, len(shards))
                                     for shards in lacking) if maps else places
                text = (f"{maps * share:,.0f} by {step.attribution.method}, "
                        f"{maps * share * a_map:,.0f} evaluations at {a_map * rate:,.0f}/s")
                items.append(self._item(slot, text, slot, Range(seconds, seconds), at_once))
        return items, evaluations, images

    def judging(self) -> tuple[list[Item], Range]:
        """Return the judgements that are left, and their forward passes."""
        left, cell = self.flow.left(MapQuality), self.cell
        if not left:
            return [], Range()
        passes = [passes_of(step, cell) for step in left]
        pieces = [sum((self._seconds(one) for one in some.all), Range()) for some in passes]
        maps = sum((Range(one.least, one.most) for some in passes for one in some.maps), Range())
        metrics = sum((Range(some.metrics.least, some.metrics.most) for some in passes), Range())
        text = (f"maps of {len(left)} of {len(self.flow.steps(MapQuality))} models on "
                f"{passes[0].images:,} test images, {maps.text(counted)} evaluations, and "
                f"{counted(metrics.high)} forward passes of metrics")
        item = self._item("judging", text, JUDGING, sum(pieces, Range()), len(left),
                          _longest(pieces))
        return [item], maps + metrics

    def _seconds(self, passes: Passes) -> Range:
        a_map = evaluations_of(passes.attribution, self.cell) or 1
        rate = self.measured.maps_of(JUDGING, self.cell, JUDGING, passes.attribution)
        return Range(passes.least, passes.most) * (passes.networks / (rate * a_map))


def _longest(pieces: Sequence[Range]) -> Range:
    return Range(max((each.low for each in pieces), default=0.0),
                 max((each.high for each in pieces), default=0.0))
