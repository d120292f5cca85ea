"""The method in a few calls, in one process, without Ray and MLflow; docs/example.py shows all of it.

`impactx` re-exports these names: impactx.train_classifier, impactx.explain_dataset, impactx.train_impactx.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from impactx.approaches.base import Approach, Bench, Candidate, Trained
from impactx.approaches.baseline import Baseline
from impactx.approaches.checkpoint import load_checkpoint, save_checkpoint
from impactx.approaches.impactx import Impactx
from impactx.datasets import Dataset, Split, make_split
from impactx.datasets.batches import DeviceData, check_maps
from impactx.explain.attribution import Attribution
from impactx.explain.maps.scale import map_scale
from impactx.explain.methods.partition import Partition
from impactx.explain.weighted import explain_by_own_probabilities
from impactx.models import Classifier, MapKind, map_kind
from impactx.settings import (
    AugmentationSettings,
    ModelSettings,
    TrainingSettings,
)
from impactx.timing import Progress
from impactx.training.loop import LoopArguments, Metrics

log = logging.getLogger("impactx")


@dataclass(frozen=True)
class Schedule:
    """What an experiment searches or takes from its data set; stage 2 uses A's unless it is told otherwise."""

    learning_rate: float = 0.001
    batch_size: int = 32
    validation_fraction: float = 0.1
    augmentation: AugmentationSettings = AugmentationSettings()
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """labels: int64 (N,); probabilities: float32 (N, K); maps: float32 (N, C, H, W), None from a model without.

    None as well from one trained with lambda = 0, whose decoder learned nothing.

    Maps are in the units of the attribution (scaled ones where each training map had a scale of its own); of ABN,
    its attention, (N, 1, H, W) in (0, 1); of WAE, the maps that it had to be given.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    maps: np.ndarray | None


@dataclass(frozen=True)
class TrainedModel:
    """A classifier A, IMPACTX around one, or another approach: on the CPU, in eval mode, with its best epoch's weights.

    map_unit: by which the network's maps are multiplied to be in the attribution's units; history: one dict
    an epoch; best: the one whose weights these are; weight: the lambda of its training, None where it has none.
    """

    model: nn.Module
    model_settings: ModelSettings
    class_names: tuple[str, ...]
    approach: Approach = Baseline()
    map_unit: float | None = None
    schedule: Schedule = Schedule()
    history: list[Metrics] = field(default_factory=list)
    best: Metrics = field(default_factory=dict)
    weight: float | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images it takes."""
        return self.model.image_size

    @property
    def map_kind(self) -> MapKind | None:
        """What the maps of its predictions are, None where these have none; see `models.map_kind`."""
        return map_kind(self.model, self.weight)

    @torch.no_grad()
    def predict(self, images: np.ndarray, *, device: str = "cpu", batch_size: int = 500) -> Prediction:
        """Labels, probabilities and, where the model makes maps, these: by one forward pass.

        Only WAE needs more: a map of each image is computed first, which costs what an explanation costs.
        images: uint8 (N, H, W, 3) of the training images' size; of none, N is 0 in what is returned too.
        Raises ValueError for others.
        """
        height, width = self.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
            raise ValueError(f"images must be uint8 (N, {height}, {width}, 3), values 0 to 255, got {images.dtype} "
                             f"{images.shape}")
        if not len(images):  # what one image has, without it: not every network takes none
            one = np.zeros((1, height, width, 3), np.uint8)
            given = np.zeros((1, 3, height, width), np.float32) if self._takes_maps else None
            found = self._predict(one, given, device, batch_size)
            return Prediction(found.labels[:0], found.probabilities[:0], None if found.maps is None else found.maps[:0])
        return self._predict(images, self._given_maps(images, device), device, batch_size)

    def _predict(self, images: np.ndarray, given: np.ndarray | None, device: str, batch_size: int) -> Prediction:
        """given: the maps that the model must be given, None where it takes none."""
        model, probabilities, maps = self.model.to(device), [], []
        held = DeviceData(images, np.zeros(len(images), np.int64), np.arange(len(images)), device=device,
                          maps=given, memory_bytes=2**30)
        for batch in held.evaluation(batch_size=batch_size):
            if hasattr(model, "with_maps") and self.map_kind:
                logits, found = model.with_maps(batch.images)
                maps.append((found * (self.map_unit or 1.0)).float().cpu().numpy())
            else:
                logits = model.classify(batch.images, *(() if batch.maps is None else (batch.maps,)))
            probabilities.append(logits.softmax(1).float().cpu().numpy())
        model.to("cpu")
        whole = np.concatenate(probabilities)
        return Prediction(whole.argmax(1), whole, np.concatenate(maps) if maps else given)

    @property
    def _takes_maps(self) -> bool:
        return getattr(self.model, "takes_maps", False)

    def _given_maps(self, images: np.ndarray, device: str) -> np.ndarray | None:
        """The maps that a model must be given, by the attribution that it was trained with."""
        if not self._takes_maps:
            return None
        attribution = self.approach.own_attribution or Partition()
        return explain_by_own_probabilities(attribution, self.model.a, images, device=device).maps

    def save(self, path: str | Path) -> None:
        """Write a checkpoint that `load_model` reads."""
        Path(path).write_bytes(save_checkpoint(
            self.model, model_settings=self.model_settings, approach=self.approach,
            class_names=list(self.class_names), map_scale=self.map_unit, weight=self.weight))


