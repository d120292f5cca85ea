"""The device of a process to which Ray gave GPUs, or none."""

from __future__ import annotations

import socket

from impactx.experiment.steps.base import StepError
from impactx.settings import ClusterSettings


def alone(settings: ClusterSettings) -> tuple[float, float]:
    """Return the CPUs and GPUs of a step that is done in one process, such as a test."""
    return settings.trial_cpus, min(settings.trial_gpus or float(settings.use_gpu), 1)


def device_of(gpus: float) -> str:
    """Return the torch device of this process.

    Args:
        gpus: How many GPUs Ray gave it.

    Raises:
        StepError: Ray gave it one, and torch finds none.
    """
    if not gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise StepError(
            f"Ray gave this process {gpus:g} GPU on {socket.gethostname()}, where torch finds "
            "none: its driver is missing, or the node was started with a number of GPUs that it "
            "does not have")
    return "cuda"
