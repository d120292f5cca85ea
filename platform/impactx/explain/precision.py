"""How exactly a model runs while it is explained.

Attributions are differences of scores, so what a training takes for exact enough is not: cuDNN convolves in TF32
(10 bits of mantissa) unless it is told otherwise. Maps are made in float32 unless the settings say otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from impactx.settings import Precision


@contextlib.contextmanager
def forward_precision(precision: Precision, device: torch.device | str = "cpu") -> Iterator[None]:
    """The precision of products and convolutions in the block; the settings of before return. Also a decorator.

    float32: as IEEE has it; tf32: inputs are rounded to TF32 on GPUs that have it (elsewhere the same as float32);
    bfloat16: torch's autocast on the device.
    """
    wanted = "tf32" if precision == "tf32" else "ieee"
    places = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [place.fp32_precision for place in places]
    try:
        _set(places, [wanted] * len(places))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        _set(places, before)


def _set(places: Sequence[Any], values: Sequence[str]) -> None:
    """The old flags as well as the new: where they disagree, torch.export fails, and leaves oneDNN switched off."""
    torch.backends.cuda.matmul.allow_tf32 = values[0] == "tf32"
    torch.backends.cudnn.allow_tf32 = all(value == "tf32" for value in values[1:])
    for place, value in zip(places, values, strict=True):
        place.fp32_precision = value


def map_error(maps: np.ndarray, exact: np.ndarray) -> float:
    """The largest difference of a map's values from the exact one's, as a share of that map's largest absolute value.

    maps, exact: float32 (N, C, H, W); the worst of the N counts; a map of zeros must be met exactly.
    """
    apart = np.abs(maps.astype(np.float64) - exact).reshape(len(maps), -1).max(1)
    size = np.abs(exact).reshape(len(exact), -1).max(1)
    return float((apart / np.maximum(size, np.finfo(np.float32).tiny)).max())
