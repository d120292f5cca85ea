"""The maps of a store by Ray Data: a dataset of its shards, mapped over a pool of actors.

A row is a shard. Actors write their shards themselves, under deterministic names, whole or not at
all, and what streams back says that they are there. Where a pool on CPUs joins the one on GPUs, the
latter has begun with the first shard and the former begins with the last; each leaves out the
shards that it finds, so that they meet wherever their speeds let them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from impactx.cluster.capacity import makers
from impactx.cluster.devices import device_here
from impactx.cluster.errors import portable
from impactx.costs.measured import joins
from impactx.experiment.steps.base import StepError
from impactx.experiment.steps.maps import Maps, ShardReport, ShardWorker
from impactx.experiment.workplace import Workplace
from impactx.run.executor import OnMaps
from impactx.settings import Device, ModelResources

POLL_SECONDS = 0.5  # between two looks whether the job goes on


@dataclass(frozen=True)
class Pool:
    """Actors of one kind.

    Attributes:
        actors: At most so many; Ray starts as many as it has room for.
        num_cpus, num_gpus: That each asks Ray for.
        backwards: Whether it begins with the last shard.
    """

    actors: int
    num_cpus: float
    num_gpus: float = 0.0
    backwards: bool = False


def pools_of(model: ModelResources, have: dict[str, float]) -> tuple[Pool, Pool | None]:
    """Return the pool that makes a model's maps, and the one on CPUs that may join it on GPUs.

    Args:
        model: What its processes ask for.
        have: CPUs and GPUs that there are, or that the cluster may come to: actors that it has no
            room for yet wait in Ray's queue, by which a cluster that grows knows that it should.
    """
    actors, joining = makers(model, have)
    return Pool(actors, model.maps.cpus, model.maps.gpus), Pool(
        joining, model.maps.cpus, backwards=True) if joining else None


class Explainer:
    """The actor of a pool: opens model and images once, then makes shards."""

    def __init__(self, step: Maps, place: Workplace, device: Device) -> None:
        # Opened at work: what an actor's constructor raises, Ray repeats for ever.
        self._step, self._place, self._device = step, place, device
        self._worker: ShardWorker | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Make the shards of a batch; return their reports, or an error in its place."""
        rows: dict[str, list[Any]] = {"shard": [], "maps": [], "seconds": [], "error": []}
        for shard in batch["shard"]:
            report, error = ShardReport(int(shard), 0, 0.0), b""
            try:
                if self._worker is None:
                    self._worker = ShardWorker(self._step, self._place, device_here(self._device))
                report = self._worker.make(int(shard))
            except Exception as failure:
                error = ray.cloudpickle.dumps(portable(failure))
            rows["shard"].append(report.shard)
            rows["maps"].append(report.maps)
            rows["seconds"].append(report.seconds)
            rows["error"].append(error)
        return rows


@dataclass(frozen=True)
class Made:
    """What streams back of a shard: a report, and a pickled error where it failed."""

    report: ShardReport
    error: bytes


def stream(step: Maps, place: Workplace, device: Device, pool: Pool, shards: Sequence[int]
           ) -> Iterator[Made]:
    """Make shards by one pool; yield what is made as it is made."""
    from ray.data import ActorPoolStrategy, DataContext, from_items

    DataContext.get_current().enable_progress_bars = False
    order = sorted(shards, reverse=pool.backwards)
    actors = min(pool.actors, len(order))
    rows = from_items([{"shard": shard} for shard in order], override_num_blocks=len(order))
    made = rows.map_batches(
        Explainer, fn_constructor_args=(step, place, device), batch_size=1,
        # Those that there is no room for yet wait in Ray's queue and hold up nobody.
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)
    for row in made.iter_rows():
        report = ShardReport(int(row["shard"]), int(row["maps"]), float(row["seconds"]))
        yield Made(report, bytes(row["error"]))


