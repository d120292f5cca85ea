"""The work of one unit, in whatever process it is done: a trial, a Ray worker or a notebook."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from impactx.approaches.base import Approach, Bench, Candidate
from impactx.approaches.checkpoint import save_checkpoint
from impactx.datasets import Dataset, Split, make_split
from impactx.datasets.batches import DeviceData
from impactx.datasets.entry import ImageSet
from impactx.experiment.claims import Claim
from impactx.experiment.model_source import open_model
from impactx.experiment.units import CHECKPOINT, CLAIM, PREDICTIONS, RUNNING, Unit, WorkError
from impactx.experiment.workplace import Workplace
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.attribution import build_attribution
from impactx.explain.scores import completeness_gaps
from impactx.explain.store import PRECISION_ERROR, MapStore, StoreError, StoreSpec, map_scale
from impactx.explain.weighted import explain_by_own_probabilities
from impactx.models import weights_fingerprint
from impactx.settings import (
    DatasetSettings,
    ModelSettings,
    TrainingSettings,
    parse_attribution,
)
from impactx.settings.extensions import approach as registry
from impactx.storage import Storage
from impactx.training.loop import LoopArguments, Metrics, ResumeError

log = logging.getLogger("impactx")


def _plain(value: Any) -> Any:
    """Plain JSON data: numbers that are not finite become null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def split_of(unit: Unit, data: Dataset) -> Split:
    """The split into training and validation part that a training's recipe names."""
    about = unit.recipe["split"]
    return make_split(data.train.labels, about["fraction"], class_names=data.class_names,
                      common_fraction=about["common_fraction"], seed=about["seed"])


class StorageFiles:
    """Files of a training in a folder of the output (see approaches.base.Files)."""

    def __init__(self, storage: Storage, folder: str) -> None:
        self.storage, self.folder = storage, folder

    def write(self, name: str, content: bytes) -> None:
        """See Storage.write."""
        self.storage.write(f"{self.folder}/{name}", content)

    def read(self, name: str) -> bytes:
        """See Storage.read."""
        return self.storage.read(f"{self.folder}/{name}")

    def delete(self, name: str) -> None:
        """See Storage.delete."""
        self.storage.delete(f"{self.folder}/{name}")


def _training_maps(unit: Unit, place: Workplace, data: Dataset, split: Split) -> tuple[np.ndarray, float | np.ndarray]:
    """The maps that a training's inputs name, and the factor(s) by which they are to be multiplied.

    Raises StoreError where they are not those of the unit's recipe.
    """
    store = MapStore.open(place.artifacts.storage, unit.inputs["maps"], unit.recipe["maps"])
    maps = place.map_array(store, data)
    return maps, map_scale(maps, split.train, unit.inputs["scale"])


