"""The precision in which a model runs while it is explained.

Attributions are differences of scores, so the precision that is enough for training is not enough
for them: cuDNN convolves in TF32 (10 bits of mantissa) by default. Maps are made in float32 unless
the settings say otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from impactx.settings.base import Precision


@contextlib.contextmanager
def forward_precision(
    precision: Precision, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Set the precision of products and convolutions in a block; it is a decorator, too.

    Args:
        precision: "float32": as IEEE has it; "tf32": inputs are rounded to TF32 on GPUs that have
            it, elsewhere the same as float32; "bfloat16": torch's autocast on the device.
        device: Where the model runs.
    """
    wanted = "tf32" if precision == "tf32" else "ieee"
    cudnn: Any = torch.backends.cudnn  # its stubs lack conv and rnn
    backends = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    autocast = precision == "bfloat16"
    try:
        _set(backends, [wanted] * len(backends))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        _set(backends, before)


def _set(backends: Sequence[Any], values: Sequence[str]) -> None:
    """Set the old flags as well as the new.

    Where they disagree, torch.export fails, and leaves oneDNN switched off.
    """
    torch.backends.cuda.matmul.allow_tf32 = values[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = all(value == "tf32" for value in values[1:])
    for backend, value in zip(backends, values, strict=True):
        backend.fp32_precision = value


def map_error(maps: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest difference of maps from exact ones.

    Args:
        maps: float32 (N, C, H, W).
        exact: float32 (N, C, H, W), the same maps made in float32.

    Returns:
        The worst of the N maps: its largest difference as a share of the exact map's largest
        absolute value. A map of zeros must be met exactly.
    """
    apart = np.abs(maps.astype(np.float64) - exact).reshape(len(maps), -1).max(1)
    size = np.abs(exact).reshape(len(exact), -1).max(1)
    return float((apart / np.maximum(size, np.finfo(np.float32).tiny)).max())
