"""Explaining a user's own model on their images, without an experiment: one store of maps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch

from impactx.datasets import Dataset
from impactx.experiment.model_source import (
    CheckpointSource,
    ImportSource,
    ModelSource,
    OpenedModel,
    TimmSource,
    check_scores,
    open_source,
)
from impactx.experiment.preparation import absolute_path, check_attribution, opened, workplace
from impactx.experiment.steps.maps import Maps, MapsResult
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import Attribution
from impactx.explain.maps.reading import store_at
from impactx.explain.maps.sheet import check_sheet, draw_sheet
from impactx.explain.maps.store import MapStore, StoreError
from impactx.results.records import EXPLAINED
from impactx.run.executor import Executor, Task
from impactx.run.tracker import RunIdentity
from impactx.settings import DatasetSettings, ExplainSettings, ModelSettings
from impactx.timing import Progress

log = logging.getLogger("impactx")
# An attribution that needs no more evaluations is tried on one image before anything starts.
CHEAP = 400


@dataclass(frozen=True)
class ModelChoice:
    """Which model is explained: exactly one of these is given.

    Attributes:
        checkpoint: Path of a checkpoint of impactx.
        timm: Settings with a timm model's name.
        path: package.module:function that returns a torch module.
    """

    checkpoint: str | None = None
    timm: ModelSettings | None = None
    path: str | None = None

    def source(self, data: Dataset) -> ModelSource:
        """Return the choice as the source that travels to every process."""
        if self.checkpoint is not None:
            return CheckpointSource(path=absolute_path(self.checkpoint))
        if self.timm is not None:
            settings = self.timm
            if settings.weights not in ("hub", "random"):
                settings = settings.model_copy(
                    update={"weights": absolute_path(settings.weights)})
            return TimmSource(model=settings, num_classes=data.num_classes,
                              image_size=data.image_size)
        return ImportSource(path=self.path or "", folder=str(Path.cwd()))


@dataclass(frozen=True)
class Explained:
    """A store of maps that is to be made, or was: its step, where it is made, and the images."""

    step: Maps
    place: Workplace
    data: Dataset

    @property
    def address(self) -> str:
        """Where the store lies."""
        return self.place.artifacts.storage.uri(self.step.folder)

    def store(self) -> MapStore:
        """Return the store, for reading.

        Raises:
            StoreError: There is none, or it is another's.
        """
        return MapStore.open(self.place.artifacts.storage, self.step.folder, self.step.key)

    def finished(self) -> bool:
        """Return whether every shard and the result are there."""
        return self.place.artifacts.result(self.step) is not None and self.step.complete(self.place)


def prepare(settings: ExplainSettings, choice: ModelChoice, sheet: str | Path | None = None
            ) -> Explained:
    """Open and check images, attribution, model and storage.

    Args:
        settings: Of the job.
        choice: The model.
        sheet: Where examples are drawn; None for nowhere.

    Raises:
        ConfigurationError, DataError, StepError, StorageError, SheetError: Something is wrong;
            nothing was computed.
    """
    if sheet is not None:
        check_sheet(sheet)
    place, attribution = workplace(settings), settings.attribution
    place.artifacts.storage.check()
    check_attribution(attribution)
    dataset = _whole(settings.dataset)
    if dataset.path:
        dataset = dataset.model_copy(update={"path": absolute_path(dataset.path)})
    data = opened(dataset, place)
    check_attribution(attribution, data)
    source = choice.source(data)
    model = open_source(source, place)
    pixels = torch.from_numpy(np.array(data.train.images[:1])).permute(0, 3, 1, 2).float() / 255
    scores = check_scores(model.module, pixels, data.num_classes, source)
    if scores > data.num_classes:
        log.warning("the model has %d scores and the images %d classes: label k is taken for score "
                    "k", scores, data.num_classes)
    maker = cast(Attribution, attribution)
    if (maker.evaluations(data.image_size) or 0) <= CHEAP:
        maker.explain(model.module, data.train.images[:1], data.train.labels[:1])
    return Explained(_step(settings, dataset, data, source, model), place, data)


def _whole(dataset: DatasetSettings) -> DatasetSettings:
    """Return the data set with all its images as training images.

    A share that an experiment draws for its test would be missed among the maps of somebody's
    folder. It is left out where test_fraction is set: then these are the images, and so the store,
    of an experiment with that setting. Of the embedded digits, which nobody brings along, the
    experiments' share is explained; a data set with a test part of its own is the same in both.
    """
    if dataset.source.kind == "digits" or "test_fraction" in dataset.model_fields_set:
        return dataset
    return dataset.model_copy(update={"test_fraction": None})


def _step(settings: ExplainSettings, dataset: DatasetSettings, data: Dataset, source: ModelSource,
          model: OpenedModel) -> Maps:
    return Maps(
        name=f"maps of {source}", dataset_name=dataset.name, model_name=str(source),
        weights=model.weights, data=data.fingerprint, explained=model.explained,
        attribution=settings.attribution, source=source, dataset=dataset,
        shard_size=settings.maps.shard_size)


def plan(settings: ExplainSettings, job: Explained) -> str:
    """Return what would be made, and what of it is there: for --dry-run."""
    images, shards = len(job.data.train), -(-len(job.data.train) // settings.maps.shard_size)
    try:
        store = job.store()
        shards, missing = store.spec.shards, len(store.missing())
    except StoreError:
        missing = shards
    size = job.data.image_size
    a_map = cast(Attribution, settings.attribution).evaluations(size) or 0
    return "\n".join([
        job.step.name,
        f"  images:      {images} of {job.data.name}, {size[0]}x{size[1]}, "
        f"{job.data.num_classes} classes, from {job.data.source}",
        f"  attribution: {settings.attribution.method}, {a_map:,} evaluations a map, "
        f"{a_map * images:,} in all",
        f"  store:       {job.address}",
        f"  shards:      {shards}, of which {shards - missing} are there already"])


def make(job: Explained, executor: Executor) -> MapsResult:
    """Make the maps that are missing; return the store's result."""
    progress = Progress("maps", "maps", every=5)

    def on_maps(made: int, before: int, total: int) -> None:
        progress.at(before + made, before=before, total=total)

    identity = RunIdentity(key=f"explain/{job.step.key}", name=job.step.name, parent="explain",
                           parameters={}, tags={})
    return executor.explain(Task(job.step, identity), on_maps)


