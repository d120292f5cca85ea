"""The actors that make maps, and the Ray Data job of one group of them.

The processes that only hold a group together import this too: what is heavy is imported where maps are made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from impactx.cluster.devices import device_of
from impactx.cluster.errors import portable
from impactx.cluster.shard_queue import WAIT
from impactx.experiment.steps.maps import Maps
from impactx.experiment.workplace import Workplace

if TYPE_CHECKING:
    from impactx.experiment.steps.maps import ShardWorker

POLL_SECONDS = 0.5  # of free actors that wait for others to be late


@dataclass(frozen=True)
class Pool:
    """Actors of one kind: how many, on which device, what each asks Ray for (num_cpus, num_gpus), and what each
    counts for in the shares of the cluster."""

    name: str
    device: str
    actors: int
    resources: dict[str, float]
    amounts: dict[str, float]


class Explainer:
    """The actor of a pool: opens model and images once, then makes shards until none is left."""

    def __init__(self, step: Maps, place: Workplace, queue: Any, device: str) -> None:
        self._what, self._queue, self._gpus = (step, place, device), queue, float(device == "cuda")
        self._worker: ShardWorker | None = None  # opened at work: what an actor's constructor raises, Ray repeats

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: one ticket. Returns how many shards were made with it."""
        ticket, made = str(batch["ticket"][0]), 0
        try:
            while (shard := ray.get(self._queue.take.remote(ticket))) is not None:
                if shard == WAIT:
                    time.sleep(POLL_SECONDS)
                    continue
                if self._worker is None:
                    from impactx.experiment.steps.maps import ShardWorker

                    device_of(self._gpus)
                    self._worker = ShardWorker(*self._what)
                report = self._worker.make(shard)
                ray.get(self._queue.done.remote(ticket, shard, report.maps, report.seconds))
                made += 1
        except ray.exceptions.RayError:
            raise  # the queue is gone, and with it the job
        except Exception as error:
            ray.get(self._queue.fail.remote(portable(error)))
        return {"made": [made]}


def run_pool(step: Maps, place: Workplace, queue: Any, pool: Pool) -> None:
    """Let a group of actors work until their tickets are spent. queue: the ShardQueue, an actor."""
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data import from_items as dataset_from_items

    DataContext.get_current().enable_progress_bars = False
    rows = [{"ticket": f"{pool.name}-{k}"} for k in range(pool.actors)]
    dataset_from_items(rows, override_num_blocks=len(rows)).map_batches(
        Explainer, fn_constructor_args=(step, place, queue, pool.device), batch_size=1,
        compute=ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=1), **pool.resources).materialize()
