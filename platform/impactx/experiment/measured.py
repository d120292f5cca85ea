"""What was measured of a cluster: the rates of each kind of work in each kind of slot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from impactx.experiment.plan import Cell
from impactx.experiment.rates import TrainingRate
from impactx.experiment.units import Unit
from impactx.explain.attribution import Attribution

MAPS, JUDGING = "maps", "judging"


@dataclass(frozen=True)
class Slots:
    """How many pieces of work of a kind the cluster holds at once, and what each takes.

    workers: processes that share each batch of one piece of work; cpus, gpus: of all of them.
    """

    count: int
    cpus: float
    gpus: float
    workers: int = 1


@dataclass(frozen=True)
class Probe:
    """Something to measure: of a cell, "stage 1", an approach's name, "maps", or "judging" (maps where that is done).

    batch_size: of a training; made: of maps, by what and of what they are made (`made_of`). An approach's name with
    `made` stands for the maps that its trainings make themselves.
    """

    cell: Cell
    what: str
    batch_size: int = 0
    made: str = ""


def like(cell: Cell) -> tuple[Any, ...]:
    """Cells that are as fast as each other have the same."""
    return cell.model.name, cell.facts.image_size


def made_of(unit: Unit) -> str:
    """What the speed of making a store's maps depends on beside the model, as JSON: attribution and target."""
    return json.dumps([unit.inputs["attribution"], unit.inputs.get("target", "label")], sort_keys=True)


def made_by(attribution: Attribution) -> str:
    """The same of maps of one class."""
    return json.dumps([attribution.described(), "label"], sort_keys=True)


@dataclass
class Measured:
    """Rates by kind of slot ("trial", "model", "maps on CPUs", "maps on GPUs", "judging"), on so many CPUs, GPUs."""

    slots: dict[str, Slots]
    cpus: float
    gpus: float
    _rates: dict[tuple[Any, ...], list[tuple[int, list[Any]]]] = field(default_factory=dict)

    def add(self, slot: str, probe: Probe, count: int, rates: list[Any]) -> None:
        """Rates of processes on one kind of node, of which the cluster has room for `count`."""
        key = (slot, *like(probe.cell), probe.what, probe.batch_size, probe.made)
        self._rates.setdefault(key, []).append((count, rates))

    def epoch(self, slot: str, cell: Cell, what: str, batch_size: int, train: int, validation: int) -> float:
        """Seconds of an epoch in such a slot, over the kinds of nodes (each takes as many as it is fast)."""
        found, workers = self._rates[slot, *like(cell), what, batch_size, ""], self.slots[slot].workers
        # Several workers take as many steps as one: each of its share of the batch, which is what was measured.
        speed = sum(count * _mean([1 / rate.seconds(train, math.ceil(validation / workers), batch_size)
                                   for rate in rates]) for count, rates in found)
        return sum(count for count, _ in found) / speed

    def maps(self, cell: Cell, made: str) -> dict[str, float]:
        """Maps a second by kind of slot, of all such slots together."""
        keys = {slot: (slot, *like(cell), MAPS, 0, made) for slot in self.slots if slot.startswith(MAPS)}
        return {slot: sum(count * _mean(rates) for count, rates in self._rates[key])
                for slot, key in keys.items() if key in self._rates}

    def maps_of(self, slot: str, cell: Cell, what: str, attribution: Attribution) -> float:
        """Maps a second of one process: of A where models are judged, or of what a training makes them of itself."""
        found = self._rates[slot, *like(cell), what, 0, made_by(attribution)]
        return sum(count * _mean(rates) for count, rates in found) / sum(count for count, _ in found)

    def lines(self) -> list[str]:
        """What was measured, for people."""
        found = []
        for (slot, model, size, what, batch, made), kinds in self._rates.items():
            for count, rates in kinds:
                thing = what if not made else MAPS if what in (MAPS, JUDGING) else f"{what}'s own maps"
                where = f"  {slot} ({count} processes at once): {model} on {size[0]}x{size[1]}, {thing}"
                if made:
                    attribution, target = json.loads(made)
                    found.append(f"{where} by {attribution['method']} of {target}: {_mean(rates):.3g} maps/s each")
                else:
                    mean = TrainingRate(*(_mean([getattr(r, name) for r in rates])
                                          for name in ("step", "image", "epoch")))
                    found.append(f"{where}, batch {batch}: {1000 * mean.step:.3g} ms a step, "
                                 f"{1000 * mean.image:.3g} ms a validation image")
        return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