def run(job: Explained, executor: Callable[[], Executor]) -> str:
    """Make what is missing; return where the maps are.

    Args:
        job: What is to be made.
        executor: Called only where there is something to do.
    """
    storage = job.place.artifacts.storage
    # No job's journal names the store: the note keeps it from being taken for a leftover.
    storage.write_json(f"{EXPLAINED}/{job.step.key}.json", {"name": job.step.name})
    result = job.place.artifacts.result(job.step) if job.finished() else None
    if result is not None:
        log.info("all maps are there already")
    else:
        result = make(job, executor())
        storage.sweep(job.step.folder)
    gap = "" if result.map_gap_mean is None else (
        f", they miss f(image) - f(base) by {result.map_gap_mean:.1e} of their size on average")
    return f"{result.images} maps in {result.shards} shards{gap}\nstore: {job.address}"


def verify(address: str) -> list[str]:
    """Read the whole store at an address; return one message for each problem.

    Args:
        address: A folder or s3://bucket/...

    Raises:
        StoreError: There is no store.
    """
    return store_at(address).verify()


def examples(job: Explained, count: int, seed: int = 0) -> np.ndarray:
    """Return indices of training images for a sheet, int64 (count,): the classes take turns."""
    labels, rng = job.data.train.labels, np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)  # how many of its class come before
    for label in np.unique(labels):
        mine = labels[shuffled] == label
        turn[mine] = np.arange(mine.sum())
    return shuffled[np.lexsort((labels[shuffled], turn))][:count]


def draw(job: Explained, path: str | Path, count: int) -> None:
    """Write a sheet of `count` examples of a finished store as PNG.

    Raises:
        StoreError: The store cannot be read.
        SheetError: The file cannot be written.
    """
    chosen = np.sort(examples(job, count))
    maps = job.place.map_array(job.store(), job.data)[chosen]
    train = job.data.train
    draw_sheet(path, train.images[chosen], maps,
               [job.data.class_names[k] for k in train.labels[chosen]],
               title=f"{job.step.attribution.method} of the true class: {job.step.name}")
