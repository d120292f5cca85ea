"""The device of a process to which Ray gave GPUs, or none."""

from __future__ import annotations

import socket

from impactx.experiment.steps.base import StepError
from impactx.settings import ClusterSettings


def alone(settings: ClusterSettings) -> tuple[float, float]:
    """CPUs and GPUs of work that is done in one process: a test, a judgement."""
    return settings.trial_cpus, min(settings.trial_gpus or float(settings.use_gpu), 1)


def device_of(gpus: float) -> str:
    """The device of this process, to which Ray gave so many GPUs. Raises StepError where torch
    finds none.
    """
    if not gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise StepError(f"Ray gave this process {gpus:g} GPU on {socket.gethostname()}, where torch finds none: its "
                        "driver is missing, or the node was started with a number of GPUs that it does not have")
    return "cuda"
