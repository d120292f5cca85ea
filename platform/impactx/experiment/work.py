"""The work of one unit, in whatever process it is done: a trial, a Ray worker or a notebook."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from impactx.datasets import Dataset, load_dataset, make_split
from impactx.datasets.batches import DeviceData
from impactx.experiment.units import CHECKPOINT, PREDICTIONS, RUNNING, Artifacts, Unit
from impactx.explain.attribution import build_attribution
from impactx.explain.store import MapStore, StoreSpec, map_scale
from impactx.models import (
    Impactx,
    build_classifier,
    build_impactx,
    load_checkpoint,
    save_checkpoint,
    weights_fingerprint,
)
from impactx.settings import (
    DatasetSettings,
    ImpactxSettings,
    ModelSettings,
    PartitionSettings,
    TrainingSettings,
)
from impactx.storage import Storage
from impactx.training import TrainingData, classification_loss, fit, impactx_loss
from impactx.training.loop import Metrics


class WorkError(RuntimeError):
    """A unit cannot be worked on; the message names it and says what to do."""


@dataclass(frozen=True)
class Workplace:
    """Where units are worked on; travels to every process.

    output: root of the artifacts; cache: local folder of decoded images and unpacked maps, or None for
    the data set's default; threads: of torch in this process; memory_bytes: for batches of masks.
    """

    output: str
    data_root: str
    cache: str | None
    threads: int = 1
    memory_bytes: int = 2**29

    @property
    def artifacts(self) -> Artifacts:
        """The artifacts under the output's root."""
        return Artifacts(Storage(self.output))

    def dataset(self, settings: dict[str, Any]) -> Dataset:
        """The data set, decoded once a node, opened once a process."""
        return _open_dataset(DatasetSettings.model_validate(settings), self.data_root, self.cache)

    def checkpoint(self, folder: str) -> Any:
        """The model that another unit left (see models.load_checkpoint)."""
        return load_checkpoint(self.artifacts.storage.read(f"{folder}/{CHECKPOINT}"))

    def map_array(self, store: MapStore, data: Dataset) -> np.ndarray:
        """The maps of a complete store, memory-mapped; unpacked once a node, beside the decoded images."""
        return store.unpack(Path(data.folder).parent / "maps")


@lru_cache(maxsize=4)
def _open_dataset(settings: DatasetSettings, data_root: str, cache: str | None) -> Dataset:
    return load_dataset(settings, data_root, cache)