def train_unit(unit: Unit, place: Workplace, *, device: torch.device | str = "cpu", rank: int = 0,
               world_size: int = 1, on_epoch: Callable[[Metrics], object] | None = None) -> dict[str, Any]:
    """Train a trial or model of either stage, resuming where an earlier try stopped; rank 0 keeps the result.

    Returns the result: best (metrics of the best epoch, or None), best_epoch, history, diverged, weights
    (fingerprint of the best epoch's weights, None if they were not kept), seconds, and what the approach adds;
    stopped where on_epoch ended it before its end. Raises WorkError, and TakenOver where another process has begun
    the same training since.
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
    approach: Approach = registry.parse(inputs["approach"])
    training = TrainingSettings.model_validate(inputs["training"])
    split = split_of(unit, data)
    running = f"{unit.folder}/{RUNNING}"
    claim = Claim(artifacts.storage, f"{unit.folder}/{CLAIM}", unit.name) if rank == 0 else None

    def save(state: bytes) -> None:
        if claim is not None:
            claim.check()
        artifacts.storage.write(running, state)

    def load() -> bytes | None:
        try:
            return artifacts.storage.read(running)
        except FileNotFoundError:
            return None

    bench = Bench(
        data=data, split=split, model=model_settings, training=training, learning_rate=recipe["learning_rate"],
        batch_size=recipe["batch_size"], seed=recipe["seed"],
        augmentation=DatasetSettings.model_validate(inputs["dataset"]).augmentation,
        candidate=Candidate(recipe.get("lambda"), inputs.get("learning_rate_factor", 1.0)),
        attribution=parse_attribution(inputs["attribution"]), map_scale=inputs["scale"],
        loop=LoopArguments(device, load, save, on_epoch, rank, world_size), memory_bytes=place.memory_bytes,
        classifier=lambda: place.checkpoint(inputs["checkpoint"], recipe["weights"]).model,
        maps=lambda: _training_maps(unit, place, data, split), files=StorageFiles(artifacts.storage, unit.folder))
    started = time.perf_counter()
    try:
        trained = approach.train(bench)
    except ResumeError as error:
        raise WorkError(f"{unit.name}: {artifacts.storage.uri(running)}: {error}; delete the file, this training "
                        "then starts anew") from error
    result = trained.fit
    kept = (unit.role == "model" or training.keep_trial_weights) and result.best_state is not None
    weights, files = None, {}
    if kept and not result.stopped:
        model = trained.model.to("cpu")
        weights = weights_fingerprint(model)
        files[CHECKPOINT] = save_checkpoint(
            model, model_settings=model_settings, approach=trained.approach, class_names=data.class_names,
            map_scale=trained.map_scale, weight=recipe.get("lambda"), extra={"unit": unit.key})
    best = trained.best or (result.best if result.best_epoch else None)
    summary = _plain(dict(trained.extra) | {
        "best": best and dict(best), "best_epoch": result.best_epoch,
        "epochs": len(result.history), "history": result.history, "diverged": result.diverged, "weights": weights,
        "train_images": len(split.train), "validation_images": len(split.validation),
        "seconds": sum(row["seconds"] for row in result.history),
        "seconds_this_process": time.perf_counter() - started})
    if claim is None:
        return summary
    if (done := artifacts.result(unit)) is not None:
        return done  # by another process, whose files belong together
    claim.check()
    if result.stopped:
        artifacts.stop(unit, summary)
        claim.release()
        return summary | {"stopped": True}
    artifacts.finish(unit, summary, files)
    return summary


def open_store(unit: Unit, place: Workplace) -> MapStore:
    """The store of a maps unit, begun if it is not there yet."""
    data = place.dataset(unit.inputs["dataset"])
    return MapStore.create(place.artifacts.storage, unit.folder, StoreSpec(
        unit.key, len(_explained(unit, data)), (data.channels, *data.image_size), unit.inputs["shard_size"],
        unit.recipe))


def _explained(unit: Unit, data: Dataset) -> ImageSet:
    """The images that a maps unit explains."""
    return data.load_test() if unit.inputs.get("part") == "test" else data.train


def maps_complete(unit: Unit, place: Workplace) -> bool:
    """True where the store is the unit's and no shard is missing (their contents are checked when they are unpacked).
    """
    try:
        return not MapStore.open(place.artifacts.storage, unit.folder, unit.key).missing()
    except StoreError:
        return False


class ShardWorker:
    """Makes shards of a maps unit: the model and the images are opened once, shards follow."""

    def __init__(self, unit: Unit, place: Workplace, device: torch.device | str = "cpu") -> None:
        torch.set_num_threads(place.threads)
        keep_freed_memory()
        self.place, self.device = place, torch.device(device)
        self.store = open_store(unit, place)
        self.images = _explained(unit, place.dataset(unit.inputs["dataset"]))
        self.class_weighted = unit.inputs.get("target") == "class_weighted"
        self.model = open_model(unit.inputs["source"], place, unit.recipe["weights"]).to(self.device)
        self.attribution = build_attribution(parse_attribution(unit.inputs["attribution"]))

    def make(self, shard: int) -> dict[str, float]:
        """Compute and write one shard. Returns its number of maps and seconds."""
        started = time.perf_counter()
        rows = self.store.shard_indices(shard)
        if self.store.has(shard):  # another worker, or an orphan of a job that was killed, was quicker
            return {"shard": shard, "maps": len(rows), "seconds": time.perf_counter() - started}
        images, labels = self.images.images[rows], self.images.labels[rows]
        how = {"device": self.device, "memory_bytes": self.place.memory_bytes, "indices": rows}
        if self.class_weighted:
            found = explain_by_own_probabilities(self.attribution, self.model, images, **how)
        else:
            found = self.attribution.explain(self.model, images, labels, **how)
        self.store.write_shard(shard, labels, found)
        return {"shard": shard, "maps": len(rows), "seconds": time.perf_counter() - started}


def finish_maps(unit: Unit, place: Workplace, seconds: float, made: int, worked: float) -> dict[str, Any]:
    """Check a complete store and keep the unit's result.

    seconds: that this job spent; made: maps that it made (an earlier one may have made others); worked: the seconds
    of the processes that made them, added up. process_seconds in the result are those of all maps, at that pace.
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
              "maps_made": made, "maps_per_second": made / seconds if made and seconds > 0 else None,
              "process_seconds": worked * store.spec.images / made if made else None,
              "map_std": float(sample.std()), "map_abs_max": float(np.abs(sample).max())} | _sampled(store)
    place.artifacts.finish(unit, _plain(result))
    return result


