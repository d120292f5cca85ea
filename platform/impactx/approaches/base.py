"""What every approach answers: its settings, its network, what it searches, and how it is trained.

An approach is one class, registered by its decorator; with this file anywhere it is imported, its
settings can be given under `approaches`, by its `kind`:

    @approach
    class Smoothed(Approach):
        kind: Literal["smoothed"] = "smoothed"
        network: ClassVar[type[nn.Module]] = SmoothedNetwork

        def train(self, bench: Bench) -> Trained: ...
        def rebuild(self, model, num_classes, image_size, channels) -> nn.Module: ...
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, Self

import numpy as np
from pydantic import Field
from torch import nn

from impactx.approaches.role import Role
from impactx.datasets import Dataset, Split
from impactx.models import Classifier
from impactx.settings import (
    AttributionSettings,
    AugmentationSettings,
    ModelSettings,
    TrainingSettings,
)
from impactx.settings.base import BatchSize, LearningRate
from impactx.settings.extensions import ApproachSettings, attribution
from impactx.training.loop import BetweenEpochs, FitResult, LoopArguments, TrainingData
from impactx.training.losses import Loss
from impactx.training.parts import device_parts, dtype_of, fit_best

# Settings that say what is searched, or by what maps are made. The point that is trained and the
# key of the maps are told beside the settings wherever a network is described.
SEARCHED = frozenset({"learning_rate", "batch_size", "learning_rate_factors", "lambdas",
                      "attribution"})


@dataclass(frozen=True)
class Candidate:
    """A point of an approach's own search.

    Attributes:
        weight: The lambda of equation (1); None where the approach has none.
        learning_rate_factor: What the learning rate is multiplied by.
    """

    weight: float | None = None
    learning_rate_factor: float = 1.0

    def label(self) -> str:
        """Return what tells the candidate from others, such as "lambda=0.8 rate x2", or ""."""
        parts = [] if self.weight is None else [f"lambda={self.weight:g}"]
        if self.learning_rate_factor != 1:
            parts.append(f"rate x{self.learning_rate_factor:g}")
        return " ".join(parts)


@dataclass(frozen=True)
class MapsNeeded:
    """A store of maps of A that trainings or tests need.

    Attributes:
        target: "label": maps of the score of the true class; "class_weighted": maps of all classes,
            weighted by A's probabilities of the image, for which no label is needed.
        part: Whose images are explained: those of the training or of the test part.
    """

    target: Literal["label", "class_weighted"] = "label"
    part: Literal["train", "test"] = "train"


class Files(Protocol):
    """Files beside the state of a training, for what is too large for it."""

    def write(self, name: str, content: bytes) -> None:
        """Keep a file, whole or not at all."""

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises:
            FileNotFoundError: There is no such file.
        """

    def delete(self, name: str) -> None:
        """Delete a file; one that is absent is fine."""


def _no_classifier() -> Classifier:
    raise ValueError("this training was given no classifier A")


def _no_maps() -> tuple[np.ndarray, float | np.ndarray]:
    raise ValueError("this training was given no maps")


