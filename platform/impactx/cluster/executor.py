"""The executor that spreads the plan over a Ray cluster: Tune for searches, Train for models, Data for maps."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray

from impactx.cluster.pool import explain_on_pool
from impactx.experiment.executor import (
    OnEpoch,
    OnResult,
    OnShards,
    Task,
    log_maps,
    tracked_evaluation,
    tracked_training,
)
from impactx.experiment.tracker import Tracker
from impactx.experiment.work import Workplace, finish_maps, open_store
from impactx.settings import ClusterSettings

log = logging.getLogger("impactx")


def _device(gpus: float) -> str:
    return "cuda" if gpus else "cpu"


def _train_worker(config: dict[str, Any]) -> None:
    """What each worker of a TorchTrainer runs: the one training loop, on its share of every batch."""
    import ray.train
    import ray.train.torch

    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    rank, world = context.get_world_rank(), context.get_world_size()

    def report(row: dict[str, float]) -> None:
        config["progress"].epoch.remote(row)

    tracked_training(config["task"], config["place"], config["tracker"], device=device, rank=rank,
                     world_size=world, report=report)


@ray.remote(num_cpus=0)
class Monitor:
    """Collects the epochs that a training's workers report, for the driver's progress lines."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def epoch(self, row: dict[str, float]) -> None:
        """A training's epoch is done."""
        self.rows.append(row)

    def since(self, count: int) -> list[dict[str, float]]:
        """The epochs after the first `count`."""
        return self.rows[count:]


@contextlib.contextmanager
def _watched(monitor: Any, on_row: Callable[[dict[str, float]], None]) -> Iterator[None]:
    """Call on_row for what the monitor collects, while the block waits for the training."""
    over = threading.Event()

    def watch() -> None:
        seen = 0
        while not over.wait(2):
            with contextlib.suppress(ray.exceptions.RayError):  # progress is no reason to fail
                for row in ray.get(monitor.since.remote(seen)):
                    seen += 1
                    on_row(row)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class RayExecutor:
    """See experiment.executor.Executor. Connect to a cluster first (`connection.connected`)."""

    def __init__(self, settings: ClusterSettings, place: Workplace, tracker: Tracker) -> None:
        self.settings, self.place, self.tracker = settings, place, tracker
        # Tune and Train keep their own bookkeeping here; nothing of ours is in it.
        self._scratch = tempfile.mkdtemp(prefix="impactx-ray-")

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch) -> None:
        """Trials by Ray Tune, each in a process of its own that is kept for the next trial."""
        from ray import tune

        s, place, tracker = self.settings, self.place, self.tracker
        by_key = {task.unit.key: task for task in tasks}
        shared = ray.put(by_key)

        def trial(config: dict[str, Any]) -> None:
            task = ray.get(shared)[config["unit"]]
            tracked_training(task, place, tracker, device=_device(s.trial_gpus), report=lambda row: tune.report(
                {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}))
            tune.report({"finished": 1})  # a trial whose result was there already reports nothing else

        class OnTrials(tune.Callback):
            def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
                if "val_accuracy" in result:
                    on_epoch(by_key[trial.config["unit"]].unit, result)

            def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                unit = by_key[trial.config["unit"]].unit
                on_result(unit, place.artifacts.result(unit), None)

            def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
                unit = by_key[trial.config["unit"]].unit
                on_result(unit, None, _last_line(trial.error_file) or "its process died; see Ray's logs")

        tuner = tune.Tuner(
            tune.with_resources(trial, {"CPU": s.trial_cpus, "GPU": s.trial_gpus}),
            param_space={"unit": tune.grid_search(list(by_key))},
            tune_config=tune.TuneConfig(max_concurrent_trials=s.max_concurrent_trials, reuse_actors=True),
            run_config=tune.RunConfig(
                name=f"search-{time.time_ns()}", storage_path=self._scratch, verbose=0, callbacks=[OnTrials()],
                failure_config=tune.FailureConfig(max_failures=s.max_failures)))
        tuner.fit()

    def train(self, task: Task, on_epoch: OnEpoch) -> dict[str, Any]:
        """A model by Ray Train's TorchTrainer, on train_workers workers; its checkpoint lies in the output."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        s = self.settings
        resources = {"CPU": s.train_cpus} | ({"GPU": 1} if s.use_gpu else {})
        progress = Monitor.remote()  # type: ignore[attr-defined]
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"task": task, "place": self.place, "tracker": self.tracker, "progress": progress},
            scaling_config=ScalingConfig(num_workers=s.train_workers, use_gpu=s.use_gpu,
                                         resources_per_worker=resources),
            run_config=RunConfig(name=f"train-{task.unit.key}-{time.time_ns()}", storage_path=self._scratch,
                                 failure_config=FailureConfig(max_failures=s.max_failures)))
        with _watched(progress, lambda row: on_epoch(task.unit, row)):
            trainer.fit()
        result = self.place.artifacts.result(task.unit)
        if result is None:
            raise RuntimeError(f"{task.unit.name}: the training ended without a result")
        return result

    def explain(self, task: Task, on_shards: OnShards) -> dict[str, Any]:
        """Maps by a Ray Data actor pool."""
        with task.open_run(self.tracker) as run:
            started = time.perf_counter()
            store = open_store(task.unit, self.place)
            if store.missing():
                explain_on_pool(task.unit, self.place, self.settings, on_shards)
            result = finish_maps(task.unit, self.place, time.perf_counter() - started)
            log_maps(run, result)
            return result

    def evaluate(self, task: Task) -> dict[str, Any]:
        """The test set in one Ray task."""
        gpus = min(self.settings.trial_gpus or float(self.settings.use_gpu), 1)
        place, tracker = self.place, self.tracker

        @ray.remote(num_cpus=self.settings.trial_cpus, num_gpus=gpus, max_retries=self.settings.max_failures)
        def work() -> dict[str, Any]:
            return tracked_evaluation(task, place, tracker, device=_device(gpus))

        return ray.get(work.remote())


def _last_line(path: str | None) -> str:
    if not path:
        return ""
    try:
        with open(path, encoding="utf8") as stream:
            lines = [line.strip() for line in stream if line.strip()]
    except OSError:
        return ""
    return lines[-1] if lines else ""
