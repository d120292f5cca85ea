"""The executor that spreads the plan over a Ray cluster: Tune for searches, Train for models, Data for maps."""

from __future__ import annotations

import atexit
import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from impactx.cluster.devices import device_of
from impactx.cluster.errors import is_final, portable
from impactx.cluster.pool import explain_on_pools, pools_of
from impactx.cluster.search import tune_search
from impactx.cluster.shares import Amounts, Shares
from impactx.cluster.trial import Report
from impactx.experiment.executor import (
    UNLIMITED,
    Limits,
    OnEpoch,
    OnResult,
    OnShards,
    Task,
    log_maps,
    tracked_evaluation,
    tracked_judgement,
    tracked_training,
)
from impactx.experiment.tracker import Tracker
from impactx.experiment.units import WorkError
from impactx.experiment.work import Workplace, finish_maps, open_store
from impactx.settings import ClusterSettings


def _train_worker(config: dict[str, Any]) -> None:
    """What each worker of a TorchTrainer runs: the one training loop, on its share of every batch."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    rank, world = context.get_world_rank(), context.get_world_size()
    monitor = config["monitor"]
    if ray.get(monitor.since.remote(0))[1] is not None:
        return  # started again after an error that stays

    def report(row: dict[str, float]) -> None:
        monitor.epoch.remote(row)

    try:
        tracked_training(config["task"], config["place"], config["tracker"], device=device, rank=rank,
                         world_size=world, report=report)
    except Exception as error:
        if is_final(error):
            ray.get(monitor.fail.remote(portable(error)))
            if world == 1:
                return
        raise  # Ray Train ends the others, who wait for this one, and starts all again


@ray.remote(num_cpus=0)
class Monitor:
    """Collects what a training's workers report: their epochs, and an error that ends it."""

    def __init__(self) -> None:
        self._rows: list[dict[str, float]] = []
        self._error: Exception | None = None

    def epoch(self, row: dict[str, float]) -> None:
        """A training's epoch is done."""
        self._rows.append(row)

    def fail(self, error: Exception) -> None:
        """A worker gave up. The first error counts."""
        self._error = self._error or error

    def since(self, count: int) -> tuple[list[dict[str, float]], Exception | None]:
        """The epochs after the first `count`, and the error."""
        return self._rows[count:], self._error


@dataclass(frozen=True)
class Workers:
    """The data-parallel workers of one training: how many, and what each holds."""

    count: int
    cpus: float
    gpus: float
    max_failures: int
    scratch: str  # Tune and Train keep their own bookkeeping here; nothing of ours is in it

    @property
    def amounts(self) -> dict[str, float]:
        """What all of them hold together."""
        return {"CPU": self.count * self.cpus, "GPU": self.count * self.gpus}


