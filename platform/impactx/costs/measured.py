"""What was measured of a cluster: the rate of each kind of work in each kind of slot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from impactx.costs.rates import TrainingRate
from impactx.experiment.cell import Cell
from impactx.experiment.steps.maps import Target
from impactx.settings.extensions import AttributionSettings

MAPS, JUDGING = "maps", "judging"
ON_CPUS, ON_GPUS = "maps on CPUs", "maps on GPUs"


def joins(made: int, left: int) -> bool:
    """Return whether actors on CPUs shorten the end of a store that those on GPUs have begun.

    They do if each would make at least one of the shards that are left, before the GPUs have made
    them all.

    Args:
        made: Shards that those on GPUs made while one actor on a CPU made one.
        left: Shards that nobody has made yet.
    """
    return made < left


@dataclass(frozen=True)
class Slots:
    """The places for one kind of work on a cluster.

    Attributes:
        count: Pieces of work that are under way at once.
        cpus, gpus: That each piece holds, all its workers together.
        workers: Processes that share each batch of one piece.
    """

    count: int
    cpus: float
    gpus: float
    workers: int = 1


@dataclass(frozen=True, eq=False)
class Making:
    """What the speed of making maps depends on beside the model: attribution and target."""

    attribution: AttributionSettings
    target: Target = "label"

    # Settings may hold lists, which have no hash of their own.
    def _identity(self) -> tuple[str, Target]:
        return self.attribution.model_dump_json(), self.target

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Making) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __str__(self) -> str:
        return f"{self.attribution.method} of {self.target}"


@dataclass(frozen=True)
class Probe:
    """Something to measure.

    Attributes:
        cell: Whose model and images.
        subject: The approach whose training is measured (A's is "baseline"), or whose maps of
            itself are; `MAPS` or `JUDGING`: maps of A, where stores are made and where models are
            judged.
        batch_size: Of a training; 0 for maps.
        making: Of maps; None for a training.
    """

    cell: Cell
    subject: str
    batch_size: int = 0
    making: Making | None = None


Likeness = tuple[str, tuple[int, int]]
Key = tuple[str, Likeness, str, int, Making | None]


def likeness(cell: Cell) -> Likeness:
    """Return what cells have in common that are as fast as each other: model and image size."""
    return cell.model.name, cell.facts.image_size


@dataclass
class Measured:
    """Rates by kind of slot: "trial", "model", "maps on CPUs", "maps on GPUs", "judging".

    Attributes:
        slots: The places for each kind of work of each model, by the model's name.
        cpus, gpus: Of the cluster.
    """

    slots: dict[str, dict[str, Slots]]
    cpus: float
    gpus: float
    _trainings: dict[Key, list[tuple[int, list[TrainingRate]]]] = field(default_factory=dict)
    _maps: dict[Key, list[tuple[int, list[float]]]] = field(default_factory=dict)

    def add_training(self, slot: str, probe: Probe, count: int, rates: list[TrainingRate]) -> None:
        """Add rates measured on one kind of node, of which the cluster has room for `count`."""
        self._trainings.setdefault(_key(slot, probe), []).append((count, rates))

    def add_maps(self, slot: str, probe: Probe, count: int, rates: list[float]) -> None:
        """Add maps a second, measured as in `add_training`."""
        self._maps.setdefault(_key(slot, probe), []).append((count, rates))

    def slots_of(self, cell: Cell) -> dict[str, Slots]:
        """Return the places for each kind of work of a cell."""
        return self.slots[cell.model.name]

    def epoch(self, slot: str, cell: Cell, subject: str, batch_size: int, train: int,
              validation: int) -> float:
        """Return the seconds of an epoch in such a slot, over the kinds of nodes.

        Each kind takes as many pieces of work as it is fast.

        Args:
            slot: A kind of slot.
            cell: Model and image size.
            subject: The approach.
            batch_size: Of a global batch.
            train: Number of training images.
            validation: Number of validation images.
        """
        rates = self._trainings[slot, likeness(cell), subject, batch_size, None]
        workers = self.slots_of(cell)[slot].workers
        # Several workers take as many steps as one, each of its share of the batch, which is what
        # was measured.
        speed = sum(count * _mean([
            1 / rate.seconds(train, math.ceil(validation / workers), batch_size) for rate in some])
            for count, some in rates)
        return sum(count for count, _ in rates) / speed

    def maps(self, cell: Cell, making: Making, shards: int | None = None) -> dict[str, float]:
        """Return maps a second by kind of slot, of all such slots together.

        Args:
            cell: Model and image size.
            making: By what, and of what.
            shards: Of the store; CPUs are left out if they do not shorten the end of what GPUs
                make of it. None: they are not.
        """
        slots = self.slots_of(cell)
        keys = {slot: (slot, likeness(cell), MAPS, 0, making) for slot in slots
                if slot.startswith(MAPS)}
        rates = {slot: sum(count * _mean(rates) for count, rates in self._maps[key])
                 for slot, key in keys.items() if key in self._maps}
        if shards is not None and len(rates) == 2:
            one = rates[ON_CPUS] / slots[ON_CPUS].count
            made = int(rates[ON_GPUS] / one)  # by the GPUs, while one actor on a CPU makes a shard
            if not joins(made, shards - made - 1):
                del rates[ON_CPUS]
        return rates

    def maps_of(self, slot: str, cell: Cell, subject: str, attribution: AttributionSettings
                ) -> float:
        """Return maps a second of one process, of A or of what a training makes them of."""
        rates = self._maps[slot, likeness(cell), subject, 0, Making(attribution)]
        return sum(count * _mean(some) for count, some in rates) / sum(count for count, _ in rates)

    def lines(self) -> list[str]:
        """Return what was measured, for people."""
        lines = []
        for (slot, (model, size), subject, batch, _), kinds in self._trainings.items():
            for count, rates in kinds:
                mean = TrainingRate(*(_mean([getattr(rate, name) for rate in rates])
                                      for name in ("step", "image", "epoch")))
                lines.append(f"{_where(slot, count, model, size)}, {subject}, batch {batch}: "
                             f"{1000 * mean.step:.3g} ms a step, {1000 * mean.image:.3g} ms a "
                             "validation image")
        for (slot, (model, size), subject, _, making), measured in self._maps.items():
            what = MAPS if subject in (MAPS, JUDGING) else f"{subject}'s own maps"
            lines += [f"{_where(slot, count, model, size)}, {what} by {making}: "
                      f"{_mean(speeds):.3g} maps/s each" for count, speeds in measured]
        return lines


def _key(slot: str, probe: Probe) -> Key:
    return slot, likeness(probe.cell), probe.subject, probe.batch_size, probe.making


def _where(slot: str, count: int, model: str, size: tuple[int, int]) -> str:
    return f"  {slot} ({count} processes at once): {model} on {size[0]}x{size[1]}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
