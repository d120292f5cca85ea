"""The maps of a store by Ray Data: a dataset of its shards, mapped over a pool of actors.

A row is a shard. Actors write their shards themselves, under deterministic names, whole or not at all,
and what streams back says that they are there. Where CPUs and GPUs make maps at once there are two
pools: the one on GPUs begins with the first shard and the one on CPUs with the last; each leaves out
the shards that it finds, so that they meet wherever their speeds let them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from impactx.cluster.capacity import MAKER_ON_GPU, makers
from impactx.cluster.devices import device_of
from impactx.cluster.errors import portable
from impactx.experiment.steps.base import StepError
from impactx.experiment.steps.maps import Maps, ShardReport, ShardWorker
from impactx.experiment.workplace import Workplace
from impactx.run.executor import OnMaps
from impactx.settings import ClusterSettings


@dataclass(frozen=True)
class Pool:
    """Actors of one kind.

    Attributes:
        device: Of each actor.
        actors: At most so many; Ray starts as many as it has room for.
        num_cpus, num_gpus: That each asks Ray for.
        backwards: Whether it begins with the last shard.
    """

    device: str
    actors: int
    num_cpus: float
    num_gpus: float
    backwards: bool


def pools_of(settings: ClusterSettings, have: dict[str, float]) -> list[Pool]:
    """Return the pools that the settings ask for.

    Args:
        settings: Of the cluster.
        have: CPUs and GPUs that there are, or that the cluster may come to: actors that it has no room
            for yet wait in Ray's queue, by which a cluster that grows knows that it should.
    """
    cpus, gpus = makers(settings, have)
    pools = [
        Pool("cuda", gpus, *MAKER_ON_GPU, backwards=False),
        Pool("cpu", cpus, min(have.get("CPU", 1) / max(cpus, 1), 1), 0.0, backwards=gpus > 0)]
    return [pool for pool in pools if pool.actors]


class Explainer:
    """The actor of a pool: opens model and images once, then makes shards."""

    def __init__(self, step: Maps, place: Workplace, device: str) -> None:
        # Opened at work: what an actor's constructor raises, Ray repeats for ever.
        self._arguments, self._gpus = (step, place, device), float(device == "cuda")
        self._worker: ShardWorker | None = None

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Make the shards of a batch; return their reports, or the error of the first that failed."""
        rows: dict[str, list[Any]] = {"shard": [], "maps": [], "seconds": [], "error": []}
        for shard in batch["shard"]:
            report, error = ShardReport(int(shard), 0, 0.0), b""
            try:
                if self._worker is None:
                    device_of(self._gpus)
                    self._worker = ShardWorker(*self._arguments)
                report = self._worker.make(int(shard))
            except Exception as failure:
                error = ray.cloudpickle.dumps(portable(failure))
            rows["shard"].append(report.shard)
            rows["maps"].append(report.maps)
            rows["seconds"].append(report.seconds)
            rows["error"].append(error)
        return rows


def stream(step: Maps, place: Workplace, pool: Pool, shards: Sequence[int]) -> Iterator[ShardReport]:
    """Make shards by one pool; yield what is made as it is made.

    Raises:
        Exception: What an actor raised, as it was there.
    """
    from ray.data import ActorPoolStrategy, DataContext, from_items

    DataContext.get_current().enable_progress_bars = False
    order = sorted(shards, reverse=pool.backwards)
    actors = min(pool.actors, len(order))
    rows = from_items([{"shard": shard} for shard in order], override_num_blocks=len(order))
    made = rows.map_batches(
        Explainer, fn_constructor_args=(step, place, pool.device), batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=actors, max_tasks_in_flight_per_actor=1),
        num_cpus=pool.num_cpus, num_gpus=pool.num_gpus)
    for row in made.iter_rows():
        if row["error"]:
            raise ray.cloudpickle.loads(row["error"])
        yield ShardReport(int(row["shard"]), int(row["maps"]), float(row["seconds"]))


def explain_on_pools(step: Maps, place: Workplace, pools: Sequence[Pool], on_maps: OnMaps,
                     left: Callable[[], bool]) -> tuple[int, float]:
    """Make the missing shards of a store.

    Args:
        step: Of the store.
        place: Where it lies.
        pools: Who makes maps.
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
    reports: dict[int, ShardReport] = {}
    errors: list[BaseException] = []
    news, over = threading.Condition(), threading.Event()

    def run(pool: Pool) -> None:
        try:
            for report in stream(step, place, pool, missing):
                if over.is_set():
                    return  # which ends the stream, and its actors with it
                with news:
                    # A shard that the other pool made first costs its finder next to nothing.
                    reports.setdefault(report.shard, report)
                    news.notify()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            with news:
                errors.append(error)
                news.notify()

    threads = [threading.Thread(target=run, args=(pool,), daemon=True) for pool in pools]
    for thread in threads:
        thread.start()
    seen = 0
    while len(reports) < len(missing) and any(thread.is_alive() for thread in threads):
        with news:
            news.wait(0.5)
            made = sum(report.maps for report in reports.values())
        if errors or left():
            break
        if made > seen:
            seen = made
            on_maps(made, before, store.spec.images)
    over.set()
    if errors:
        raise errors[0]
    if len(reports) < len(missing) and (lost := store.missing()):
        raise StepError(f"{step.name}: the pools ended, and {len(lost)} shards are missing")
    made = sum(report.maps for report in reports.values())
    if made > seen:
        on_maps(made, before, store.spec.images)
    return made, sum(report.seconds for report in reports.values())
