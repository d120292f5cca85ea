"""From a data set and a split to training and validation part on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from impactx.datasets import Dataset, Split
from impactx.datasets.batches import DeviceData
from impactx.settings import TrainingSettings
from impactx.training.loop import FitResult, TrainingData, fit
from impactx.training.losses import Loss


def dtype_of(training: TrainingSettings) -> torch.dtype:
    """Return the dtype of a model's parameters; its batches must have the same."""
    return torch.float64 if training.precision == "float64" else torch.float32


def device_parts(data: Dataset, split: Split, training: TrainingSettings,
                 device: torch.device | str, maps: Any = None, scale: float | np.ndarray = 1.0, *,
                 pending: bool = False) -> TrainingData:
    """Return training and validation part on the device, the memory budget shared by their sizes.

    Args:
        data: The data set; both parts are of its training images.
        split: Which images belong to which part.
        training: Gives the dtype and the memory budget.
        device: Where images and maps lie.
        maps: float32 (N, C, H, W), one map for each training image of the data set (an array or
            what gives rows as one), or None.
        scale: One factor, or one for each image, by which maps are multiplied.
        pending: Whether maps may be NaN, of images that have none yet.

    Raises:
        ValueError: The maps are not those of the images.
    """
    images = len(split.train) + len(split.validation)
    train, validation = (
        DeviceData(data.train.images, data.train.labels, part, device=device, maps=maps,
                   scale=scale, pending=pending, dtype=dtype_of(training),
                   memory_bytes=training.memory_mb * 2**20 * len(part) // images)
        for part in (split.train, split.validation))
    return TrainingData(train, validation, np.isin(split.validation, split.common))


def fit_best(model: nn.Module, loss: Loss, parts: TrainingData, training: TrainingSettings,
             **arguments: Any) -> FitResult:
    """Train as `fit` does with these arguments, then give the model its best epoch's weights.

    Where no epoch had a finite loss, the model keeps its last weights.
    """
    result = fit(model, loss, parts, training, **arguments)
    if result.best_state is not None:
        model.load_state_dict(result.best_state)
    return result