class _Pools:
    """The pools at work on one store, each in a process of its own that owns its actors.

    To end that process ends its actors, whatever they are at.
    """

    def __init__(self, step: Maps, place: Workplace, device: Device) -> None:
        # What must not be lost with a worker's machine lives on the driver's: without the driver
        # there is no job anyway.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # Ray's types do not know this way to call `remote`.
        remote: Any = ray.remote
        self._task = remote(num_cpus=0, max_retries=0, num_returns="streaming",
                            scheduling_strategy=here)(stream)
        self._arguments = step, place, device
        self.reports: dict[int, ShardReport] = {}
        self.error: BaseException | None = None
        self.news = threading.Condition()
        self._streams: list[Any] = []
        self._threads: list[threading.Thread] = []

    def start(self, pool: Pool, shards: Sequence[int]) -> list[int]:
        """Let a pool make shards; returns the list of those that it has reported, as it grows."""
        results, reported = self._task.remote(*self._arguments, pool, shards), list[int]()
        thread = threading.Thread(target=self._follow, args=(results, reported), daemon=True)
        self._streams.append(results)
        self._threads.append(thread)
        thread.start()
        return reported

    def _follow(self, results: Any, reported: list[int]) -> None:
        error: BaseException | None = None
        try:
            for reference in results:
                made: Made = ray.get(reference)
                if made.error:
                    error = ray.cloudpickle.loads(made.error)
                    break
                with self.news:
                    # A shard that the other pool made first costs its finder next to nothing.
                    self.reports.setdefault(made.report.shard, made.report)
                    reported.append(made.report.shard)
                    self.news.notify()
        # What went wrong in Ray itself; raised again by the thread that waits.
        except BaseException as failure:  # noqa: BLE001
            error = failure
        with self.news:
            self.error = self.error or error
            self.news.notify()

    @property
    def working(self) -> bool:
        """Whether any pool is at work."""
        return any(thread.is_alive() for thread in self._threads)

    @property
    def maps(self) -> int:
        """How many maps were made."""
        return sum(report.maps for report in list(self.reports.values()))

    def end(self) -> None:
        """End all of them."""
        for results in self._streams:
            # A stream that has ended, or a cluster that is gone, cannot be cancelled.
            with contextlib.suppress(Exception):
                ray.cancel(results, force=True)


def explain_on_pools(step: Maps, place: Workplace, device: Device, pool: Pool,
                     joining: Pool | None = None, *, on_maps: OnMaps, left: Callable[[], bool]
                     ) -> tuple[int, float]:
    """Make the missing shards of a store.

    Args:
        step: Of the store.
        place: Where it lies.
        device: cluster.device.
        pool: Who makes maps.
        joining: Actors on CPUs that join a pool on GPUs where that shortens the end. One of them
            makes the last shard but one, the last being smaller, which shows whether it does.
        on_maps: Told of progress.
        left: Whether the job has left its cluster.

    Returns:
        How many maps were made, and the seconds of the actors that made them, added up.

    Raises:
        StepError: The pools ended, and shards are missing.
        Exception: What an actor raised.
    """
    store = step.open_store(place)
    missing = store.missing()
    before = store.spec.images - sum(len(store.shard_indices(shard)) for shard in missing)
    work, seen = _Pools(step, place, device), 0
    try:
        by_pool, by_one = work.start(pool, missing), list[int]()
        if joining is not None and len(missing) > pool.actors:
            by_one = work.start(replace(joining, actors=1), missing[-2:-1])
        while len(work.reports) < len(missing) and work.working and not left():
            with work.news:
                work.news.wait(POLL_SECONDS)
            if work.error is not None:
                raise work.error
            if joining is not None and by_one:
                rest = [shard for shard in missing if shard not in work.reports]
                if rest and joins(len(by_pool), len(rest)):
                    work.start(joining, rest)
                joining = None
            if work.maps > seen:
                seen = work.maps
                on_maps(seen, before, store.spec.images)
    finally:
        work.end()
    if len(work.reports) < len(missing) and (lost := store.missing()):
        raise work.error or StepError(
            f"{step.name}: the pools ended, and {len(lost)} shards are missing")
    if work.maps > seen:
        on_maps(work.maps, before, store.spec.images)
    return work.maps, sum(report.seconds for report in work.reports.values())
