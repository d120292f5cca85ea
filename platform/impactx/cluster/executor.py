"""The executor that spreads the plan over a Ray cluster: Tune for searches, Train for models, Data for maps."""

from __future__ import annotations

import atexit
import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from impactx.cluster import capacity
from impactx.cluster.devices import alone, device_of
from impactx.cluster.pool import explain_on_pools, pools_of
from impactx.cluster.search import tune_search
from impactx.cluster.shares import Amounts, Shares
from impactx.cluster.training import Workers, train_on_workers
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
from impactx.experiment.work import finish_maps, open_store
from impactx.experiment.workplace import Workplace
from impactx.run.tracker import Tracker
from impactx.settings import ClusterSettings


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
            self._asked, self._have = now, capacity.grown(s, ray.cluster_resources())
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
                train_on_workers(task, place, tracker, workers, report)
            else:
                tracked_training(task, place, tracker, device=device_of(s.trial_gpus), report=report)

        # A trial over several workers only waits for them: its own process needs next to nothing.
        held = {"CPU": s.trial_cpus, "GPU": s.trial_gpus} if workers.count == 1 else {"CPU": 0.01}
        with self._unless_stopped():
            tune_search(tasks, place, train, shares=self.shares, need=workers.amounts | {"trials": 1}, held=held,
                        max_failures=s.max_failures, scratch=self._scratch, on_result=on_result, on_epoch=on_epoch,
                        limits=limits)

    def cells_at_once(self) -> int:
        """See capacity.cells_at_once."""
        return capacity.cells_at_once(self.settings, self._capacity())

    def trainings_at_once(self) -> int:
        """As many as the cluster has room for."""
        return capacity.trainings_at_once(self.settings, self._capacity())

    def train(self, task: Task, on_epoch: OnEpoch) -> dict[str, Any]:
        """A model by Ray Train on train_workers workers."""
        s = self.settings
        workers = self._workers(s.train_workers, s.train_cpus, float(s.use_gpu))
        with self._held(task, workers.amounts):
            return train_on_workers(task, self.place, self.tracker, workers, lambda row: on_epoch(task.unit, row))

    def explain(self, task: Task, on_shards: OnShards) -> dict[str, Any]:
        """Maps by Ray Data actor pools."""
        with task.open_run(self.tracker) as run, self._unless_stopped():
            started = time.perf_counter()
            store, made = open_store(task.unit, self.place), (0, 0.0)
            if store.missing():
                with self.shares.asking():
                    made = explain_on_pools(task.unit, self.place, pools_of(self.settings, self._capacity()),
                                     self.settings.max_failures, on_shards, self.shares, task.parent_key)
            result = finish_maps(task.unit, self.place, time.perf_counter() - started, *made)
            log_maps(run, task.unit, result)
            return result

    def evaluate(self, task: Task) -> dict[str, Any]:
        """The test set in one Ray task."""
        return self._in_one_task(task, tracked_evaluation)

    def judge(self, task: Task) -> dict[str, Any]:
        """The maps of a model in one Ray task."""
        return self._in_one_task(task, tracked_judgement)

    def _in_one_task(self, task: Task, how: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        (cpus, gpus), place, tracker = alone(self.settings), self.place, self.tracker

        @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=self.settings.max_failures)
        def work() -> dict[str, Any]:
            return how(task, place, tracker, device=device_of(gpus))

        with self._held(task, {"CPU": cpus, "GPU": capacity.blocked(gpus)}):
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
