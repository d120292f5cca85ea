"""One training by Ray Train: over one or several workers, each epoch told to the job."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from impactx.cluster.devices import device_here, tracked_within
from impactx.cluster.errors import is_final, portable
from impactx.cluster.monitor import Monitor
from impactx.experiment.steps.base import Context, StepError
from impactx.experiment.steps.training import TrainingResult
from impactx.experiment.workplace import Workplace
from impactx.run.executor import Task
from impactx.run.tracker import Tracker
from impactx.settings import Device, TrainingResources

if TYPE_CHECKING:
    from ray.train.torch import TorchConfig


def _train_worker(config: dict[str, Any]) -> None:
    """Run the one training loop in a worker of a TorchTrainer, on its share of every batch."""
    import ray.train
    import ray.train.torch

    context, workers = ray.train.get_context(), config["workers"]
    rank, world = context.get_world_rank(), context.get_world_size()
    monitor = config["monitor"]
    if ray.get(monitor.since.remote(0))[1] is not None:
        return  # started again after an error that stays

    def report(row: dict[str, float]) -> None:
        monitor.epoch.remote(row)

    try:
        device = device_here(workers.device)
        if device != "cpu":  # workers on one node see the GPUs of all, and each has its own
            device = str(ray.train.torch.get_device())
        tracked_within(workers.wanted, config["task"],
                       Context(config["place"], device, rank, world, report), config["tracker"])
    except Exception as error:
        if is_final(error):
            ray.get(monitor.fail.remote(portable(error)))
            if world == 1:
                return
        raise  # Ray Train ends the others, who wait for this one, and starts all again


@dataclass(frozen=True)
class Workers:
    """The data-parallel workers of one training.

    Attributes:
        wanted: How many they are, and what each holds.
        device: cluster.device.
        max_failures: Tries of a training whose worker dies.
        scratch: A folder for Tune's and Train's own bookkeeping.
    """

    wanted: TrainingResources
    device: Device
    max_failures: int
    scratch: str


def _torch_config(workers: int, logical: bool) -> TorchConfig:
    """Return how Ray Train joins the workers of a training: one of them needs no process group.

    torch's process group meets through a store that listens on every address of the machine.

    Args:
        workers: Their number.
        logical: Whether their GPUs are there in name only. Ray chooses NCCL wherever GPUs are asked
            for, which needs real ones.
    """
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig

    class OneWorker(TorchConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return OneWorker() if workers == 1 else TorchConfig("gloo" if logical else None)


def train_on_workers(task: Task, place: Workplace, tracker: Tracker, workers: Workers,
                      on_row: Callable[[dict[str, float]], object]) -> TrainingResult:
    """Train a model by Ray Train's TorchTrainer; its artifacts are kept when this returns.

    Args:
        task: Of a training.
        place: Where it is kept.
        tracker: Keeps its run.
        workers: Who share the training.
        on_row: Called with the metrics of each epoch.

    Raises:
        StepError: The training ended without a result.
        Exception: What a worker raised, or Ray.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    wanted, on_gpus = workers.wanted, workers.wanted.gpus > 0
    resources = {"CPU": wanted.cpus} | ({"GPU": wanted.gpus} if on_gpus else {})
    # Not on the machine of a worker, with which it would be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = Monitor.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={"task": task, "place": place, "tracker": tracker, "monitor": monitor,
                           "workers": workers},
        torch_config=_torch_config(wanted.workers, logical=workers.device == "logical"),
        scaling_config=ScalingConfig(num_workers=wanted.workers, use_gpu=on_gpus,
                                     resources_per_worker=resources),
        run_config=RunConfig(name=f"train-{task.step.key}-{time.time_ns()}",
                             storage_path=workers.scratch,
                             failure_config=FailureConfig(max_failures=workers.max_failures)))
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # noqa: BLE001 - for the thread that waits
            errors.append(error)

    # In the main thread, Ray Train would take Ctrl-C for itself, for ever, and end the job as if
    # all were well.
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
    result: TrainingResult | None = place.artifacts.result(task.step)
    if result is None:
        raise StepError(f"{task.step.name}: the training ended without a result")
    return result
