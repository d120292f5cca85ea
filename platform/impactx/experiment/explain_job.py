"""Explaining a model of the user's on images of theirs, without an experiment around it: one store of maps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impactx.datasets import Dataset
from impactx.experiment.executor import Executor, Task
from impactx.experiment.model_source import check_scores, describe, open_source
from impactx.experiment.preparation import absolute_path, check_attribution, opened, workplace
from impactx.experiment.units import Unit
from impactx.experiment.work import maps_complete
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import build_attribution
from impactx.explain.reading import store_at
from impactx.explain.sheet import check_sheet, draw_sheet
from impactx.explain.store import MapStore, StoreError
from impactx.settings import DatasetSettings, ExplainSettings, ModelSettings
from impactx.timing import Progress

log = logging.getLogger("impactx")
CHEAP = 400  # evaluations: an attribution that needs no more is tried on one image before anything starts


@dataclass(frozen=True)
class ModelChoice:
    """Which model: one of checkpoint (a path), timm (settings with its name) or path (package.module:function)."""

    checkpoint: str | None = None
    timm: ModelSettings | None = None
    path: str | None = None

    def source(self, data: Dataset) -> dict[str, Any]:
        """The choice as the plain data that travels to every process, see `model_source`."""
        if self.checkpoint is not None:
            return {"kind": "checkpoint", "path": absolute_path(self.checkpoint)}
        if self.timm is not None:
            settings = self.timm.model_dump(mode="json")
            if self.timm.weights not in ("hub", "random"):
                settings["weights"] = absolute_path(self.timm.weights)
            return {"kind": "timm", "model": settings, "num_classes": data.num_classes,
                    "image_size": list(data.image_size)}
        return {"kind": "import", "path": self.path, "folder": str(Path.cwd())}


@dataclass(frozen=True)
class Explained:
    """A store of maps that is to be made, or was: its unit, where it is worked on, and the images."""

    unit: Unit
    place: Workplace
    data: Dataset

    @property
    def address(self) -> str:
        """Where the store lies."""
        return self.place.artifacts.storage.uri(self.unit.folder)

    def store(self) -> MapStore:
        """The store, for reading. Raises StoreError where there is none, or it is another's."""
        return MapStore.open(self.place.artifacts.storage, self.unit.folder, self.unit.key)

    def finished(self) -> bool:
        """True where every shard and the result are there."""
        return self.place.artifacts.result(self.unit) is not None and maps_complete(self.unit, self.place)


def prepare(settings: ExplainSettings, choice: ModelChoice, sheet: str | Path | None = None) -> Explained:
    """Find and check images, attribution, model, storage, and where the maps are drawn: `sheet`, None for nowhere.

    Raises ConfigurationError, DataError, WorkError, StorageError or SheetError before anything is computed.
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
    model, weights, about = open_source(source, place)
    pixels = torch.from_numpy(np.array(data.train.images[:1])).permute(0, 3, 1, 2).float() / 255
    scores = check_scores(model, pixels, data.num_classes, source)
    if scores > data.num_classes:
        log.warning("the model has %d scores and the images %d classes: label k is taken for score k", scores,
                    data.num_classes)
    if (attribution.evaluations(data.image_size) or 0) <= CHEAP:
        build_attribution(attribution).explain(model, data.train.images[:1], data.train.labels[:1])
    return Explained(_unit(settings, dataset, data, source, weights, about), place, data)


def _whole(dataset: DatasetSettings) -> DatasetSettings:
    """The data set with all its images as training images, where no test part of its own says which are not.

    A share that an experiment draws for its test would be missed among the maps of somebody's folder. It is left out
    where test_fraction is set: then these are the images, and so the store, of an experiment with that setting. Of the
    embedded digits, which nobody brings along, the experiments' share is explained; a data set with a test part is the
    same in both.
    """
    if dataset.source.kind == "digits" or "test_fraction" in dataset.model_fields_set:
        return dataset
    return dataset.model_copy(update={"test_fraction": None})


def _unit(settings: ExplainSettings, dataset: DatasetSettings, data: Dataset, source: Mapping[str, Any], weights: str,
          about: dict[str, Any]) -> Unit:
    described = settings.attribution.described()
    return Unit("maps", f"maps of {describe(source)}",
                {"weights": weights, "data": data.fingerprint, "model": about, "attribution": described},
                {"dataset": dataset.model_dump(mode="json"), "source": dict(source), "attribution": described,
                 "shard_size": settings.maps.shard_size})


def plan(settings: ExplainSettings, job: Explained) -> str:
    """What would be made, and what of it is there: for --dry-run."""
    images, shards = len(job.data.train), -(-len(job.data.train) // settings.maps.shard_size)
    try:
        store = job.store()
        shards, missing = store.spec.shards, len(store.missing())
    except StoreError:
        missing = shards
    a_map = settings.attribution.evaluations(job.data.image_size) or 0
    return "\n".join([
        f"{job.unit.name}", f"  images:      {images} of {job.data.name}, {job.data.image_size[0]}x"
        f"{job.data.image_size[1]}, {job.data.num_classes} classes, from {job.data.source}",
        f"  attribution: {settings.attribution.method}, {a_map:,} evaluations a map, {a_map * images:,} in all",
        f"  store:       {job.address}", f"  shards:      {shards}, of which {shards - missing} are there already"])


def make(job: Explained, executor: Executor) -> dict[str, Any]:
    """Make the maps that are missing; returns the store's result (images, maps_per_second, folder, ...)."""
    progress = Progress("maps", "maps", every=5)

    def on_shards(done: int, before: int, total: int) -> None:
        progress.at(before + done, before=before, total=total)

    return executor.explain(Task(job.unit, f"explain/{job.unit.key}", "explain", {}), on_shards)


def run(job: Explained, executor: Callable[[], Executor]) -> str:
    """Make what is missing; says where the maps are. executor: called only where there is something to do."""
    if job.finished():
        result = job.place.artifacts.result(job.unit) or {}
        log.info("all maps are there already")
    else:
        result = make(job, executor())
        job.place.artifacts.storage.sweep(job.unit.folder)
    gap = f", they miss f(image) - f(base) by {result['map_gap_mean']:.1e} of their size on average" \
        if result.get("map_gap_mean") is not None else ""
    return f"{result['images']} maps in {result['shards']} shards{gap}\nstore: {job.address}"


def verify(address: str) -> list[str]:
    """Read the whole store at an address (a folder or s3://bucket/...); one message for each problem.

    Raises StoreError where there is no store.
    """
    return store_at(address).verify()


def examples(job: Explained, count: int, seed: int = 0) -> np.ndarray:
    """Indices of training images for a sheet: drawn with a seed, the classes in turn, int64 (count,)."""
    labels, rng = job.data.train.labels, np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)  # how many of its class come before
    for label in np.unique(labels):
        mine = labels[shuffled] == label
        turn[mine] = np.arange(mine.sum())
    return shuffled[np.lexsort((labels[shuffled], turn))][:count]


def draw(job: Explained, path: str | Path, count: int) -> None:
    """Write a sheet of `count` examples of a finished store as PNG. Raises StoreError, SheetError."""
    chosen = np.sort(examples(job, count))
    maps = job.place.map_array(job.store(), job.data)[chosen]
    train = job.data.train
    draw_sheet(path, train.images[chosen], maps, [job.data.class_names[k] for k in train.labels[chosen]],
               title=f"{job.unit.recipe['attribution']['method']} of the true class: {job.unit.name}")