def _train_on_workers(task: Task, place: Workplace, tracker: Tracker, workers: Workers,
                      on_row: Callable[[dict[str, float]], object]) -> dict[str, Any]:
    """One training by Ray Train's TorchTrainer; its artifacts lie in the output when it returns."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resources = {"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {})
    # Not on the machine of a worker, with which it would be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"task": task, "place": place, "tracker": tracker, "monitor": monitor},
        scaling_config=ScalingConfig(num_workers=workers.count, use_gpu=bool(workers.gpus),
                                     resources_per_worker=resources),
        run_config=RunConfig(name=f"train-{task.unit.key}-{time.time_ns()}", storage_path=workers.scratch,
                             failure_config=FailureConfig(max_failures=workers.max_failures)))
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            errors.append(error)

    # In the main thread, Ray Train would take Ctrl-C for itself, for ever, and end the job as if all were well.
    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    seen, over = 0, False
    while not over:
        thread.join(timeout=1)
        over = not thread.is_alive()
        rows, failure = ray.get(monitor.since.remote(seen))
        seen += len(rows)
        for row in rows:
            on_row(row)
    if failure or errors:
        raise failure or errors[0]
    result = place.artifacts.result(task.unit)
    if result is None:
        raise WorkError(f"{task.unit.name}: the training ended without a result")
    return result


def _room(workers: Workers) -> int:
    """How many trainings with such workers the cluster can hold at once, at least 1."""
    have = ray.cluster_resources()
    fits = int(have.get("CPU", 0) // (workers.count * workers.cpus))
    if workers.gpus:
        fits = min(fits, int(have.get("GPU", 0) // (workers.count * workers.gpus)))
    return max(1, fits)


class RayExecutor:
    """See experiment.executor.Executor. Connect to a cluster first (`connection.connected`)."""

    def __init__(self, settings: ClusterSettings, place: Workplace, tracker: Tracker) -> None:
        self.settings, self.place, self.tracker = settings, place, tracker
        self._scratch = tempfile.mkdtemp(prefix="impactx-ray-")
        atexit.register(shutil.rmtree, self._scratch, ignore_errors=True)
        self.shares = Shares(self._capacity)
        self._stopped = False
        self._asked, self._have = float("-inf"), dict[str, float]()

    def _capacity(self) -> dict[str, float]:
        """What there is to share now, or what the cluster may grow to; asked of Ray once a second."""
        now, s = time.monotonic(), self.settings
        if now - self._asked >= 1:
            have = ray.cluster_resources()
            self._asked, self._have = now, {
                "CPU": max(have.get("CPU", 0.0), s.grows_to_cpus or 0),
                "GPU": max(have.get("GPU", 0.0), s.grows_to_gpus or 0)}
        return self._have | ({"trials": s.max_concurrent_trials} if s.max_concurrent_trials else {})

    def _workers(self, count: int, cpus: float, gpus: float) -> Workers:
        return Workers(count, cpus, gpus, self.settings.max_failures, self._scratch)

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch,
               limits: Limits = UNLIMITED) -> None:
        """Trials by Ray Tune: each in a process that is kept for the next, or over several by Ray Train."""
        s, place, tracker = self.settings, self.place, self.tracker
        workers = self._workers(s.trial_workers, s.trial_cpus, s.trial_gpus)

        def train(task: Task, report: Report) -> None:
            if workers.count > 1:
                _train_on_workers(task, place, tracker, workers, report)
            else:
                tracked_training(task, place, tracker, device=device_of(s.trial_gpus), report=report)

        # A trial over several workers only waits for them: its own process needs next to nothing.
        held = {"CPU": s.trial_cpus, "GPU": s.trial_gpus} if workers.count == 1 else {"CPU": 0.01}
        with self._unless_stopped():
            tune_search(tasks, place, train, shares=self.shares, need=workers.amounts | {"trials": 1}, held=held,
                        max_failures=s.max_failures, scratch=self._scratch, on_result=on_result, on_epoch=on_epoch,
                        limits=limits)

    def cells_at_once(self) -> int:
        """A setting."""
        return self.settings.cells_at_once

    def trainings_at_once(self) -> int:
        """As many as the cluster has room for."""
        s = self.settings
        return _room(self._workers(s.train_workers, s.train_cpus, float(s.use_gpu)))

    def train(self, task: Task, on_epoch: OnEpoch) -> dict[str, Any]:
        """A model by Ray Train on train_workers workers."""
        s = self.settings
        workers = self._workers(s.train_workers, s.train_cpus, float(s.use_gpu))
        with self._held(task, workers.amounts):
            return _train_on_workers(task, self.place, self.tracker, workers, lambda row: on_epoch(task.unit, row))

    def explain(self, task: Task, on_shards: OnShards) -> dict[str, Any]:
        """Maps by Ray Data actor pools."""
        with task.open_run(self.tracker) as run, self._unless_stopped():
            started = time.perf_counter()
            store = open_store(task.unit, self.place)
            if store.missing():
                explain_on_pools(task.unit, self.place, pools_of(self.settings, ray.cluster_resources()),
                                 self.settings.max_failures, on_shards, self.shares, task.parent_key)
            result = finish_maps(task.unit, self.place, time.perf_counter() - started)
            log_maps(run, task.unit, result)
            return result

    def evaluate(self, task: Task) -> dict[str, Any]:
        """The test set in one Ray task."""
        return self._in_one_task(task, tracked_evaluation)

    def judge(self, task: Task) -> dict[str, Any]:
        """The maps of a model in one Ray task."""
        return self._in_one_task(task, tracked_judgement)

    def _in_one_task(self, task: Task, how: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        gpus = min(self.settings.trial_gpus or float(self.settings.use_gpu), 1)
        place, tracker = self.place, self.tracker

        @ray.remote(num_cpus=self.settings.trial_cpus, num_gpus=gpus, max_retries=self.settings.max_failures)
        def work() -> dict[str, Any]:
            return how(task, place, tracker, device=device_of(gpus))

        with self._held(task, {"CPU": self.settings.trial_cpus, "GPU": gpus}):
            return ray.get(work.remote())

    @contextlib.contextmanager
    def _held(self, task: Task, amounts: Amounts) -> Iterator[None]:
        """Wait for the turn of the task's cell, and hold these amounts for it."""
        with self._unless_stopped():
            self.shares.wait(task.parent_key, task.run_key, amounts)
            try:
                yield
            finally:
                self.shares.give(task.parent_key, amounts)

    @contextlib.contextmanager
    def _unless_stopped(self) -> Iterator[None]:
        """What goes wrong because the job has left its cluster is an interrupt, and no error of the work."""
        try:
            yield
        except Exception:
            if self._stopped:
                raise KeyboardInterrupt from None
            raise

    def stop(self) -> None:
        """Leave the cluster: everything of this job in it ends."""
        self._stopped = True
        self.shares.close()
        # Threads of Tune and Train that lose their cluster now would each say so, with a traceback.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        ray.shutdown()
