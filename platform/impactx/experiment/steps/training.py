"""Training a network: a trial of a search, or a final model that goes on to the test."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from impactx.approaches.base import SEARCHED, Approach, Bench, Candidate, Trained
from impactx.approaches.checkpoint import save_checkpoint
from impactx.datasets import Dataset, Split, make_split
from impactx.experiment.artifacts import CHECKPOINT, OWNER, RUNNING
from impactx.experiment.ownership import Ownership
from impactx.experiment.steps.base import (
    OUTSIDE_KEY,
    Context,
    Record,
    Result,
    Slot,
    Step,
    StepError,
    local_file,
)
from impactx.experiment.workplace import Workplace
from impactx.explain.maps.scale import map_scale
from impactx.explain.maps.store import MapStore
from impactx.models import Classifier, weights_fingerprint
from impactx.settings import (
    AugmentationSettings,
    DatasetSettings,
    ModelSettings,
    TrainingSettings,
)
from impactx.settings.extensions import AnyApproach, AnyAttribution
from impactx.storage import Storage
from impactx.timing import duration
from impactx.training.loop import LoopArguments, ResumeError, precision_of
from impactx.version import Environment, environment

log = logging.getLogger("impactx")
STOPPED_TAG = {"impactx.stopped": "asha"}


class Network(Record):
    """What a classifier is built from; weights are `random`, `hub`, or the content of a file.

    See `ModelSettings`.
    """

    architecture: str
    weights: str
    weights_match: str
    input_size: int | None
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


class SplitRecipe(Record):
    """How training images are split: see `datasets.make_split`."""

    fraction: float
    common_fraction: float
    seed: int


class ModelRef(Record):
    """A trained model: the fingerprint of its weights, and the folder of the step that left it."""

    weights: str
    folder: Annotated[str, OUTSIDE_KEY]


class MapsRef(Record):
    """A store of maps: the key and the folder of the step that makes it."""

    key: str
    folder: Annotated[str, OUTSIDE_KEY]


class Halving(Record):
    """By what asynchronous successive halving (Li et al. 2018) stops trials of a search early.

    Attributes:
        metric: Of each epoch, by which trials are compared.
        grace_epochs: Before so many epochs no trial is stopped.
        reduction: Of the trials that came to a rung, about one in so many goes on.
        epochs: At most so many does a trial train.
        points: Fingerprint of all points of the search.
    """

    metric: str
    grace_epochs: int
    reduction: float
    epochs: int
    points: str


class TrainingResult(Result):
    """What a training left.

    Attributes:
        best: Metrics of the best epoch; None where the first epoch diverged.
        best_epoch: Counted from 1; 0 where there is none.
        epochs: How many were trained.
        history: Metrics of each epoch.
        diverged: Whether the loss became infinite or no number.
        weights: Fingerprint of the best epoch's weights; None where they were not kept.
        train_images, validation_images: Sizes of both parts.
        seconds: Of all epochs, in all processes that continued the training.
        seconds_this_process: From its beginning, everything included.
        stopped: Whether its search ended the training early.
        extra: Further numbers of the approach.
        fallback: Why it was trained in float32 where bfloat16 was asked for; None where it was not.
    """

    best: dict[str, float | None] | None
    best_epoch: int
    epochs: int
    history: list[dict[str, float | None]]
    diverged: bool
    weights: str | None
    train_images: int
    validation_images: int
    seconds_this_process: float
    stopped: bool = False
    extra: dict[str, float] = {}
    fallback: str | None = None

    def metrics(self) -> dict[str, float]:
        """Return the best epoch's metrics and the costs."""
        best = {name: value for name, value in (self.best or {}).items()
                if name not in ("epoch", "seconds") and value is not None}
        return {f"best_{name}": value for name, value in best.items()} | {
            "best_epoch": self.best_epoch, "epochs": self.epochs, "train_seconds": self.seconds,
            "diverged": float(self.diverged)}

    def score(self, metric: str) -> float:
        """Return a metric of the best epoch; NaN where there is none."""
        value = (self.best or {}).get(metric)
        return math.nan if value is None else value


