"""The device of a process to which Ray gave GPUs or none, and what a step needs of its memory."""

from __future__ import annotations

import socket

import ray
import torch

from impactx.experiment.steps.base import Context, Result, StepError
from impactx.experiment.steps.training import Training
from impactx.run.executor import Task, tracked
from impactx.run.tracker import Tracker
from impactx.settings import Device, ProcessResources, TrainingResources


def device_here(setting: Device) -> str:
    """Return the torch device of this process: a GPU where Ray gave it one.

    Args:
        setting: cluster.device.

    Raises:
        StepError: Ray gave it one, and torch finds none.
    """
    if setting != "auto" or not (given := ray.get_gpu_ids()):
        return "cpu"
    if not torch.cuda.is_available():
        raise StepError(
            f"Ray gave this process GPU {given[0]} on {socket.gethostname()}, where torch finds "
            "none: its driver is missing, torch is built for CPUs, or the node was started with "
            "GPUs that it does not have. Mend the node, start it with --num-gpus=0, or keep the "
            "job on CPUs by cluster.device=cpu")
    return "cuda"


def tracked_within(share: ProcessResources, task: Task, context: Context, tracker: Tracker
                   ) -> Result:
    """Do a step in this process, and say by what it can be made to fit where it does not.

    Args:
        share: What the process holds.
        task: The step and its run.
        context: Of this process.
        tracker: Keeps the run.

    Raises:
        StepError: The device's memory is too small.
    """
    try:
        return tracked(task, context, tracker)
    except torch.OutOfMemoryError as error:
        step = task.step
        reason = (str(error).strip() or "no memory").splitlines()[0]
        if not isinstance(step, Training):
            raise StepError(f"{step.name}: out of memory with a share of {share.gpus:g} GPU "
                            f"({reason}): raise models.{step.model_name}.resources.trial.gpus"
                            ) from None
        workers = share.workers if isinstance(share, TrainingResources) else 1
        slot = f"models.{step.model_name}.resources.{step.slot}"
        raise StepError(
            f"{step.name}: out of memory with batch size {step.batch_size} over {workers} "
            f"worker(s), each with a share of {share.gpus:g} GPU ({reason}): raise {slot}.gpus or "
            f"{slot}.workers, or leave that batch size out of grid.batch_size") from None
