"""The executor on Ray: Tune for searches, Train for models, Data for maps, tasks for the rest."""

from __future__ import annotations

import atexit
import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import cast

import ray

from impactx.cluster import capacity
from impactx.cluster.devices import alone, device_of
from impactx.cluster.maps import explain_on_pools, pools_of
from impactx.cluster.search import tune_search
from impactx.cluster.training import Workers, train_on_workers
from impactx.cluster.trial import Report
from impactx.experiment.steps.base import Context, Result
from impactx.experiment.steps.maps import Maps, MapsResult
from impactx.experiment.steps.training import TrainingResult
from impactx.experiment.workplace import Workplace
from impactx.run.executor import (
    UNLIMITED,
    Limits,
    OnEpoch,
    OnMaps,
    OnResult,
    Task,
    log_result,
    tracked,
)
from impactx.run.tracker import Tracker
from impactx.settings import ClusterSettings


class RayExecutor:
    """See `run.executor.Executor`. Connect to a cluster first (`connection.connected`)."""

    def __init__(self, settings: ClusterSettings, place: Workplace, tracker: Tracker) -> None:
        self.settings, self.place, self.tracker = settings, place, tracker
        self._scratch = tempfile.mkdtemp(prefix="impactx-ray-")
        atexit.register(shutil.rmtree, self._scratch, ignore_errors=True)
        self._left = threading.Event()
        at_once = settings.max_concurrent_trials
        self._places = None if at_once is None else threading.Semaphore(at_once)

    def _capacity(self) -> dict[str, float]:
        """Return what there is now, or what the cluster may come to."""
        return capacity.grown(self.settings, ray.cluster_resources())

    def _workers(self, count: int, cpus: float, gpus: float) -> Workers:
        return Workers(count, cpus, gpus, self.settings.max_failures, self._scratch)

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch,
               limits: Limits = UNLIMITED) -> None:
        """Train trials by Ray Tune, each in a process that the next one uses again."""
        s, place, tracker = self.settings, self.place, self.tracker
        workers = self._workers(s.trial_workers, s.trial_cpus, s.trial_gpus)

        def train(task: Task, report: Report) -> None:
            if workers.count > 1:
                train_on_workers(task, place, tracker, workers, report)
            else:
                context = Context(place, device_of(s.trial_gpus), on_epoch=report)
                tracked(task, context, tracker)

        # A trial over several workers only waits for them: its own process needs next to nothing.
        resources = {"CPU": s.trial_cpus, "GPU": s.trial_gpus} if workers.count == 1 else {
            "CPU": 0.01}
        with self._unless_left():
            tune_search(tasks, place.artifacts, train, resources=resources,
                        places=self._places, max_failures=s.max_failures,
                        scratch=self._scratch, on_result=on_result, on_epoch=on_epoch,
                        limits=limits, left=self._left)

    def cells_at_once(self) -> int:
        """See `capacity.cells_at_once`."""
        return capacity.cells_at_once(self.settings, self._capacity())

    def steps_at_once(self) -> int:
        """As many as the cluster has room for trainings."""
        return capacity.trainings_at_once(self.settings, self._capacity())

    def train(self, task: Task, on_epoch: OnEpoch) -> TrainingResult:
        """Train a model by Ray Train on train_workers workers."""
        s = self.settings
        workers = self._workers(s.train_workers, s.train_cpus, float(s.use_gpu))
        with self._unless_left():
            return train_on_workers(task, self.place, self.tracker, workers,
                                    lambda row: on_epoch(task.step, row))

    def explain(self, task: Task, on_maps: OnMaps) -> MapsResult:
        """Make maps by Ray Data actor pools."""
        step = cast(Maps, task.step)
        with task.open_run(self.tracker) as run, self._unless_left():
            started = time.perf_counter()
            made, seconds = 0, 0.0
            if step.open_store(self.place).missing():
                pools = pools_of(self.settings, self._capacity())
                made, seconds = explain_on_pools(step, self.place, pools, on_maps,
                                                 self._left.is_set)
            result = step.finish(self.place, time.perf_counter() - started, made, seconds)
            log_result(run, step, result, self.place)
            return result

    def process(self, task: Task) -> Result:
        """Do a step in one Ray task."""
        (cpus, gpus), place, tracker = alone(self.settings), self.place, self.tracker

        @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=self.settings.max_failures)
        def work() -> Result:
            return tracked(task, Context(place, device_of(gpus)), tracker)

        with self._unless_left():
            return ray.get(work.remote())

    @contextlib.contextmanager
    def _unless_left(self) -> Iterator[None]:
        """What goes wrong because the job has left its cluster is an interrupt, and no error."""
        try:
            yield
        except Exception:
            if self._left.is_set():
                raise KeyboardInterrupt from None
            raise

    def stop(self) -> None:
        """Leave the cluster: everything of this job in it ends."""
        self._left.set()
        # Threads of Tune and Train that lose their cluster now would each say so, with a traceback.
        logging.getLogger("ray").setLevel(logging.CRITICAL)
        ray.shutdown()