class Training(Step[TrainingResult]):
    """One training by one configuration.

    Attributes:
        data: Fingerprint of the data set's contents.
        attribution: Makes maps within the training; None where the training makes none.
        classifier: The repeat's A, where the approach starts from it.
        maps: The store that the training learns from; None where it learns from none.
        test_maps: The store of the test images' maps, where the model must be given them.
        dataset, model: What opens the data set and builds the network in a process.
    """

    result_type: ClassVar[type[Result]] = TrainingResult

    stage: Annotated[int, OUTSIDE_KEY]
    data: str
    augmentation: AugmentationSettings
    network: Network
    training: TrainingSettings
    split: SplitRecipe
    seed: int
    learning_rate: float
    batch_size: int
    approach: AnyApproach
    candidate: Candidate = Candidate()
    attribution: AnyAttribution | None = None
    classifier: ModelRef | None = None
    maps: MapsRef | None = None
    map_scale: str | None = None
    test_maps: Annotated[MapsRef | None, OUTSIDE_KEY] = None
    dataset: Annotated[DatasetSettings, OUTSIDE_KEY]
    model: Annotated[ModelSettings, OUTSIDE_KEY]
    maps_attribution: Annotated[AnyAttribution, OUTSIDE_KEY]

    keeps_weights: ClassVar[bool] = True

    def code_roots(self) -> set[str]:
        """See `Step.code_roots`: the approach's own file, and what reads the images, count."""
        return super().code_roots() | {
            kind for part in (self.approach, self.attribution, self.dataset.source)
            if part is not None and (kind := type(part).__module__)}

    def parameters(self) -> dict[str, Any]:
        """See `Step.parameters`."""
        c = self.candidate
        return super().parameters() | {
            "stage": self.stage, "seed": self.seed, "learning_rate": self.learning_rate,
            "batch_size": self.batch_size, "validation_fraction": self.split.fraction} | (
            {} if c.weight is None else {"lambda": c.weight}) | (
            {} if c.learning_rate_factor == 1 else {
                "learning_rate_factor": c.learning_rate_factor}) | (
            {} if self.maps is None else {"maps": self.maps.key}) | (
            {} if self.map_scale is None else {"map_scale": self.map_scale}) | (
            {} if not self._settings() else {"settings": self._settings()}
            ) | self.method.recipe_extra(self.seed)

    def _settings(self) -> dict[str, Any]:
        """Return the approach's settings that are not its defaults, but for what is searched."""
        settings: dict[str, Any] = self.approach.model_dump(
            mode="json", exclude_defaults=True, exclude={"kind", *SEARCHED})
        return settings

    @property
    def method(self) -> Approach:
        """The approach, as what trains."""
        if not isinstance(self.approach, Approach):
            raise StepError(f"{self.name}: {self.approach.kind} has no training: an approach is a "
                            "subclass of impactx.approaches.base.Approach")
        return self.approach

    def inputs(self) -> dict[str, str]:
        """See `Step.inputs`."""
        parts = {"classifier": self.classifier, "maps": self.maps, "test_maps": self.test_maps}
        return {name: part.folder for name, part in parts.items() if part is not None}

    def describe(self, result: TrainingResult) -> str:
        """See `Step.describe`."""
        if result.best is None:
            return "diverged in its first epoch"
        said = f"; in float32, it cannot run in bfloat16 ({result.fallback})" if (
            result.fallback) else ""
        return (f"validation accuracy {result.score('val_accuracy'):.4f} at epoch "
                f"{result.best_epoch} of {result.epochs}, in {duration(result.seconds)}{said}")

    def tags(self, result: TrainingResult, storage: Storage) -> dict[str, str]:
        """See `Step.tags`."""
        stopped = STOPPED_TAG if result.stopped else {}
        return stopped if result.weights is None else stopped | {
            "impactx.weights": result.weights,
            "impactx.checkpoint": storage.uri(f"{self.folder}/{CHECKPOINT}")}

    def placeholder(self) -> TrainingResult:
        """See `Step.placeholder`: weights that nobody has."""
        return TrainingResult(
            seconds=0, best={"val_accuracy": 0.0, "val_loss": 0.0, "common_accuracy": 0.0},
            best_epoch=1, epochs=1, history=[], diverged=False, weights=f"of {self.folder}",
            train_images=0, validation_images=0, seconds_this_process=0)

    def split_of(self, data: Dataset) -> Split:
        """Return the split into training and validation part."""
        return make_split(
            data.train.labels, self.split.fraction, class_names=data.class_names,
            common_fraction=self.split.common_fraction, seed=self.split.seed)

    def execute(self, context: Context) -> TrainingResult:
        """Train, from where an earlier try stopped; rank 0 keeps the result.

        Raises:
            StepError: The data are others than the plan's, or the state of an earlier try is
                damaged.
            TakenOver: Another process has begun the same training since.
        """
        place, artifacts = context.place, context.place.artifacts
        torch.set_num_threads(place.threads)
        if (finished := artifacts.result(self)) is not None:
            return finished
        data = place.dataset(self.dataset, self.data)
        split, started = self.split_of(data), time.perf_counter()
        running, storage = f"{self.folder}/{RUNNING}", artifacts.storage
        owner = None if context.rank else Ownership(storage, f"{self.folder}/{OWNER}", self.name)

        def save(state: bytes) -> None:
            if owner is not None:
                owner.check()
            storage.write(running, state)

        def load() -> bytes | None:
            try:
                return storage.read(running)
            except FileNotFoundError:
                return None

        loop = LoopArguments(device=context.device, load=load, save=save, rank=context.rank,
                             world_size=context.world_size, on_epoch=context.on_epoch)
        try:
            trained = self.method.train(self._bench(context, data, split, loop))
        except ResumeError as error:
            raise StepError(f"{self.name}: {storage.uri(running)}: {error}; delete the file, this "
                            "training then starts anew") from error
        keep = self.keeps_weights or self.training.keep_trial_weights
        weights, files = None, {}
        if keep and trained.fit.best_state is not None and not trained.fit.stopped:
            trained.model.to("cpu")
            weights = weights_fingerprint(trained.model)
            files[CHECKPOINT] = save_checkpoint(
                trained.model, model_settings=self.model, approach=trained.approach,
                class_names=list(data.class_names), map_scale=trained.map_scale,
                weight=self.candidate.weight, extra={"step": self.key})
        result = self._result(trained, weights, split, time.perf_counter() - started, environment(
            context.device, precision_of(self.training, torch.device(context.device)),
            workers=context.world_size, compiled=self.training.compile == "always"))
        if owner is None:
            return result
        if (finished := artifacts.result(self)) is not None:
            return finished  # of another process, whose files belong together
        owner.check()
        if trained.fit.stopped:
            self.keep_stopped(context, result)
            owner.release()
            return result
        artifacts.finish(self, result, files)
        return result

    def keep_stopped(self, context: Context, result: TrainingResult) -> None:
        """Keep how far a training was that was stopped; only trials are."""

    def _bench(self, context: Context, data: Dataset, split: Split, loop: LoopArguments) -> Bench:
        place = context.place
        return Bench(
            data=data, split=split, model=self.model, training=self.training,
            learning_rate=self.learning_rate, batch_size=self.batch_size, seed=self.seed,
            augmentation=self.augmentation, candidate=self.candidate,
            attribution=self.attribution or self.maps_attribution,
            map_scale=self.map_scale or "std",
            loop=loop, memory_bytes=place.memory_bytes,
            classifier=partial(self._classifier, context),
            maps=partial(self._maps, context, data, split),
            files=StepFiles(place.artifacts.storage, self.folder))

    def _classifier(self, context: Context) -> Classifier:
        if self.classifier is None:
            raise StepError(f"{self.name}: it starts from no classifier A")
        model = context.place.checkpoint(self.classifier.folder, self.classifier.weights).model
        if not isinstance(model, Classifier):
            raise StepError(f"{self.name}: {self.classifier.folder} holds no classifier A")
        return model

    def _maps(self, context: Context, data: Dataset, split: Split
              ) -> tuple[np.ndarray, float | np.ndarray]:
        """Return the training maps and the factor(s) by which they are multiplied."""
        if self.maps is None:
            raise StepError(f"{self.name}: it learns from no maps")
        place = context.place
        store = MapStore.open(place.artifacts.storage, self.maps.folder, self.maps.key)
        maps = place.map_array(store, data)
        return maps, map_scale(maps, split.train, self.map_scale or "std")

    def _result(self, trained: Trained, weights: str | None, split: Split, seconds: float,
                computed_in: Environment) -> TrainingResult:
        fit = trained.fit
        best = trained.best or (fit.best if fit.best_epoch else None)
        return TrainingResult(
            best=best and _finite(best), best_epoch=fit.best_epoch, epochs=len(fit.history),
            history=[_finite(row) for row in fit.history], diverged=fit.diverged, weights=weights,
            train_images=len(split.train), validation_images=len(split.validation),
            seconds=math.fsum(row["seconds"] for row in fit.history),
            seconds_this_process=seconds, stopped=fit.stopped, extra=dict(trained.extra),
            environments=(computed_in,), fallback=fit.fallback)


