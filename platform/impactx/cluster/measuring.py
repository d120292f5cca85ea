"""Measuring rates on each kind of node of a cluster, under the load that a job brings: every slot of it at once."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from impactx.cluster.errors import portable
from impactx.experiment.plan import Cell
from impactx.experiment.price_list import price_list
from impactx.experiment.pricing import MAPS, Measured, Probe, Slots, price_cell, probes_of
from impactx.experiment.rates import measure_maps, measure_training
from impactx.experiment.workplace import Workplace
from impactx.settings import ClusterSettings

log = logging.getLogger("impactx")


@dataclass(frozen=True)
class Place:
    """A kind of slot on a kind of node: one of its nodes, and how many such slots that node and the cluster have."""

    node: str
    device: str
    cpus: float
    gpus: float
    on_node: int
    in_all: int


class Prober:
    """Measures in one slot."""

    def run(self, probe: Probe, place: Workplace, device: str) -> Any:
        """A rate, or the error that there is none."""
        try:
            if probe.what == MAPS:
                return measure_maps(probe.cell, place, *json.loads(probe.made), device)
            return measure_training(probe.cell, place, probe.what, probe.batch_size, device)
        except Exception as error:
            return portable(error)


def places(nodes: Sequence[dict[str, Any]], cpus: float, gpus: float, limit: int | None = None) -> list[Place]:
    """The slots that need so much, by kind of node. nodes: as ray.nodes(); limit: of slots in all."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for node in nodes:
        if node["Alive"]:
            have = node["Resources"]
            kind = have.get("CPU", 0), have.get("GPU", 0), tuple(k for k in have if k.startswith("accelerator_type:"))
            kinds.setdefault(kind, []).append(node)
    found = []
    for (have_cpus, have_gpus, _), same in kinds.items():
        fits = int((have_cpus + 1e-9) // cpus) if not gpus else min(
            int((have_cpus + 1e-9) // cpus), int((have_gpus + 1e-9) // gpus))
        if fits:
            found.append(Place(same[0]["NodeID"], "cuda" if gpus else "cpu", cpus, gpus, fits, fits * len(same)))
    total = sum(p.in_all for p in found)
    if limit is not None and total > limit:
        found = [Place(p.node, p.device, p.cpus, p.gpus, max(1, p.on_node * limit // total),
                       max(1, p.in_all * limit // total)) for p in found]
    return found


def slots_of(settings: ClusterSettings) -> dict[str, list[Place]]:
    """Where trials, final trainings and maps (on CPUs, on GPUs) are done on the connected cluster."""
    s, nodes = settings, ray.nodes()
    cpus = s.explain_cpu_actors, s.explain_gpu_actors
    found = {"trial": places(nodes, s.trial_cpus, s.trial_gpus, s.max_concurrent_trials),
             "model": places(nodes, s.train_cpus, float(s.use_gpu)),
             "maps on CPUs": places(nodes, 1, 0, cpus[0]) if cpus[0] != 0 else [],
             "maps on GPUs": places(nodes, 0.1, 1, cpus[1]) if cpus[1] != 0 else []}
    return {name: where for name, where in found.items() if where}


def measure(probes: Sequence[Probe], settings: ClusterSettings, place: Workplace,
            say: Callable[[str], None] = log.info) -> Measured:
    """The rate of every probe in every kind of slot in which its work may be done. Raises what a probe raised."""
    have = ray.cluster_resources()
    measured = Measured({name: Slots(sum(p.in_all for p in where), where[0].cpus, where[0].gpus)
                         for name, where in slots_of(settings).items()}, have.get("CPU", 1), have.get("GPU", 0))
    known: dict[tuple[Place, Probe], list[Any]] = {}
    for name, where in slots_of(settings).items():
        wanted = [probe for probe in probes if (probe.what == MAPS) == name.startswith("maps")]
        for one in where:
            missing = [probe for probe in wanted if (one, probe) not in known]
            if missing:
                say(f"measuring {len(missing)} rates for {name}: {one.on_node} slots of {one.cpus:g} CPU, "
                    f"{one.gpus:g} GPU at once")
                known |= {(one, probe): found for probe, found in _gang(one, missing, place)}
            for probe in wanted:
                measured.add(name, probe, one.in_all, known[one, probe])
    return measured


def plan(cells: Sequence[Cell], settings: ClusterSettings, place: Workplace) -> str:
    """The price of what is left of these cells on the connected cluster, as text."""
    measured = measure(probes_of(cells), settings, place)
    return price_list([price_cell(cell, measured, place.artifacts) for cell in cells], measured)


def _gang(where: Place, probes: Sequence[Probe], place: Workplace) -> list[tuple[Probe, list[Any]]]:
    """Each probe in all slots of a node at once: alone on a node, everything is faster than it will be."""
    actor = ray.remote(num_cpus=where.cpus, num_gpus=where.gpus)(Prober)
    pinned = NodeAffinitySchedulingStrategy(where.node, soft=False)
    gang = [actor.options(scheduling_strategy=pinned).remote() for _ in range(where.on_node)]
    try:
        found = []
        for probe in probes:
            rates = ray.get([one.run.remote(probe, place, where.device) for one in gang])
            for error in rates:
                if isinstance(error, Exception):
                    raise error
            found.append((probe, rates))
        return found
    finally:
        for one in gang:
            ray.kill(one)
