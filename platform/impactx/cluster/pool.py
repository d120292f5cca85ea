"""The Ray Data actor pools that make maps, on CPU and GPU workers at once.

A pool is a dataset of tickets, one for each actor, mapped over by that many actors; where several cells share the
cluster, it is cut into groups that come and go with the cell's share of it.  With its ticket an actor
takes shard after shard from a common queue, so fast and slow workers share the work by their own pace.  A ticket
that Ray hands to another process, because the first died, begins with the shard that was lost.  When no shard is
left that nobody works on, free actors take over shards whose worker is late: contents are the same and the last
writer wins; whoever is still at work on a shard that is there is stopped.  Actors write their shards themselves,
under deterministic names, whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from impactx.cluster.capacity import MAKER_ON_GPU, makers
from impactx.cluster.explainers import Pool, run_pool
from impactx.cluster.shard_queue import ShardQueue
from impactx.cluster.shares import Shares
from impactx.experiment.steps.base import StepError
from impactx.experiment.steps.maps import Maps
from impactx.experiment.workplace import Workplace
from impactx.run.executor import OnMaps
from impactx.settings import ClusterSettings

POLL_SECONDS = 0.5  # of the progress


def pools_of(settings: ClusterSettings, have: dict[str, float]) -> list[Pool]:
    """The pools that the settings ask for on a cluster that has these resources, or may come to them: actors that it
    has no room for yet wait in Ray's queue, by which a cluster that may grow knows that it should."""
    cpus, gpus = makers(settings, have)
    # Ray Data's own tasks need CPUs as well: actors ask for a little less than a CPU, or the pool starves.
    whole = min(have.get("CPU", 1) / max(cpus, 1), 1)
    pools = [Pool("cpu", "cpu", cpus, {"num_cpus": 0.75 * whole}, {"CPU": whole}),
             Pool("gpu", "cuda", gpus, dict(zip(("num_cpus", "num_gpus"), MAKER_ON_GPU, strict=True)), {"GPU": 1})]
    return [pool for pool in pools if pool.actors]


class Workforce:
    """The groups of actors of one kind that are at work: more where the cluster has room, fewer where others wait."""

    def __init__(self, pool: Pool, shares: Shares, owner: str, start: Callable[[Pool], Any]) -> None:
        """start: begins a group of so many actors; returns a reference that is ready when the group has ended."""
        self._pool, self._shares, self._owner, self._start = pool, shares, owner, start
        self._groups: dict[Any, Pool] = {}
        self._leaving: set[Any] = set()
        self._count = 0
        # Groups are what comes and goes: a few, for each is a process of its own beside its actors.
        self._size = -(-pool.actors // 4)

    def _amounts(self, actors: int) -> dict[str, float]:
        return {kind: amount * actors for kind, amount in self._pool.amounts.items()}

    def grow(self) -> None:
        """Begin groups while there is room and it is the owner's turn."""
        while (left := self._pool.actors - sum(group.actors for group in self._groups.values())) > 0:
            size = min(self._size, left) if self._shares.shared_by(self._owner) else left
            if not self._shares.take(self._owner, self._pool.name, self._amounts(size)):
                return
            self._count += 1
            group = replace(self._pool, name=f"{self._pool.name}{self._count}", actors=size)
            self._groups[self._start(group)] = group
        self._shares.forget(self._owner, self._pool.name)

    def shrink(self) -> str | None:
        """The name of a group that is to leave, where others wait who hold less. The last group stays."""
        staying = [ref for ref in self._groups if ref not in self._leaving]
        if len(staying) < 2 or self._leaving:
            return None
        group = self._groups[staying[-1]]
        if not self._shares.should_give(self._owner, self._amounts(group.actors)):
            return None
        self._leaving.add(staying[-1])
        return group.name

    @property
    def running(self) -> list[Any]:
        """The groups' references."""
        return list(self._groups)

    def ended(self, ref: Any) -> bool:
        """A group is over: what it held is free. Returns whether it was asked to leave."""
        self._shares.give(self._owner, self._amounts(self._groups.pop(ref).actors))
        asked = ref in self._leaving
        self._leaving.discard(ref)
        return asked

    def end(self) -> None:
        """All are over."""
        self._shares.forget(self._owner, self._pool.name)
        for ref in self.running:
            self.ended(ref)


def explain_on_pools(step: Maps, place: Workplace, pools: Sequence[Pool], max_failures: int, on_maps: OnMaps,
                     shares: Shares, owner: str) -> tuple[int, float]:
    """Make the missing shards of a store. Returns, when they are there, how many maps that were, and the seconds
    of the actors that made them, added up. Raises what an actor raised."""
    store = step.open_store(place)
    missing = store.missing()
    before = store.spec.images - sum(len(store.shard_indices(k)) for k in missing)
    # What must not be lost with a worker's machine lives on the driver's: without the driver there is no job anyway.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    queue = ray.remote(num_cpus=0, scheduling_strategy=here)(ShardQueue).remote(missing, max_failures)
    # Each group has a process of its own, which owns its actors: to end it ends them, whatever they are at.
    run = ray.remote(num_cpus=0, max_retries=max_failures, scheduling_strategy=here)(run_pool)
    forces = [Workforce(replace(pool, actors=min(pool.actors, len(missing))), shares, owner,
                        lambda group: run.remote(step, place, queue, group)) for pool in pools]
    shown = 0
    try:
        while True:
            shares.check()
            (made, complete, error), waiting = ray.get([queue.state.remote(), queue.waiting.remote()])
            if error is not None:
                raise error
            if made > shown:
                shown = made
                on_maps(made, before, store.spec.images)
            if complete:
                return ray.get(queue.worked.remote())
            for force in forces:
                if waiting:
                    force.grow()
                if name := force.shrink():
                    queue.leave.remote(name)
            running = {ref: force for force in forces for ref in force.running}
            if not running:
                time.sleep(POLL_SECONDS)
                continue
            for ref in ray.wait(list(running), timeout=POLL_SECONDS)[0]:
                ray.get(ref)  # raises what went wrong in Ray itself
                if not running[ref].ended(ref) and ray.get(queue.state.remote())[1:] == (False, None):
                    raise StepError(f"{step.name}: the pool ended, and {len(store.missing())} shards are missing")
    finally:
        for force in forces:
            for ref in force.running:
                ray.cancel(ref, force=True)
            force.end()
        ray.kill(queue)