class Trial(Training):
    """A training of a search. Its metrics are kept, its weights only where a setting says so."""

    kind: ClassVar[str] = "trial"
    slot: ClassVar[Slot] = "trial"
    title: ClassVar[str] = "trials"
    keeps_weights: ClassVar[bool] = False

    halving: Annotated[Halving | None, OUTSIDE_KEY] = None

    def keep_stopped(self, context: Context, result: TrainingResult) -> None:
        """See `Training.keep_stopped`."""
        context.place.artifacts.stop(self, result)


class Model(Training):
    """The training of a selected configuration in one repeat; its checkpoint is kept."""

    kind: ClassVar[str] = "model"
    slot: ClassVar[Slot] = "training"
    title: ClassVar[str] = "final trainings"

    def files(self, place: Workplace, folder: Path, result: TrainingResult | None) -> list[Path]:
        """See `Step.files`: the split, and once the training is finished the checkpoint."""
        split = self.split_of(place.dataset(self.dataset, self.data))
        np.savez_compressed(folder / "split.npz", train=split.train, validation=split.validation,
                            common=split.common)
        files = [*super().files(place, folder, result), folder / "split.npz"]
        storage, checkpoint = place.artifacts.storage, f"{self.folder}/{CHECKPOINT}"
        if result is not None and storage.exists(checkpoint):
            files.append(local_file(storage, checkpoint, folder))
        return files

    def ref(self, result: TrainingResult) -> ModelRef:
        """Return what other steps name the trained model by.

        Raises:
            StepError: The training diverged and left no weights.
        """
        if result.weights is None:
            raise StepError(f"{self.name} diverged in its first epoch: it left no weights")
        return ModelRef(weights=result.weights, folder=self.folder)


class StepFiles:
    """Files in a step's folder, for an approach that keeps some beside the training's state."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage, self.folder = storage, folder

    def write(self, name: str, content: bytes) -> None:
        """Write a file whole; see `Storage.write`."""
        self.storage.write(f"{self.folder}/{name}", content)

    def read(self, name: str) -> bytes:
        """Return a file's content; see `Storage.read`."""
        return self.storage.read(f"{self.folder}/{name}")

    def delete(self, name: str) -> None:
        """Delete a file, if it is there; see `Storage.delete`."""
        self.storage.delete(f"{self.folder}/{name}")


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no infinite numbers: they become None."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
