"""How fast this process trains and explains: a few real steps of a cell's own trainings, and a few real maps."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from impactx.approaches.base import Approach, Bench
from impactx.approaches.baseline import Baseline
from impactx.datasets import Dataset, make_split
from impactx.experiment.plan import Cell
from impactx.experiment.units import WorkError
from impactx.experiment.work import StorageFiles
from impactx.experiment.workplace import Workplace
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.attribution import build_attribution
from impactx.explain.weighted import explain_by_own_probabilities
from impactx.models import build_classifier
from impactx.settings import parse_attribution
from impactx.storage import Storage
from impactx.training import LoopArguments

SECONDS = 2.0  # of work that is measured; more only where one step takes longer
STAGE1 = "stage 1"


@dataclass(frozen=True)
class TrainingRate:
    """Seconds of an epoch, as they add up: a step, an image of the validation part, and what each epoch costs."""

    step: float
    image: float
    epoch: float

    def seconds(self, train: int, validation: int, batch_size: int) -> float:
        """Of one epoch over so many images."""
        return math.ceil(train / batch_size) * self.step + validation * self.image + self.epoch


def measure_training(cell: Cell, place: Workplace, what: str, batch_size: int, device: str) -> TrainingRate:
    """Train a cell's A (what: "stage 1") or one of its approaches for a few steps, each epoch saved as always.

    Nothing is kept; maps that a training makes itself are left out. Raises WorkError where the batch is larger than the
    training part.
    """
    torch.set_num_threads(place.threads)
    data = place.dataset(cell.dataset.model_dump(mode="json"))
    grid = cell.settings.grid
    split = make_split(data.train.labels, max(grid.validation_fraction), class_names=data.class_names,
                       common_fraction=min(grid.validation_fraction), seed=cell.settings.seed)
    most = len(split.train) // batch_size
    if not most:
        raise WorkError(f"{cell.name}: {len(split.train)} training images are fewer than a batch of {batch_size}")
    storage, scratch = place.artifacts.storage, f"plan-{uuid.uuid4().hex}/state"
    settings = cell.settings.training.model_copy(update={"epochs": 3, "patience": 3})

    def run(steps: int, images: int) -> float:
        """Seconds of a whole epoch with so many steps and validation images; the first one warms up."""
        ends: list[float] = []
        part = replace(split, train=split.train[:steps * batch_size], validation=split.validation[:images])
        loop = LoopArguments(device, save=lambda state: storage.write(scratch, state), on_epoch=lambda row: _mark(ends))
        with contextlib.suppress(_Enough), tempfile.TemporaryDirectory(prefix="impactx-plan-") as folder:
            approach = Baseline() if what == STAGE1 else _named(cell, what).without_maps_in_training()
            # A fresh A and made-up maps: the time does not depend on what is in them.
            approach.train(Bench(
                data=data, split=part, model=cell.model, training=settings, learning_rate=min(grid.learning_rate),
                batch_size=batch_size, seed=cell.settings.seed, augmentation=cell.dataset.augmentation,
                candidate=approach.candidates()[-1],
                attribution=approach.own_attribution or cell.settings.attribution,
                map_scale=cell.settings.maps.scale, loop=loop, memory_bytes=place.memory_bytes,
                classifier=lambda: build_classifier(cell.model, data.num_classes, data.image_size,
                                                    seed=cell.settings.seed),
                maps=lambda: _made_up_maps(data), files=StorageFiles(Storage(folder), "state")))
        return ends[1] - ends[0]

    try:
        few, some = min(2, most), min(batch_size, len(split.validation))
        short = run(few, some)
        if short > SECONDS or most <= few:
            # A forward pass is about a third of a step.
            step = short / (few + some / batch_size / 3)
            return TrainingRate(step, step / batch_size / 3, 0.0)
        more = min(most, few + max(4, math.ceil(SECONDS / short * few)))
        step = max((run(more, some) - short) / (more - few), 0.0)
        images = min(len(split.validation), some + max(64, math.ceil(2 * SECONDS / short * some)))
        image = max((run(few, images) - short) / (images - some), 0.0) if images > some else step / batch_size / 3
        return TrainingRate(step, image, max(short - few * step - some * image, 0.0))
    finally:
        storage.delete(scratch)


class _Enough(Exception):
    """Two epochs are done."""


def _mark(ends: list[float]) -> None:
    ends.append(time.perf_counter())
    if len(ends) == 2:
        raise _Enough


def _named(cell: Cell, approach: str) -> Approach:
    return cell.settings.approaches[approach]


def _made_up_maps(data: Dataset) -> tuple[np.ndarray, float]:
    """One map stands for all."""
    shape = (1, data.channels, *data.image_size)
    one = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return np.broadcast_to(one, (len(data.train.labels), *shape[1:])), 1.0


def measure_maps(cell: Cell, place: Workplace, attribution: Mapping[str, Any], target: str, device: str,
                 approach: str | None = None) -> float:
    """Maps a second of one process, by an attribution; target: as in `Cell.maps`.

    approach: whose trainings make maps of their own network; None: of a model such as the cell's A.
    """
    torch.set_num_threads(place.threads)
    keep_freed_memory()
    data = place.dataset(cell.dataset.model_dump(mode="json"))
    if approach is None:
        model = build_classifier(cell.model, data.num_classes, data.image_size, seed=cell.settings.seed)
    else:
        model = _named(cell, approach).explains(cell.model, data, cell.settings.seed)
    model = model.eval().requires_grad_(False).to(device)
    maker = build_attribution(parse_attribution(attribution))

    def run(count: int) -> float:
        rows = np.arange(count)
        images, how = data.train.images[rows], {"device": device, "memory_bytes": place.memory_bytes, "indices": rows}
        started = time.perf_counter()
        if target == "class_weighted":
            explain_by_own_probabilities(maker, model, images, **how)
        else:
            maker.explain(model, images, data.train.labels[rows], **how)
        return time.perf_counter() - started

    most = min(len(data.train.labels), cell.settings.maps.shard_size)
    first = run(1)  # compiles, and brings the model into its fastest form
    seconds = run(few := min(4, most))
    if seconds > SECONDS or first > 60:
        return few / seconds
    count = min(most, math.ceil(few * 2 * SECONDS / seconds))
    spent = run(count)
    if spent < SECONDS:  # the first call of a size took its memory, too: it was half as fast again
        times = math.ceil(SECONDS / spent)
        return times * count / sum(run(count) for _ in range(times))
    return count / spent
