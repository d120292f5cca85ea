"""The Ray Data actor pool that makes maps, on CPU and GPU workers at once.

Each pool maps over tickets, not over shards: with a ticket an actor takes the next shard of a common queue,
so fast and slow workers share the work by their own pace.  A ticket that Ray hands to another actor, because
the first died, gets the same shard again.  When no shard is left that nobody works on, free actors take over
shards whose worker is late: contents are the same and the last writer wins.  Actors write their shards
themselves, under deterministic names, whole or not at all.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import ray

from impactx.experiment.executor import OnShards
from impactx.experiment.units import Unit
from impactx.experiment.work import ShardWorker, Workplace, open_store
from impactx.settings import ClusterSettings

log = logging.getLogger("impactx")


@ray.remote(num_cpus=0)
class ShardQueue:
    """Which shard is whose. Lives in the cluster as long as the pool does."""

    def __init__(self, shards: list[int], max_failures: int) -> None:
        self._waiting = list(reversed(shards))
        self._max_failures = max_failures
        self._of_ticket: dict[str, int] = {}
        self._tries: dict[str, int] = {}
        self._taken: dict[int, tuple[float, int]] = {}  # shard -> (when it was last taken, how often)
        self._seconds: list[float] = []
        self.maps = 0

    def take(self, ticket: str) -> int | None:
        """The shard of this ticket; None where nothing is left to do for it.

        Ray restarts dead actors without end: a shard that kills its worker each time is given up here, by name.
        """
        if ticket in self._of_ticket and self._of_ticket[ticket] in self._taken:
            self._tries[ticket] = self._tries.get(ticket, 0) + 1
            if self._tries[ticket] > self._max_failures:
                raise RuntimeError(f"shard {self._of_ticket[ticket]}: its worker died {self._tries[ticket]} times "
                                   "(out of memory? cluster.explain_memory_mb bounds an actor's batches)")
            return self._of_ticket[ticket]
        shard = self._waiting.pop() if self._waiting else self._late()
        if shard is not None:
            self._of_ticket[ticket] = shard
            self._taken[shard] = (time.monotonic(), self._taken.get(shard, (0, 0))[1] + 1)
        return shard

    def _late(self) -> int | None:
        """The shard that has been out longest, where it has been out longer than a quick worker needs for it."""
        if not self._seconds:
            return None
        usual = sorted(self._seconds)[len(self._seconds) // 4]
        now = time.monotonic()
        late = [(when, shard) for shard, (when, tries) in self._taken.items()
                if tries < 3 and now - when > 1.5 * usual]
        return min(late)[1] if late else None

    def done(self, shard: int, maps: int, seconds: float) -> None:
        """A shard was written."""
        if self._taken.pop(shard, None) is not None:
            self.maps += maps
            self._seconds.append(seconds)

    def finished(self) -> int:
        """How many maps were made."""
        return self.maps


class Explainer:
    """The actor of the pool: opens model and images once, then makes one shard a ticket."""

    def __init__(self, unit: Unit, place: Workplace, queue: Any, device: str) -> None:
        self.queue = queue
        self.worker = ShardWorker(unit, place, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: one ticket. Returns the shard that was made, -1 for none."""
        shard = ray.get(self.queue.take.remote(str(batch["ticket"][0])))
        if shard is None:
            return {"shard": [-1]}
        made = self.worker.make(shard)
        ray.get(self.queue.done.remote(shard, int(made["maps"]), made["seconds"]))
        return {"shard": [shard]}


def explain_on_pool(unit: Unit, place: Workplace, settings: ClusterSettings, on_shards: OnShards) -> None:
    """Make the missing shards of a maps unit. Raises what an actor raised, once retries are used up."""
    store = open_store(unit, place)
    missing = store.missing()
    before = store.spec.images - sum(len(store.shard_indices(k)) for k in missing)
    resources = ray.cluster_resources()
    cpus = settings.explain_cpu_actors if settings.explain_cpu_actors is not None else int(resources.get("CPU", 1))
    gpus = settings.explain_gpu_actors if settings.explain_gpu_actors is not None else int(resources.get("GPU", 0))
    if cpus + gpus == 0:
        raise ValueError("cluster.explain_cpu_actors and explain_gpu_actors are both 0: nobody would make maps")
    queue = ShardQueue.remote(missing, settings.max_failures)  # type: ignore[attr-defined]
    errors: list[BaseException] = []

    def pool(kind: str, actors: int, resource: dict[str, float]) -> None:
        try:
            _pool(unit, place, queue, kind, min(actors, len(missing)), len(missing), resource)
        except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
            errors.append(error)

    # Ray Data's own tasks need CPUs as well: actors ask for a little less than a CPU, or the pool starves.
    share = resources.get("CPU", 1) / max(cpus, 1)
    threads = [threading.Thread(target=pool, args=args, daemon=True) for args in (
        ("cpu", cpus, {"num_cpus": min(0.75 * share, 0.75)}), ("cuda", gpus, {"num_cpus": 0.1, "num_gpus": 1}))
        if args[1]]
    for thread in threads:
        thread.start()
    shown = 0
    while any(t.is_alive() for t in threads) and not errors:
        for thread in threads:
            thread.join(timeout=0.5)
        done = ray.get(queue.finished.remote())
        if done > shown:
            shown = done
            on_shards(done, before, store.spec.images)
    if errors:
        raise errors[0]


def _pool(unit: Unit, place: Workplace, queue: Any, device: str, actors: int, tickets: int,
          resource: dict[str, float]) -> None:
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data import from_items as dataset_from_items

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Two rounds of tickets: the second is for shards that late workers hold.
    rows = [{"ticket": f"{device}-{k}"} for k in range(tickets + actors)]
    dataset_from_items(rows, override_num_blocks=len(rows)).map_batches(
        Explainer, fn_constructor_args=(unit, place, queue, device), batch_size=1,
        compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1), **resource).materialize()
