"""Measuring rates on each kind of node of a cluster, under the load that a job brings: every slot
of it at once.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from impactx.cluster.capacity import (
    ClusterError,
    cells_at_once,
    grown,
    makers,
    processes,
    uses_gpus,
)
from impactx.cluster.devices import device_here
from impactx.cluster.errors import portable
from impactx.costs.measured import JUDGING, MAPS, ON_CPUS, ON_GPUS, Measured, Probe, Slots
from impactx.costs.price_list import price_list
from impactx.costs.pricing import price_cell, probes_of
from impactx.costs.rates import measure_maps, measure_training
from impactx.experiment.cell import Cell
from impactx.experiment.workplace import Workplace
from impactx.settings import ClusterSettings, Device, ModelResources, TrainingResources

log = logging.getLogger("impactx")


@dataclass(frozen=True)
class Place:
    """A kind of process on a kind of node: one of its nodes, and how many of them that node and the
    cluster hold.

    workers: of them share one piece of work.
    """

    node: str
    cpus: float
    gpus: float
    on_node: int
    in_all: int
    workers: int = 1


class Prober:
    """Measures in one process."""

    def run(self, probe: Probe, place: Workplace, where: Place, setting: Device) -> Any:
        """A rate, or the error that there is none."""
        try:
            device = device_here(setting)
            if probe.making is not None:
                subject = None if probe.subject == MAPS else probe.subject
                return measure_maps(probe.cell, place, probe.making.attribution,
                                    probe.making.target, device, subject)
            # A worker's share of a batch, two images at least (datasets.batches).
            share = min(probe.batch_size, max(2, math.ceil(probe.batch_size / where.workers)))
            return measure_training(probe.cell, place, probe.subject, share, device)
        except Exception as error:
            return portable(error)


def places(nodes: Sequence[dict[str, Any]], cpus: float, gpus: float, limit: int | None = None,
           workers: int = 1) -> list[Place]:
    """The processes that need so much, by kind of node. nodes: as ray.nodes(); limit: of pieces of
    work in all.
    """
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for node in nodes:
        if node["Alive"]:
            have = node["Resources"]
            kind = have.get("CPU", 0), have.get("GPU", 0), tuple(k for k in have if k.startswith("accelerator_type:"))
            kinds.setdefault(kind, []).append(node)
    found = []
    for (have_cpus, have_gpus, _), same in kinds.items():
        if fits := processes(cpus, gpus, {"CPU": have_cpus, "GPU": have_gpus}):
            found.append(Place(same[0]["NodeID"], cpus, gpus, fits, fits * len(same), workers))
    total, most = sum(p.in_all for p in found), None if limit is None else limit * workers
    if most is None or total <= most:
        return found
    # Each kind its part, by rounding what it has come to so far: the parts sum up to the limit.
    ends = [end * most // total for end in itertools.accumulate(p.in_all for p in found)]
    return [replace(p, on_node=max(1, p.on_node * most // total), in_all=end - start)
            for p, start, end in zip(found, [0, *ends], ends, strict=False) if end > start]


def slots_of(settings: ClusterSettings, model: ModelResources) -> dict[str, list[Place]]:
    """Where trials, final trainings, maps (on CPUs, on GPUs) and judgements of a model are done on
    the connected cluster.

    Raises ClusterError where nothing can be measured as a node that would hold it is not there yet.
    """
    s, nodes, maps = settings, ray.nodes(), model.maps
    actors, joining = makers(model, grown(s, ray.cluster_resources()))

    def of(one: TrainingResources, limit: int | None = None) -> list[Place]:
        return places(nodes, one.cpus, one.gpus, limit, one.workers)

    found = {"trial": of(model.trial, s.max_concurrent_trials), "model": of(model.training),
             ON_GPUS if maps.gpus else ON_CPUS: places(nodes, maps.cpus, maps.gpus, actors),
             JUDGING: places(nodes, model.trial.cpus, model.trial.gpus)}
    if nowhere := [MAPS if name.startswith(MAPS) else name for name, where in found.items() if not where]:
        raise ClusterError(f"--plan measures on the nodes that are there, and none of them has room for "
                           f"{', '.join(nowhere)}: start one of those that cluster.grows_to_cpus = {s.grows_to_cpus} "
                           f"and grows_to_gpus = {s.grows_to_gpus} count on")
    if joining:
        found[ON_CPUS] = places(nodes, maps.cpus, 0, joining)
    return found


def _slots(where: Sequence[Place]) -> Slots:
    """Pieces of work: their workers may be on several nodes."""
    one, processes = where[0], sum(p.in_all for p in where)
    return Slots(max(1, processes // one.workers), one.cpus * one.workers, one.gpus * one.workers, one.workers)


def measure(probes: Sequence[Probe], settings: ClusterSettings, place: Workplace,
            models: Mapping[str, ModelResources], say: Callable[[str], None] = log.info) -> Measured:
    """The rate of every probe in every kind of slot in which its work may be done. Raises what a
    probe raised.

    models: what each asks for on this cluster, by name.
    """
    have = ray.cluster_resources()
    found = {name: slots_of(settings, model) for name, model in models.items()}
    measured = Measured({name: {slot: _slots(where) for slot, where in slots.items()} for name, slots in found.items()},
                        have.get("CPU", 1), have.get("GPU", 0))
    known: dict[tuple[Place, Probe], list[Any]] = {}
    for (model, name), where in {(model, name): where for model, slots in found.items()
                                 for name, where in slots.items()}.items():
        # What is measured by what it stands for: to judge a model, maps are made as they are for a
        # store.
        wanted = {probe: replace(probe, subject=MAPS) if probe.subject == JUDGING else probe
                  for probe in probes if probe.cell.model.name == model and _done_in(name, probe)}
        for one in where:
            missing = list(dict.fromkeys(run for run in wanted.values() if (one, run) not in known))
            if missing:
                say(f"measuring {len(missing)} rates of {model} for {name}: {one.on_node} processes of {one.cpus:g} "
                    f"CPU, {one.gpus:g} GPU at once")
                known |= {(one, run): rates for run, rates in _gang(one, missing, place, settings.device)}
            for probe, run in wanted.items():
                rates = known[one, run]
                if probe.making is None:
                    measured.add_training(name, probe, one.in_all, rates)
                else:
                    measured.add_maps(name, probe, one.in_all, rates)
    return measured


def _done_in(slot: str, probe: Probe) -> bool:
    """Whether what a probe measures is done in such slots."""
    if probe.subject in (MAPS, JUDGING):
        return slot.startswith(probe.subject)
    return slot in ("trial", "model")


def plan(cells: Sequence[Cell], settings: ClusterSettings, place: Workplace) -> str:
    """The price of what is left of these cells on the connected cluster, as text."""
    have = ray.cluster_resources()
    models = {cell.model.name: cell.model.resources if uses_gpus(settings, have) else cell.model.resources.on_cpus()
              for cell in cells}
    measured = measure(probes_of(cells), settings, place, models)
    return price_list([price_cell(cell, measured, place.artifacts) for cell in cells], measured,
                      cells_at_once(settings, models.values(), grown(settings, have)))


def _gang(where: Place, probes: Sequence[Probe], place: Workplace, setting: Device) -> list[tuple[Probe, list[Any]]]:
    """Each probe in all processes of a node at once: alone on a node, everything is faster than it
    will be.
    """
    # Ray's types do not know the methods of an actor.
    actor: Any = ray.remote(num_cpus=where.cpus, num_gpus=where.gpus)(Prober)
    pinned = NodeAffinitySchedulingStrategy(where.node, soft=False)
    gang: list[Any] = [actor.options(scheduling_strategy=pinned).remote() for _ in range(where.on_node)]
    try:
        found = []
        for probe in probes:
            rates = ray.get([one.run.remote(probe, place, where, setting) for one in gang])
            for error in rates:
                if isinstance(error, Exception):
                    raise error
            found.append((probe, rates))
        return found
    finally:
        for one in gang:
            ray.kill(one)
