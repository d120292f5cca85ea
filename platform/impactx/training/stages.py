"""The two stages (paper 3.3) and the compared approaches: which model is built, and with which loss it is trained."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn

from impactx.datasets import Dataset, Split
from impactx.datasets.batches import DeviceData, check_maps
from impactx.models import (
    Abn,
    Classifier,
    Ensemble,
    Impactx,
    Wae,
    build_abn,
    build_classifier,
    build_impactx,
    build_wae,
)
from impactx.settings import (
    AbnSettings,
    ImpactxSettings,
    ModelSettings,
    TrainingSettings,
    WaeSettings,
)
from impactx.training.loop import FitResult, Metrics, TrainingData, evaluate, fit
from impactx.training.losses import Loss, abn_loss, classification_loss, impactx_loss, wae_loss
from impactx.training.targets import Rearranged, targets_of


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

    maps: float32 (N, C, H, W), one for each training image, multiplied by scale (see `map_scale`); approach.maps
    says what is taught of them (see `targets_of`); else as `train_stage1`. The classifier itself is left as it is.
    Raises ValueError where the maps are not those of the images (`check_maps`).
    """
    check_maps(maps, data.train.images)  # before maps of other images stand for some of them: the controls
    net = build_impactx(approach, model, classifier, seed=seed, channels=maps.shape[1])
    taught, factor = targets_of(approach.maps, maps, scale, data.train.labels, split, seed)
    return net, _fit(net, impactx_loss(weight), data, split, training, device, taught, factor, seed=seed, **how)


def train_abn(data: Dataset, split: Split, model: ModelSettings, training: TrainingSettings, *,
              approach: AbnSettings, seed: int, device: torch.device | str = "cpu",
              **how: Any) -> tuple[Abn, FitResult]:
    """Build an Attention Branch Network from `seed` and train it by its two cross entropies; as `train_stage1`."""
    net = build_abn(approach, model, data.num_classes, data.image_size, seed=seed)
    return net, _fit(net, abn_loss, data, split, training, device, seed=seed, **how)


def train_wae(data: Dataset, split: Split, model: ModelSettings, training: TrainingSettings, *,
              classifier: Classifier, approach: WaeSettings, maps: np.ndarray, scale: float | np.ndarray, seed: int,
              device: torch.device | str = "cpu", **how: Any) -> tuple[Wae, FitResult]:
    """Build WAE around a trained classifier and train it by cross entropy.

    maps: float32 (N, C, H, W), the class-weighted maps of the training images; scale: as `map_scale` gives it, the
    network itself applies it; else as `train_stage1`.
    """
    net = build_wae(approach, model, classifier, seed=seed, factor=float(scale) if np.ndim(scale) == 0 else 0.0)
    return net, _fit(net, wae_loss, data, split, training, device, maps, seed=seed, **how)


def train_ensemble(data: Dataset, split: Split, model: ModelSettings, training: TrainingSettings, *,
                   classifier: Classifier, seed: int, device: torch.device | str = "cpu",
                   **how: Any) -> tuple[Ensemble, FitResult, Metrics | None]:
    """Train a second A from `seed`, as `train_stage1` does, and set it beside a trained one.

    Returns the ensemble, the second A's training, and the validation metrics of the ensemble itself (loss, accuracy,
    common_accuracy; None where the second A has no best epoch).
    """
    second, result = train_stage1(data, split, model, training, seed=seed, device=device, **how)
    net = Ensemble([copy.deepcopy(classifier), second]).to(device, next(second.parameters()).dtype)
    if not result.best_epoch:
        return net, result, None
    held = DeviceData(data.train.images, data.train.labels, split.validation, device=device,
                      dtype=next(second.parameters()).dtype, memory_bytes=training.memory_mb * 2**20)
    return net, result, evaluate(net, held, classification_loss, common=np.isin(split.validation, split.common),
                                 batch_size=training.eval_batch_size, training=training)


def device_parts(data: Dataset, split: Split, training: TrainingSettings, device: torch.device | str,
                 maps: np.ndarray | Rearranged | None = None, scale: float | np.ndarray = 1.0, *,
                 pending: bool = False) -> list[DeviceData]:
    """Training and validation part on the device, the memory budget shared by their sizes; the rest: DeviceData's."""
    images = len(split.train) + len(split.validation)
    return [DeviceData(data.train.images, data.train.labels, part, device=device, maps=maps, scale=scale,
                       pending=pending, dtype=dtype_of(training),
                       memory_bytes=training.memory_mb * 2**20 * len(part) // images)
            for part in (split.train, split.validation)]


def dtype_of(training: TrainingSettings) -> torch.dtype:
    """Of parameters and batches."""
    return torch.float64 if training.precision == "float64" else torch.float32


def _fit(model: nn.Module, loss: Loss, data: Dataset, split: Split, training: TrainingSettings,
         device: torch.device | str, maps: np.ndarray | Rearranged | None = None, scale: float | np.ndarray = 1.0,
         **how: Any) -> FitResult:
    model.to(device, dtype_of(training))
    parts = device_parts(data, split, training, device, maps, scale)
    return fit_best(model, loss, TrainingData(*parts, np.isin(split.validation, split.common)), training, **how)


def fit_best(model: nn.Module, loss: Loss, parts: TrainingData, training: TrainingSettings, **how: Any) -> FitResult:
    """`fit`, after which the model has the weights of its best epoch."""
    result = fit(model, loss, parts, training, **how)
    if result.best_state is not None:
        model.load_state_dict(result.best_state)
    return result
