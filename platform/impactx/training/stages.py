"""The two stages (paper 3.3): which model is built, on which images and with which loss it is trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from impactx.datasets import Dataset, Split
from impactx.datasets.batches import DeviceData
from impactx.models import Classifier, Impactx, build_classifier, build_impactx
from impactx.settings import ImpactxSettings, ModelSettings, TrainingSettings
from impactx.training.loop import FitResult, TrainingData, fit
from impactx.training.losses import Loss, classification_loss, impactx_loss


def train_stage1(data: Dataset, split: Split, model: ModelSettings, training: TrainingSettings, *, seed: int,
                 device: torch.device | str = "cpu", **how: Any) -> tuple[Classifier, FitResult]:
    """Build the classifier A from `seed` and train it by cross entropy.

    how: learning_rate, batch_size and augmentation, and whatever else `fit` takes. Returns the model on the
    device with the weights of its best epoch (the last ones where no epoch had a finite loss).
    """
    a = build_classifier(model, data.num_classes, data.image_size, seed=seed)
    return a, _fit(a, classification_loss, data, split, training, device, seed=seed, **how)


def train_stage2(data: Dataset, split: Split, model: ModelSettings, training: TrainingSettings, *,
                 classifier: Classifier, approach: ImpactxSettings, weight: float, maps: np.ndarray,
                 scale: float | np.ndarray, seed: int, device: torch.device | str = "cpu",
                 **how: Any) -> tuple[Impactx, FitResult]:
    """Build IMPACTX around a trained classifier and train it by equation (1) with lambda = weight.

    maps: float32 (N, C, H, W), one for each training image, multiplied by scale (see `map_scale`); else as
    `train_stage1`. The classifier itself is left as it is.
    """
    net = build_impactx(approach, model, classifier, seed=seed, channels=maps.shape[1])
    return net, _fit(net, impactx_loss(weight), data, split, training, device, maps, scale, seed=seed, **how)


def _fit(model: nn.Module, loss: Loss, data: Dataset, split: Split, training: TrainingSettings,
         device: torch.device | str, maps: np.ndarray | None = None, scale: float | np.ndarray = 1.0,
         **how: Any) -> FitResult:
    dtype = torch.float64 if training.precision == "float64" else torch.float32
    model.to(device, dtype)
    images = len(split.train) + len(split.validation)
    parts = [DeviceData(data.train.images, data.train.labels, part, device=device, maps=maps, scale=scale, dtype=dtype,
                        memory_bytes=training.memory_mb * 2**20 * len(part) // images)
             for part in (split.train, split.validation)]
    result = fit(model, loss, TrainingData(*parts, np.isin(split.validation, split.common)), training, **how)
    if result.best_state is not None:
        model.load_state_dict(result.best_state)
    return result