@dataclass(frozen=True)
class Bench:
    """What one training has at hand.

    Attributes:
        data: The data set; training and validation part are of its training images.
        split: Which images belong to which part.
        model: The settings of A's architecture.
        training: The settings of the loop.
        learning_rate: Of this training, the candidate's factor applied.
        batch_size: Images of a global batch.
        seed: Of everything that is drawn.
        augmentation: Of images and maps.
        candidate: The point of the approach's search that is trained.
        attribution: Makes the maps: the approach's own or the experiment's.
        map_scale: How maps are scaled, "std", "max_abs" or "raw" (setting maps.scale).
        loop: How the training is executed.
        memory_bytes: For batches of masked images.
        classifier: Returns the repeat's trained A, which is to be left as it is.
        maps: Returns the maps of the training images, float32 (N, C, H, W), and the factor, or one
            for each image (N,), that they are still to be multiplied by.
        files: For what a training keeps beside its state; None where it cannot be resumed.
    """

    data: Dataset
    split: Split
    model: ModelSettings
    training: TrainingSettings
    learning_rate: float
    batch_size: int
    seed: int
    augmentation: AugmentationSettings = AugmentationSettings()
    candidate: Candidate = Candidate()
    attribution: AttributionSettings = field(
        default_factory=lambda: attribution.parse({"method": "partition"}))
    map_scale: str = "std"
    loop: LoopArguments = LoopArguments()
    memory_bytes: int = 2**29
    classifier: Callable[[], Classifier] = _no_classifier
    maps: Callable[[], tuple[np.ndarray, float | np.ndarray]] = _no_maps
    files: Files | None = None

    def parts(self, maps: Any = None, scale: float | np.ndarray = 1.0, *, pending: bool = False
              ) -> TrainingData:
        """Return training and validation part on the device; see `training.device_parts`."""
        return device_parts(self.data, self.split, self.training, self.loop.device, maps, scale,
                            pending=pending)

    def fit(self, model: nn.Module, loss: Loss, parts: TrainingData | None = None, *,
            validation_loss: Loss | None = None, between: BetweenEpochs | None = None) -> FitResult:
        """Train a model by a loss; afterwards it has the weights of its best epoch.

        Args:
            model: The network; it is moved to the device of the training, in its dtype.
            loss: What is minimised; see `training.losses`.
            parts: Training and validation part. None: images and labels, without maps.
            validation_loss: For the validation part. None: the loss itself.
            between: Work between two epochs, see `training.loop.BetweenEpochs`.

        Raises:
            ResumeError: The state of an interrupted training cannot be used.
        """
        model.to(self.loop.device, dtype_of(self.training))
        return fit_best(
            model, loss, self.parts() if parts is None else parts, self.training,
            learning_rate=self.learning_rate, batch_size=self.batch_size, seed=self.seed,
            augmentation=self.augmentation, validation_loss=validation_loss, between=between,
            load=self.loop.load, save=self.loop.save, on_epoch=self.loop.on_epoch,
            rank=self.loop.rank, world_size=self.loop.world_size)


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        model: The network on the device, with the weights of its best epoch.
        fit: The history of the training.
        approach: The approach as the checkpoint holds it.
        map_scale: What the network's maps are multiplied by to be in the attribution's units; None
            where it makes none, or each training map had a scale of its own.
        best: Metrics of the model that stand for those of the best epoch; None: those of `fit`.
        extra: Further numbers of the result.
    """

    model: nn.Module
    fit: FitResult
    approach: Approach
    map_scale: float | None = None
    best: Mapping[str, float] | None = None
    extra: Mapping[str, float] = field(default_factory=dict)


class Approach(ApproachSettings, abc.ABC):
    """A way to make a classifier: the fields are its settings, the methods what it does.

    An approach that needs maps may have a field `attribution`, which then makes its maps instead of
    the experiment's attribution.

    Attributes:
        network: The class of its trained model.
        makes_maps: Whether its model makes maps in its forward pass (`with_maps`).
        networks: How many networks of A's size a forward pass for its scores runs through, about.
        uses_classifier: Whether its training starts from the repeat's A.
        explains_itself: Whether its training makes maps of the network that is being trained.
    """

    network: ClassVar[type[nn.Module]]
    makes_maps: ClassVar[bool] = False
    networks: ClassVar[int] = 2
    uses_classifier: ClassVar[bool] = True
    explains_itself: ClassVar[bool] = False

    # ---- the plan

    @property
    def own_attribution(self) -> AttributionSettings | None:
        """The attribution of its own that makes its maps; None: the experiment's, or no maps."""
        own: AttributionSettings | None = getattr(self, "attribution", None)
        return own

    def candidates(self) -> list[Candidate]:
        """Return what is searched; one candidate: nothing is."""
        return [Candidate()]

    def point(self, learning_rate: float, batch_size: int, candidate: Candidate
              ) -> tuple[float, int]:
        """Return the learning rate and the batch size by which a candidate is trained.

        Args:
            learning_rate: The one that the grid selected for A.
            batch_size: The one that the grid selected for A.
            candidate: One of `candidates`.
        """
        return learning_rate * candidate.learning_rate_factor, batch_size

    def maps_needed(self) -> list[MapsNeeded]:
        """Return the stores of maps that its trainings and tests need in a repeat."""
        return []

    def described(self) -> dict[str, Any]:
        """Return what a network depends on, as plain data, without the point and the maps."""
        return self.model_dump(mode="json", exclude=set(SEARCHED))

    def recipe_extra(self, seed: int) -> dict[str, float | str]:
        """Return what a network depends on beside settings, data, maps, A and the seed.

        Args:
            seed: Of the training.
        """
        return {}

    def maps_in_training(self, images: int, epochs: int) -> int:
        """Return how many maps one training makes itself.

        Args:
            images: Number of images of the training part.
            epochs: Number of epochs, at most.
        """
        return 0

    def explains(self, model: ModelSettings, data: Dataset, seed: int) -> nn.Module:
        """Return what the maps of `maps_in_training` explain, freshly built: images to scores."""
        raise NotImplementedError(f"trainings of {self.kind} make no maps")

    def without_maps_in_training(self) -> Self:
        """Return the same approach, but for maps in training, to measure the rest of its time."""
        return self

    def check(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int]) -> None:
        """Check, before anything starts, that the approach can be had for a model and images.

        Raises:
            ValueError: It cannot; the message says why.
        """

    def role(self, experiment_attribution: AttributionSettings) -> Role:
        """Return what the approach is in the comparison.

        Args:
            experiment_attribution: The attribution of the experiment.
        """
        return Role("other", len(self.candidates()))

    # ---- the work

    @abc.abstractmethod
    def train(self, bench: Bench) -> Trained:
        """Build the network, train it and return it with its best epoch's weights."""

    @abc.abstractmethod
    def rebuild(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int],
                channels: int | None) -> nn.Module:
        """Build the network with any weights, for a checkpoint, without asking a hub or a file.

        Args:
            model: The settings of A's architecture.
            num_classes: Number of classes K.
            image_size: Native (height, width) in pixels.
            channels: Of its maps, as `map_channels` told when it was saved.
        """

    def map_channels(self, model: nn.Module) -> int | None:
        """Return the channels of the maps that a trained model makes by a decoder, or None."""
        return None


class TunedApproach(Approach):
    """An approach whose learning rate and batch size can be set; by default they are A's."""

    learning_rate: LearningRate | None = Field(None, description="None: the one selected for A")
    batch_size: BatchSize | None = Field(None, description="None: the one selected for A")

    def point(self, learning_rate: float, batch_size: int, candidate: Candidate
              ) -> tuple[float, int]:
        """Return the learning rate and the batch size of a candidate, its own or A's."""
        return super().point(self.learning_rate or learning_rate, self.batch_size or batch_size,
                             candidate)
