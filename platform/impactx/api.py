"""The method as a library, in one process, without Ray and MLflow; docs/example.py uses all of it.

The package re-exports these names: `impactx.train_classifier`, `impactx.explain_dataset`,
`impactx.train_impactx`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

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
from impactx.settings import AugmentationSettings, ModelSettings, TrainingSettings
from impactx.timing import Progress
from impactx.training.loop import LoopArguments, Metrics

log = logging.getLogger("impactx")
MEMORY_BYTES = 2**30  # of images and maps on the device in a prediction


@dataclass(frozen=True)
class Schedule:
    """The settings of a training that an experiment searches, or takes from its data set.

    Attributes:
        learning_rate: The optimiser's.
        batch_size: Images in a training batch.
        validation_fraction: The share of the training images that is held out for early stopping.
        augmentation: How training images and their maps are changed in each epoch.
        seed: Of the split, the initial weights, the order of images and the augmentation.
    """

    learning_rate: float = 0.001
    batch_size: int = 32
    validation_fraction: float = 0.1
    augmentation: AugmentationSettings = AugmentationSettings()
    seed: int = 0


@dataclass(frozen=True)
class Prediction:
    """The predictions for N images.

    Attributes:
        labels: int64 (N,), the class with the highest probability.
        probabilities: float32 (N, K).
        maps: float32 (N, C, H, W), in the units of the attribution (scaled, if each training map
            had a scale of its own). ABN's are its attention, (N, 1, H, W) in (0, 1); WAE's are the
            maps that it took as input. None for a model without maps, and for one that was trained
            with lambda = 0, whose decoder learned nothing.
    """

    labels: np.ndarray
    probabilities: np.ndarray
    maps: np.ndarray | None


@dataclass(frozen=True)
class TrainedModel:
    """A trained classifier A, IMPACTX around one, or another approach.

    Attributes:
        model: The network on the CPU, in eval mode, with the weights of its best epoch.
        model_settings: The settings of A's architecture.
        class_names: K names in the order of the labels.
        approach: The approach by which it was trained.
        map_unit: The factor that brings the network's maps into the attribution's units; None if
            it makes none, or if each training map had a scale of its own.
        schedule: The schedule of its training.
        history: The metrics of each epoch.
        best: The metrics of the epoch whose weights these are.
        weight: The lambda of its training; None if the approach has none.
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
        """Height and width in pixels of the images that it takes."""
        return cast(tuple[int, int], self.model.image_size)

    @property
    def map_kind(self) -> MapKind | None:
        """The kind of the maps of its predictions, or None; see `models.map_kind`."""
        return map_kind(self.model, self.weight)

    @torch.no_grad()
    def predict(self, images: np.ndarray, *, device: str = "cpu",
                batch_size: int = 500) -> Prediction:
        """Classify images and make the model's maps of them, in one forward pass.

        Only WAE needs more: it takes a map of each image, which costs as much as an explanation.

        Args:
            images: uint8 (N, H, W, 3) of the size of the training images; N may be 0.
            device: Where it runs, as torch names it.
            batch_size: Images in a forward pass.

        Raises:
            ValueError: The images have another type or size.
        """
        height, width = self.image_size
        if images.dtype != np.uint8 or images.shape[1:] != (height, width, 3):
            raise ValueError(f"images must be uint8 (N, {height}, {width}, 3), values 0 to 255, "
                             f"got {images.dtype} {images.shape}")
        if not len(images):
            # Not every network takes an empty batch: one black image gives the shapes.
            one = np.zeros((1, height, width, 3), np.uint8)
            input_maps = np.zeros((1, 3, height, width), np.float32) if self._takes_maps else None
            shaped = self._predict(one, input_maps, device, batch_size)
            return Prediction(shaped.labels[:0], shaped.probabilities[:0],
                              None if shaped.maps is None else shaped.maps[:0])
        return self._predict(images, self._input_maps(images, device), device, batch_size)

    def _predict(self, images: np.ndarray, input_maps: np.ndarray | None, device: str,
                 batch_size: int) -> Prediction:
        model: Any = self.model.to(device)
        probabilities, maps = [], []
        data = DeviceData(images, np.zeros(len(images), np.int64), np.arange(len(images)),
                          device=device, maps=input_maps, memory_bytes=MEMORY_BYTES)
        for batch in data.evaluation(batch_size=batch_size):
            if hasattr(model, "with_maps") and self.map_kind:
                logits, own_maps = model.with_maps(batch.images)
                maps.append((own_maps * (self.map_unit or 1.0)).float().cpu().numpy())
            elif batch.maps is None:
                logits = model.classify(batch.images)
            else:
                logits = model.classify(batch.images, batch.maps)
            probabilities.append(logits.softmax(1).float().cpu().numpy())
        model.to("cpu")
        joined = np.concatenate(probabilities)
        return Prediction(joined.argmax(1), joined, np.concatenate(maps) if maps else input_maps)

    @property
    def _takes_maps(self) -> bool:
        return bool(getattr(self.model, "takes_maps", False))

    def _input_maps(self, images: np.ndarray, device: str) -> np.ndarray | None:
        """Return the maps that the model takes as input, by the attribution of its training."""
        if not self._takes_maps:
            return None
        attribution = cast(Attribution, self.approach.own_attribution or Partition())
        a = cast(nn.Module, self.model.a)
        return explain_by_own_probabilities(attribution, a, images, device=device).maps

    def save(self, path: str | Path) -> None:
        """Write a checkpoint that `load_model` reads."""
        Path(path).write_bytes(save_checkpoint(
            self.model, model_settings=self.model_settings, approach=self.approach,
            class_names=list(self.class_names), map_scale=self.map_unit, weight=self.weight))