def _sampled(store: MapStore) -> dict[str, float]:
    """What a few shards say of all: how far maps are from summing to score - base value, where the attribution has
    base values, and how far from float32's, where they were made in another precision."""
    gaps, errors = [], []
    for shard in np.unique(np.linspace(0, store.spec.shards - 1, 4).astype(int)):
        table = store.read_shard(int(shard))
        maps = table["map"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        gaps.append(completeness_gaps(maps, table["score"].to_numpy(), table["base_value"].to_numpy()))
        errors += [float(v) for k, v in (table.schema.metadata or {}).items() if k.decode() == PRECISION_ERROR]
    whole = np.concatenate(gaps)
    found = {"map_gap_mean": float(whole.mean()), "map_gap_max": float(whole.max())} if np.isfinite(whole).all() else {}
    if errors:
        found["map_precision_error"] = max(errors)
        log.info("  the maps' precision: up to %.1e of a map's largest value away from float32's (%d shards sampled)",
                 max(errors), len(errors))
    return found


def evaluate_unit(unit: Unit, place: Workplace, *, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read the test set once with a final model. Keeps accuracy and, image by image, the probabilities.

    A model that needs maps of the test images takes them from the store that the inputs name; map_seconds is then
    what such a map costs, measured here. Raises WorkError, and StoreError where the store is not the recipe's.
    """
    torch.set_num_threads(place.threads)
    if (done := place.artifacts.result(unit)) is not None:
        return done
    started = time.perf_counter()
    data = place.dataset(unit.inputs["dataset"])
    test = data.load_test()
    model = place.checkpoint(unit.inputs["checkpoint"], unit.recipe["weights"]).model.eval().to(device)
    training = TrainingSettings.model_validate(unit.inputs.get("training", {}))
    store = MapStore.open(place.artifacts.storage, unit.inputs["maps"],
                          unit.recipe["maps"]) if "maps" in unit.inputs else None
    held = DeviceData(test.images, test.labels, np.arange(len(test.labels)), device=device,
                      maps=None if store is None else place.map_array(store, data),
                      memory_bytes=training.memory_mb * 2**20)
    parts = []
    with torch.no_grad():
        for batch in held.evaluation(batch_size=training.eval_batch_size):
            maps = () if batch.maps is None else (batch.maps,)
            parts.append(model.classify(batch.images, *maps).softmax(1).float().cpu().numpy())
    probabilities = np.concatenate(parts)
    if not np.isfinite(probabilities).all():
        raise WorkError(f"{unit.name}: the model gives scores that are not finite on test images")
    hits = probabilities.argmax(1) == test.labels
    stream = io.BytesIO()
    np.savez_compressed(stream, labels=test.labels, probabilities=probabilities)
    result = {"accuracy": float(hits.mean()), "images": len(hits), "seconds": time.perf_counter() - started,
              "standard_error": float(math.sqrt(hits.mean() * (1 - hits.mean()) / len(hits)))}
    if store is not None:
        result["map_seconds"] = _seconds_of_a_map(store, model.a, test, place, device)
    place.artifacts.finish(unit, _plain(result), {PREDICTIONS: stream.getvalue()})
    return result


def _seconds_of_a_map(store: MapStore, a: torch.nn.Module, test: ImageSet, place: Workplace,
                      device: torch.device | str) -> float:
    """What one process needs for a class-weighted map, in seconds: of eight images at once, or of one that is slow."""
    maker = build_attribution(parse_attribution(store.spec.recipe["attribution"]))
    seconds = math.inf
    for images in (test.images[:1], test.images[:8]):  # the first brings the model into its fastest form
        started = time.perf_counter()
        explain_by_own_probabilities(maker, a, images, device=device, memory_bytes=place.memory_bytes)
        seconds = (time.perf_counter() - started) / len(images)
        if seconds > 2:
            break
    return seconds