def _plain(value: Any) -> Any:
    """Plain JSON data: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def train_unit(unit: Unit, place: Workplace, *, device: torch.device | str = "cpu", rank: int = 0,
               world_size: int = 1, on_epoch: Callable[[Metrics], None] | None = None) -> dict[str, Any]:
    """Train a trial or model of either stage, resuming where an earlier try stopped; rank 0 keeps the result.

    Returns the result: best (metrics of the best epoch, or None), best_epoch, history, diverged, weights
    (fingerprint of the best epoch's weights, None if they were not kept), seconds.
    """
    torch.set_num_threads(place.threads)
    artifacts, recipe, inputs = place.artifacts, unit.recipe, unit.inputs
    if (done := artifacts.result(unit)) is not None:
        return done
    data = place.dataset(inputs["dataset"])
    if data.fingerprint != recipe["data"]["fingerprint"]:
        raise WorkError(f"{unit.name}: the data set {data.name!r} on this node has fingerprint {data.fingerprint}, "
                        f"the plan's is {recipe['data']['fingerprint']}: give every node the same files")
    model_settings = ModelSettings.model_validate(inputs["model"])
    training = TrainingSettings.model_validate(inputs["training"])
    split = make_split(data.train.labels, recipe["split"]["fraction"], class_names=data.class_names,
                       common_fraction=recipe["split"]["common_fraction"], seed=recipe["split"]["seed"])
    maps, scale, approach = None, 1.0, None
    if recipe["stage"] == 1:
        model: torch.nn.Module = build_classifier(model_settings, data.num_classes, data.image_size,
                                                  seed=recipe["seed"])
        loss = classification_loss
    else:
        approach = ImpactxSettings.model_validate(inputs["approach"])
        loaded = place.checkpoint(inputs["checkpoint"])
        if (found := weights_fingerprint(loaded.model)) != recipe["weights"]:
            raise WorkError(f"{unit.name}: the checkpoint in {inputs['checkpoint']} has weights {found}, "
                            f"the plan's are {recipe['weights']}: another classifier made the maps")
        maps = place.map_array(MapStore.open(artifacts.storage, inputs["maps"]), data)
        scale = map_scale(maps, split.train, inputs["scale"])
        model = build_impactx(approach, model_settings, loaded.model, seed=recipe["seed"])
        loss = impactx_loss(recipe["lambda"])
    dtype = torch.float64 if training.precision == "float64" else torch.float32
    model = model.to(device, dtype)
    on_device = [DeviceData(data.train.images, data.train.labels, part, device=device, maps=maps, scale=scale,
                            dtype=dtype) for part in (split.train, split.validation)]
    started = time.perf_counter()

    def load() -> bytes | None:
        try:
            return artifacts.storage.read(f"{unit.folder}/{RUNNING}")
        except FileNotFoundError:
            return None

    result = fit(model, loss, TrainingData(*on_device, np.isin(split.validation, split.common)), training,
                 learning_rate=recipe["learning_rate"], batch_size=recipe["batch_size"],
                 augmentation=DatasetSettings.model_validate(inputs["dataset"]).augmentation, seed=recipe["seed"],
                 load=load, save=lambda state: artifacts.storage.write(f"{unit.folder}/{RUNNING}", state),
                 on_epoch=on_epoch, rank=rank, world_size=world_size)
    kept = (unit.role == "model" or training.keep_trial_weights) and result.best_state is not None
    weights, files = None, {}
    if kept:
        model.load_state_dict(result.best_state)
        model = model.to("cpu")
        weights = weights_fingerprint(model)
        files[CHECKPOINT] = save_checkpoint(
            model, model_settings=model_settings, approach_settings=approach, class_names=data.class_names,
            map_scale=scale if isinstance(scale, float) and approach is not None else None, extra={"unit": unit.key})
    summary = _plain({
        "best": result.best if result.best_epoch else None, "best_epoch": result.best_epoch,
        "epochs": len(result.history), "history": result.history, "diverged": result.diverged, "weights": weights,
        "train_images": len(split.train), "validation_images": len(split.validation),
        "seconds": sum(row["seconds"] for row in result.history),
        "seconds_this_process": time.perf_counter() - started})
    if rank == 0:
        artifacts.finish(unit, summary, files)
    return summary


def open_store(unit: Unit, place: Workplace) -> MapStore:
    """The store of a maps unit, begun if it is not there yet."""
    data = place.dataset(unit.inputs["dataset"])
    return MapStore.create(place.artifacts.storage, unit.folder, StoreSpec(
        unit.key, len(data.train.labels), (data.channels, *data.image_size), unit.inputs["shard_size"], unit.recipe))


class ShardWorker:
    """Makes shards of a maps unit: the model and the images are opened once, shards follow."""

    def __init__(self, unit: Unit, place: Workplace, device: torch.device | str = "cpu") -> None:
        torch.set_num_threads(place.threads)
        self.place, self.device = place, torch.device(device)
        self.store = open_store(unit, place)
        self.data = place.dataset(unit.inputs["dataset"])
        model = place.checkpoint(unit.inputs["checkpoint"]).model
        if (found := weights_fingerprint(model)) != unit.recipe["weights"]:
            raise WorkError(f"{unit.name}: the checkpoint in {unit.inputs['checkpoint']} has weights {found}, "
                            f"the plan's are {unit.recipe['weights']}")
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.attribution = build_attribution(PartitionSettings.model_validate(unit.inputs["attribution"]))

    def make(self, shard: int) -> dict[str, float]:
        """Compute and write one shard. Returns its number of maps and seconds."""
        started = time.perf_counter()
        rows = self.store.shard_indices(shard)
        labels = self.data.train.labels[rows]
        found = self.attribution.explain(self.model, self.data.train.images[rows], labels, device=self.device,
                                         memory_bytes=self.place.memory_bytes)
        self.store.write_shard(shard, labels, found)
        return {"shard": shard, "maps": len(rows), "seconds": time.perf_counter() - started}


def finish_maps(unit: Unit, place: Workplace, seconds: float) -> dict[str, Any]:
    """Check a complete store and keep the unit's result. seconds: spent by this job.

    The unpacked array of this node is made on the way: every shard is read and checked once.
    """
    store = open_store(unit, place)
    if missing := store.missing():
        raise WorkError(f"{unit.name}: {len(missing)} of {store.spec.shards} shards are missing in "
                        f"{place.artifacts.storage.uri(unit.folder)}: start the same command again")
    maps = place.map_array(store, place.dataset(unit.inputs["dataset"]))
    sample = np.asarray(maps[:: max(1, len(maps) // 1000)], np.float64)
    result = {"images": store.spec.images, "shards": store.spec.shards, "shape": list(store.spec.shape),
              "folder": place.artifacts.storage.uri(unit.folder), "seconds": seconds,
              "maps_per_second": store.spec.images / seconds if seconds > 0 else None,
              "map_std": float(sample.std()), "map_abs_max": float(np.abs(sample).max())}
    place.artifacts.finish(unit, _plain(result))
    return result


@torch.no_grad()
def evaluate_unit(unit: Unit, place: Workplace, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read the test set once with a final model. Keeps accuracy and, image by image, the probabilities."""
    torch.set_num_threads(place.threads)
    if (done := place.artifacts.result(unit)) is not None:
        return done
    started = time.perf_counter()
    data = place.dataset(unit.inputs["dataset"])
    test = data.load_test()
    model = place.checkpoint(unit.inputs["checkpoint"]).model.eval().to(device)
    parts = []
    for batch in DeviceData(test.images, test.labels, np.arange(len(test.labels)), device=device).evaluation(
            batch_size=500):
        logits = model.classify(batch.images) if isinstance(model, Impactx) else model(batch.images)
        parts.append(logits.softmax(1).float().cpu().numpy())
    probabilities = np.concatenate(parts)
    if not np.isfinite(probabilities).all():
        raise WorkError(f"{unit.name}: the model gives scores that are not finite on test images")
    hits = probabilities.argmax(1) == test.labels
    stream = io.BytesIO()
    np.savez_compressed(stream, labels=test.labels, probabilities=probabilities)
    result = {"accuracy": float(hits.mean()), "images": len(hits), "seconds": time.perf_counter() - started,
              "standard_error": float(math.sqrt(hits.mean() * (1 - hits.mean()) / len(hits)))}
    place.artifacts.finish(unit, _plain(result), {PREDICTIONS: stream.getvalue()})
    return result