def load_model(source: str | Path | bytes) -> TrainedModel:
    """Return the model of a checkpoint.

    Args:
        source: The path or the content of a checkpoint that `TrainedModel.save` wrote, or of an
            experiment's models/<key>/checkpoint.pt.

    Raises:
        CheckpointError: It is no checkpoint of this package.
    """
    loaded = load_checkpoint(source)
    return TrainedModel(loaded.model, loaded.model_settings, tuple(loaded.class_names),
                        loaded.approach, loaded.map_scale, weight=loaded.weight)


def train_classifier(data: Dataset, model: ModelSettings,
                     training: TrainingSettings = TrainingSettings(),  # noqa: B008
                     schedule: Schedule = Schedule(), *,  # noqa: B008
                     device: str = "cpu") -> TrainedModel:
    """Train the classifier A (stage 1).

    Args:
        data: The data set.
        model: A's architecture and its weights at the start.
        training: The settings of the training loop.
        schedule: The learning rate and all else that an experiment searches.
        device: Where it is trained, as torch names it.

    Raises:
        ValueError: The loss is not finite in the first epoch.
    """
    split = _split(data, schedule)
    bench = Bench(data=data, split=split, model=model, training=training,
                  loop=_loop("stage 1", training, device), **_scheduled(schedule))
    return _trained(Baseline().train(bench), bench, schedule)


def explain_dataset(a: TrainedModel, data: Dataset,
                    attribution: Attribution = Partition(), *,  # noqa: B008
                    device: str = "cpu", block: int = 200) -> np.ndarray:
    """Make one map for each training image, of A's score of its true class.

    Args:
        a: The classifier that is explained.
        data: The data set.
        attribution: The method that makes the maps.
        device: Where it runs, as torch names it.
        block: Images between two lines of progress.

    Returns:
        float32 (N, C, H, W).
    """
    model = a.model.to(device)
    count, maps = len(data.train), []
    progress = Progress("maps", "maps", count, every=10)
    for start in range(0, count, block):
        # Indexed by an array, the images are copied from their memory-mapped file.
        rows = np.arange(start, min(start + block, count))
        explained = attribution.explain(model, data.train.images[rows], data.train.labels[rows],
                                        device=device, indices=rows)
        maps.append(explained.maps)
        progress.at(start + len(rows))
    model.to("cpu")
    return np.concatenate(maps)


def train_impactx(a: TrainedModel, data: Dataset, maps: np.ndarray,
                  training: TrainingSettings = TrainingSettings(), *,  # noqa: B008
                  weight: float = 0.8, approach: Impactx = Impactx(),  # noqa: B008
                  scale: str = "std", schedule: Schedule | None = None,
                  device: str = "cpu") -> TrainedModel:
    """Train IMPACTX around A (stage 2) on the same split, by equation (1) of the paper.

    Args:
        a: The classifier of stage 1.
        data: The data set.
        maps: float32 (N, C, H, W), as `explain_dataset` makes them.
        training: The settings of the training loop.
        weight: lambda, the weight of the maps' mean squared error in the loss.
        approach: IMPACTX's settings.
        scale: How maps are scaled: "std", "max_abs" or "raw" (the setting maps.scale).
        schedule: None for A's.
        device: Where it is trained, as torch names it.

    Raises:
        ValueError: A is no classifier of stage 1, the maps are not one finite map of its size for
            each training image, or the loss is not finite in the first epoch.
    """
    classifier = a.model
    if not isinstance(classifier, Classifier):
        raise ValueError("stage 2 starts from a classifier of stage 1, and this is "
                         f"{type(classifier).__name__}")
    check_maps(maps, data.train.images, finite=True)
    schedule = schedule or a.schedule
    split = _split(data, schedule)
    factor = map_scale(maps, split.train, scale)
    bench = Bench(data=data, split=split, model=a.model_settings, training=training,
                  loop=_loop("stage 2", training, device), candidate=Candidate(weight),
                  classifier=lambda: classifier, maps=lambda: (maps, factor),
                  **_scheduled(schedule))
    return _trained(approach.train(bench), bench, schedule)


def _split(data: Dataset, schedule: Schedule) -> Split:
    return make_split(data.train.labels, schedule.validation_fraction, seed=schedule.seed,
                      common_fraction=schedule.validation_fraction, class_names=data.class_names)


def _loop(title: str, training: TrainingSettings, device: str) -> LoopArguments:
    progress = Progress(title, "epochs", training.epochs)

    def on_epoch(row: Metrics) -> None:
        progress.step(f"validation accuracy {row['val_accuracy']:.4f}")

    return LoopArguments(device, on_epoch=on_epoch)


def _scheduled(schedule: Schedule) -> dict[str, Any]:
    return {"learning_rate": schedule.learning_rate, "batch_size": schedule.batch_size,
            "seed": schedule.seed, "augmentation": schedule.augmentation}


def _trained(trained: Trained, bench: Bench, schedule: Schedule) -> TrainedModel:
    return TrainedModel(trained.model.cpu().eval(), bench.model, bench.data.class_names,
                        trained.approach, trained.map_scale, schedule, trained.fit.history,
                        trained.fit.best, bench.candidate.weight)
