"""The device of a process to which Ray gave GPUs, or none."""

from __future__ import annotations

import socket

from impactx.experiment.units import WorkError


def device_of(gpus: float) -> str:
    """The device of this process, to which Ray gave so many GPUs. Raises WorkError where torch finds none."""
    if not gpus:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        raise WorkError(f"Ray gave this process {gpus:g} GPU on {socket.gethostname()}, where torch finds none: its "
                        "driver is missing, or the node was started with a number of GPUs that it does not have")
    return "cuda"