def load_model(source: str | Path | bytes) -> TrainedModel:
    """A model from a checkpoint: of `TrainedModel.save`, or models/<key>/checkpoint.pt of an experiment.

    Raises CheckpointError where it is none.
    """
    loaded = load_checkpoint(source)
    return TrainedModel(loaded.model, loaded.model_settings, tuple(loaded.class_names), loaded.approach,
                        loaded.map_scale, weight=loaded.weight)


def train_classifier(data: Dataset, model: ModelSettings, training: TrainingSettings = TrainingSettings(),  # noqa: B008
                     schedule: Schedule = Schedule(), *, device: str = "cpu") -> TrainedModel:  # noqa: B008
    """Stage 1: train the classifier A on a data set. Raises ValueError where it diverges at once."""
    split = make_split(data.train.labels, schedule.validation_fraction, seed=schedule.seed,
                       common_fraction=schedule.validation_fraction, class_names=data.class_names)
    progress = Progress("stage 1", "epochs", training.epochs)
    bench = _bench(data, split, model, training, schedule, device, progress)
    return _finished(Baseline().train(bench), bench, schedule)


def explain_dataset(a: TrainedModel, data: Dataset, attribution: Attribution = Partition(), *,  # noqa: B008
                    device: str = "cpu", block: int = 200) -> np.ndarray:
    """One map for each training image, of A's score of its true class: float32 (N, C, H, W).

    block: images a step, for the progress lines.
    """
    model = a.model.to(device)
    count, parts = len(data.train), []
    progress = Progress("maps", "maps", count, every=10)
    for start in range(0, count, block):
        rows = np.arange(start, min(start + block, count))  # indexed by an array, the images are copied from their file
        parts.append(attribution.explain(model, data.train.images[rows], data.train.labels[rows], device=device,
                                   indices=rows).maps)
        progress.at(start + len(rows))
    model.to("cpu")
    return np.concatenate(parts)


def train_impactx(a: TrainedModel, data: Dataset, maps: np.ndarray,
                  training: TrainingSettings = TrainingSettings(), *, weight: float = 0.8,  # noqa: B008
                  approach: Impactx = Impactx(), scale: str = "std",  # noqa: B008
                  schedule: Schedule | None = None, device: str = "cpu") -> TrainedModel:
    """Stage 2: train IMPACTX around A on the same split, by equation (1) with lambda = weight.

    maps: as `explain_dataset` made them; scale: std, max_abs or raw (setting maps.scale); schedule: A's by
    default. Raises ValueError where it diverges at once, and where the maps are not one for each training image, of its
    size and channels, or not finite.
    """
    if not isinstance(a.model, Classifier):
        raise ValueError(f"stage 2 starts from a classifier of stage 1, and this is {type(a.model).__name__}")
    check_maps(maps, data.train.images, finite=True)
    s = schedule or a.schedule
    split = make_split(data.train.labels, s.validation_fraction, seed=s.seed, common_fraction=s.validation_fraction,
                       class_names=data.class_names)
    factor = map_scale(maps, split.train, scale)
    progress = Progress("stage 2", "epochs", training.epochs)
    bench = _bench(data, split, a.model_settings, training, s, device, progress, candidate=Candidate(weight),
                   classifier=lambda: a.model, maps=lambda: (maps, factor))
    return _finished(approach.train(bench), bench, s)


def _say(progress: Progress):  # noqa: ANN202
    return lambda row: progress.step(f"validation accuracy {row['val_accuracy']:.4f}")


def _bench(data: Dataset, split: Split, model: ModelSettings, training: TrainingSettings, schedule: Schedule,
           device: str, progress: Progress, **more: Any) -> Bench:
    return Bench(data=data, split=split, model=model, training=training, learning_rate=schedule.learning_rate,
                 batch_size=schedule.batch_size, seed=schedule.seed, augmentation=schedule.augmentation,
                 loop=LoopArguments(device, on_epoch=_say(progress)), **more)


def _finished(trained: Trained, bench: Bench, schedule: Schedule) -> TrainedModel:
    return TrainedModel(trained.model.cpu().eval(), bench.model, bench.data.class_names, trained.approach,
                        trained.map_scale, schedule, trained.fit.history, trained.fit.best, bench.candidate.weight)
