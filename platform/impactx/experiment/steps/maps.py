"""Making maps: one for every image of a part of a data set, in a store of shards."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch

from impactx.datasets import Dataset
from impactx.datasets.entry import ImageSet
from impactx.experiment.model_source import ModelSource, open_model
from impactx.experiment.steps.base import (
    OUTSIDE_KEY,
    Context,
    Record,
    Result,
    Slot,
    Step,
    StepError,
)
from impactx.experiment.workplace import Workplace
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.attribution import Attribution
from impactx.explain.maps.store import PRECISION_ERROR, MapStore, StoreError, StoreSpec
from impactx.explain.scores import completeness_gaps
from impactx.explain.weighted import explain_by_own_probabilities
from impactx.settings import DatasetSettings
from impactx.settings.extensions import AnyAttribution, approach
from impactx.storage import Storage
from impactx.timing import duration
from impactx.version import Environment, environment

log = logging.getLogger("impactx")
Target = Literal["label", "class_weighted"]
Part = Literal["train", "test"]


class ExplainedModel(Record):
    """What the maps depend on beside a model's weights: what is built around them.

    `code` is the fingerprint of a user's own module; see `model_source`.
    """

    architecture: str | None = None
    input_size: int | None = None
    kind: str | None = None
    code: str | None = None


class MapsResult(Result):
    """What making a store of maps left.

    Attributes:
        images, shards: How many there are.
        shape: Of one map, (C, H, W).
        folder: The store's address.
        seconds: That this job spent.
        maps_made: By this job; an earlier one may have made others.
        maps_per_second: Of this job; None where it made none.
        process_seconds: Of all processes together, for all maps, at the pace of those of this job.
        map_std, map_abs_max: Standard deviation and largest absolute value of a sample of maps.
        map_gap_mean, map_gap_max: How far sampled maps are from summing to score - base value, as a
            share of their absolute sum; None where the attribution has no base value.
        map_precision_error: How far maps are from float32's, of the largest value of a map; None
            where they were made in float32.
    """

    images: int
    shards: int
    shape: tuple[int, ...]
    folder: str
    maps_made: int
    maps_per_second: float | None
    process_seconds: float | None
    map_std: float
    map_abs_max: float
    map_gap_mean: float | None = None
    map_gap_max: float | None = None
    map_precision_error: float | None = None

    def metrics(self) -> dict[str, float]:
        """See `Result.metrics`."""
        return {name if name.startswith("map") else f"maps_{name}": value
                for name, value in super().metrics().items()}


@dataclass(frozen=True)
class ShardReport:
    """One shard is made: its number of maps, and the seconds of the process that made it."""

    shard: int
    maps: int
    seconds: float


class Maps(Step[MapsResult]):
    """The maps of every image of a part, of one model.

    Attributes:
        weights: Fingerprint of the explained model's weights.
        data: Fingerprint of the data set's contents; test: of its test part, where that is
            explained.
        explained: What else the model is.
        target: `label`: of the true class's score. `class_weighted`: of all classes, weighted by
            the model's own probabilities, for which no label is needed.
        source: Where a process opens the model.
        shard_size: Maps a shard.
    """

    kind: ClassVar[str] = "maps"
    slot: ClassVar[Slot] = "maps"
    result_type: ClassVar[type[Result]] = MapsResult
    title: ClassVar[str] = "maps"

    weights: str
    data: str
    test: str = ""
    explained: ExplainedModel
    attribution: AnyAttribution
    target: Target = "label"
    part: Part = "train"
    source: Annotated[ModelSource, OUTSIDE_KEY]
    dataset: Annotated[DatasetSettings, OUTSIDE_KEY]
    shard_size: Annotated[int, OUTSIDE_KEY]

    def code_roots(self) -> set[str]:
        """See `Step.code_roots`: the approach counts whose network is explained, where it is not A.

        A's network counts without the training of A, so that new code that comes to the same
        weights keeps the maps.
        """
        kind, approaches = self.explained.kind, approach.classes()
        return super().code_roots() | {
            type(self.attribution).__module__, type(self.dataset.source).__module__} | (
            {approaches[kind].__module__} if kind in approaches else {
                "impactx.models.classifier"})

    def parameters(self) -> dict[str, Any]:
        """See `Step.parameters`."""
        return super().parameters() | {
            "attribution": self.attribution.described(), "explained_weights": self.weights} | (
            {"target": self.target} if self.target != "label" else {}) | (
            {"part": self.part} if self.part != "train" else {})

    def tags(self, result: MapsResult, storage: Storage) -> dict[str, str]:
        """See `Step.tags`."""
        return {"impactx.maps": result.folder}

    def describe(self, result: MapsResult) -> str:
        """See `Step.describe`."""
        return f"{result.images} maps in {result.shards} shards, in {duration(result.seconds)}"

    def placeholder(self) -> MapsResult:
        """See `Step.placeholder`."""
        return MapsResult(seconds=0, images=0, shards=0, shape=(), folder=self.folder, maps_made=0,
                          maps_per_second=None, process_seconds=None, map_std=0, map_abs_max=0)

    def _data(self, place: Workplace) -> Dataset:
        return place.dataset(self.dataset, self.data, self.test)

    def images_of(self, data: Dataset) -> ImageSet:
        """Return the images that are explained."""
        return data.load_test() if self.part == "test" else data.train

    def open_store(self, place: Workplace) -> MapStore:
        """Return the store, begun if it is not there yet."""
        data = self._data(place)
        return MapStore.create(place.artifacts.storage, self.folder, StoreSpec(
            self.key, len(self.images_of(data)), (data.channels, *data.image_size),
            self.shard_size, self.recipe))

    def complete(self, place: Workplace) -> bool:
        """Return whether the store is this step's and no shard is missing.

        The contents of shards are checked when they are unpacked.
        """
        try:
            return not MapStore.open(place.artifacts.storage, self.folder, self.key).missing()
        except StoreError:
            return False

    def execute(self, context: Context) -> MapsResult:
        """Make all missing shards in this process; an executor may spread them over several."""
        started, maps, seconds = time.perf_counter(), 0, 0.0
        store = self.open_store(context.place)
        before = store.spec.images - sum(len(store.shard_indices(k)) for k in store.missing())
        worker: ShardWorker | None = None
        for shard in store.missing():
            worker = worker or ShardWorker(self, context.place, context.device)
            report = worker.make(shard)
            maps, seconds = maps + report.maps, seconds + report.seconds
            if context.on_maps is not None:
                context.on_maps(maps, before, store.spec.images)
        return self.finish(context.place, time.perf_counter() - started, maps, seconds)

    def finish(self, place: Workplace, seconds: float, made: int, process_seconds: float
               ) -> MapsResult:
        """Check a complete store and keep the result.

        The unpacked array of this node is made on the way, so every shard is read and checked once.

        Args:
            place: Where the store lies.
            seconds: That this job spent.
            made: Maps that this job made.
            process_seconds: Of the processes that made them, added up.

        Raises:
            StepError: Shards are missing.
            StoreError: A shard is damaged.
        """
        store = self.open_store(place)
        if missing := store.missing():
            raise StepError(
                f"{self.name}: {len(missing)} of {store.spec.shards} shards are missing in "
                f"{place.artifacts.storage.uri(self.folder)}: start the same command again")
        maps = place.map_array(store, self._data(place))
        sample = np.asarray(maps[:: max(1, len(maps) // 1000)], np.float64)
        gap_mean, gap_max, precision_error = _sampled(store)
        result = MapsResult(
            images=store.spec.images, shards=store.spec.shards, shape=tuple(store.spec.shape),
            folder=place.artifacts.storage.uri(self.folder), seconds=seconds, maps_made=made,
            maps_per_second=made / seconds if made and seconds > 0 else None,
            process_seconds=process_seconds * store.spec.images / made if made else None,
            map_std=float(sample.std()), map_abs_max=float(np.abs(sample).max()),
            map_gap_mean=gap_mean, map_gap_max=gap_max, map_precision_error=precision_error,
            environments=tuple(map(Environment.model_validate_json, store.environments())))
        place.artifacts.finish(self, result)
        return result


class ShardWorker:
    """Makes shards of a store: model and images are opened once, shards follow."""

    def __init__(self, step: Maps, place: Workplace, device: torch.device | str = "cpu") -> None:
        step.check_code()
        torch.set_num_threads(place.threads)
        keep_freed_memory()
        self.step, self.place, self.device = step, place, torch.device(device)
        self.store = step.open_store(place)
        self.images = step.images_of(place.dataset(step.dataset, step.data, step.test))
        self.model = open_model(step.source, place, step.weights).to(self.device)
        if not isinstance(step.attribution, Attribution):
            raise StepError(f"{step.name}: {step.attribution.method} makes no maps")
        self.attribution = step.attribution
        # Only some attributions have a setting of it; the others run in float32.
        self.environment = environment(
            device, getattr(step.attribution, "precision", "float32"), exact=True)

    def make(self, shard: int) -> ShardReport:
        """Compute and write one shard."""
        started = time.perf_counter()
        rows = self.store.shard_indices(shard)
        # Another worker, or an orphan of a job that was killed, may have been quicker.
        if not self.store.has(shard):
            images, labels = self.images.images[rows], self.images.labels[rows]
            if self.step.target == "class_weighted":
                explanations = explain_by_own_probabilities(
                    self.attribution, self.model, images, device=self.device,
                    memory_bytes=self.place.memory_bytes, indices=rows)
            else:
                explanations = self.attribution.explain(
                    self.model, images, labels, device=self.device,
                    memory_bytes=self.place.memory_bytes, indices=rows)
            self.store.write_shard(shard, labels, explanations, self.environment.model_dump_json())
        return ShardReport(shard, len(rows), time.perf_counter() - started)


def _sampled(store: MapStore) -> tuple[float | None, float | None, float | None]:
    """Return mean and largest completeness gap, and the precision error, of a few shards."""
    gaps, errors = [], []
    for shard in np.unique(np.linspace(0, store.spec.shards - 1, 4).astype(int)):
        table = store.read_shard(int(shard))
        maps = table["map"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        gaps.append(completeness_gaps(maps, table["score"].to_numpy(),
                                      table["base_value"].to_numpy()))
        errors += [float(value) for name, value in (table.schema.metadata or {}).items()
                   if name.decode() == PRECISION_ERROR]
    whole = np.concatenate(gaps)
    mean, largest = (float(whole.mean()), float(whole.max())) if np.isfinite(whole).all() else (
        None, None)
    if errors:
        log.info("  the maps' precision: up to %.1e of a map's largest value away from float32's "
                 "(%d shards sampled)", max(errors), len(errors))
    return mean, largest, max(errors) if errors else None
