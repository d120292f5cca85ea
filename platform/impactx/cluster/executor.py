"""The executor that spreads the plan over a Ray cluster: Tune for searches, Train for models, Data for maps."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import ray

from impactx.cluster.pool import explain_on_pool
from impactx.experiment.executor import (
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
    """Collects what workers report, for the driver's progress lines."""

    def __init__(self) -> None:
        self.last: dict[str, float] | None = None

    def epoch(self, row: dict[str, float]) -> None:
        """A training's epoch is done."""
        self.last = row

    def latest(self) -> dict[str, float] | None:
        """The last epoch that is done."""
        return self.last


class RayExecutor:
    """See experiment.executor.Executor. Connect to a cluster first (`connection.connected`)."""

    def __init__(self, settings: ClusterSettings, place: Workplace, tracker: Tracker) -> None:
        self.settings, self.place, self.tracker = settings, place, tracker
        # Tune and Train keep their own bookkeeping here; nothing of ours is in it.
        self._scratch = tempfile.mkdtemp(prefix="impactx-ray-")

    def search(self, tasks: Sequence[Task], on_result: OnResult) -> None:
        """Trials by Ray Tune, each in a process of its own that is kept for the next trial."""
        from ray import tune

        s, place, tracker = self.settings, self.place, self.tracker
        by_key = {task.unit.key: task for task in tasks}
        shared = ray.put(by_key)

        def trial(config: dict[str, Any]) -> None:
            task = ray.get(shared)[config["unit"]]
            tracked_training(task, place, tracker, device=_device(s.trial_gpus), report=lambda row: tune.report(
                {"epoch": row["epoch"], "val_accuracy": row["val_accuracy"]}))
            tune.report({"finished": 1})

        class OnTrials(tune.Callback):
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

    def train(self, task: Task) -> dict[str, Any]:
        """A model by Ray Train's TorchTrainer, on train_workers workers; its checkpoint lies in the output."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        s = self.settings
        resources = {"CPU": s.train_cpus} | ({"GPU": 1} if s.use_gpu else {})
        progress = Monitor.remote()
        trainer = TorchTrainer(
            _train_worker,
            train_loop_config={"task": task, "place": self.place, "tracker": self.tracker, "progress": progress},
            scaling_config=ScalingConfig(num_workers=s.train_workers, use_gpu=s.use_gpu,
                                         resources_per_worker=resources),
            run_config=RunConfig(name=f"train-{task.unit.key}-{time.time_ns()}", storage_path=self._scratch,
                                 failure_config=FailureConfig(max_failures=s.max_failures)))
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
