"""The executor on Ray: Tune for searches, Train for models, Data for maps, tasks for the rest."""

from __future__ import annotations

import atexit
import contextlib
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ray

from impactx.cluster import capacity
from impactx.cluster.devices import device_here, tracked_within
from impactx.cluster.maps import explain_on_pools, pools_of
from impactx.cluster.search import tune_search
from impactx.cluster.training import Workers, train_on_workers
from impactx.cluster.trial import Report
from impactx.experiment.steps.base import Context, Result, Step
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
)
from impactx.run.tracker import Tracker
from impactx.settings import ClusterSettings, ModelResources, TrainingResources


class RayExecutor:
    """See `run.executor.Executor`. Connect to a cluster first (`connection.connected`)."""

    def __init__(self, settings: ClusterSettings, place: Workplace, tracker: Tracker,
                 resources: Mapping[str, ModelResources]) -> None:
        """Ask Ray whether the cluster has GPUs.

        Args:
            settings: Of the cluster.
            place: Where steps are kept.
            tracker: Keeps their runs.
            resources: What each model asks for, by its name.
        """
        self.settings, self.place, self.tracker = settings, place, tracker
        self.resources = resources if capacity.uses_gpus(settings, ray.cluster_resources()) else {
            name: model.on_cpus() for name, model in resources.items()}
        self._scratch = tempfile.mkdtemp(prefix="impactx-ray-")
        atexit.register(shutil.rmtree, self._scratch, ignore_errors=True)
        self._left = threading.Event()
        at_once = settings.max_concurrent_trials
        self._places = None if at_once is None else threading.Semaphore(at_once)
        self._joining = threading.Lock()

    def _capacity(self) -> dict[str, float]:
        """Return what there is now, or what the cluster may come to."""
        return capacity.grown(self.settings, ray.cluster_resources())

    def _wanted(self, step: Step[Any]) -> TrainingResources:
        """Return what a step without maps holds; one process holds what a trial's worker does."""
        model = self.resources[step.model_name]
        if step.slot == "process":
            return model.trial.model_copy(update={"workers": 1})
        return model.training if step.slot == "training" else model.trial

    def _workers(self, wanted: TrainingResources) -> Workers:
        return Workers(wanted, self.settings.device, self.settings.max_failures, self._scratch)

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch,
               limits: Limits = UNLIMITED) -> None:
        """Train trials by Ray Tune, each in a process that the next one uses again."""
        s, place, tracker = self.settings, self.place, self.tracker
        wanted = self._wanted(tasks[0].step)
        workers = self._workers(wanted)

        def train(task: Task, report: Report) -> None:
            if wanted.workers > 1:
                train_on_workers(task, place, tracker, workers, report)
            else:
                context = Context(place, device_here(s.device), on_epoch=report)
                tracked_within(wanted, task, context, tracker)

        # A trial over several workers only waits for them: its own process needs next to nothing.
        resources = {"CPU": wanted.cpus, "GPU": wanted.gpus} if wanted.workers == 1 else {
            "CPU": 0.01}
        with self._unless_left():
            tune_search(tasks, place.artifacts, train, resources=resources,
                        places=self._places, max_failures=s.max_failures,
                        scratch=self._scratch, on_result=on_result, on_epoch=on_epoch,
                        limits=limits, left=self._left)

    def cells_at_once(self) -> int:
        """See `capacity.cells_at_once`."""
        return capacity.cells_at_once(self.settings, self.resources.values(), self._capacity())

    def steps_at_once(self, step: Step[Any]) -> int:
        """As many as the cluster has room for."""
        return capacity.trainings_at_once(self._wanted(step), self._capacity())

    def train(self, task: Task, on_epoch: OnEpoch) -> TrainingResult:
        """Train a model by Ray Train on its workers."""
        workers = self._workers(self._wanted(task.step))
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
                made, seconds = self._explain(step, on_maps)
            result = step.finish(self.place, time.perf_counter() - started, made, seconds)
            log_result(run, step, result, self.place)
            return result

    def _explain(self, step: Maps, on_maps: OnMaps) -> tuple[int, float]:
        pool, joining = pools_of(self.resources[step.model_name], self._capacity())
        # Actors on CPUs join at one store at a time: those of several would take the CPUs that each
        # leaves to the processes on GPUs.
        may_join = self._joining.acquire(blocking=False)
        try:
            return explain_on_pools(
                step, self.place, self.settings.device, pool, joining if may_join else None,
                on_maps=on_maps, left=self._left.is_set)
        finally:
            if may_join:
                self._joining.release()

    def process(self, task: Task) -> Result:
        """Do a step in one Ray task."""
        place, tracker, setting = self.place, self.tracker, self.settings.device
        wanted = self._wanted(task.step)

        @ray.remote(num_cpus=wanted.cpus, num_gpus=wanted.gpus,
                    max_retries=self.settings.max_failures)
        def work() -> Result:
            return tracked_within(wanted, task, Context(place, device_here(setting)), tracker)

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
