"""How fast this process trains and explains: a few real steps of a cell's own trainings, and a few real maps."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from impactx.datasets import Dataset, Split, make_split
from impactx.experiment.plan import Cell
from impactx.experiment.units import WorkError
from impactx.experiment.work import Workplace
from impactx.explain.attribution import build_attribution
from impactx.models import build_classifier
from impactx.settings import ImpactxSettings
from impactx.training import train_stage1, train_stage2

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

    Nothing is kept. Raises WorkError where the batch is larger than the training part.
    """
    torch.set_num_threads(place.threads)
    data = place.dataset(cell.dataset.model_dump(mode="json"))
    grid = cell.settings.grid
    split = make_split(data.train.labels, max(grid.validation_fraction), class_names=data.class_names,
                       common_fraction=min(grid.validation_fraction), seed=cell.settings.seed)
    most = len(split.train) // batch_size
    if not most:
        raise WorkError(f"{cell.name}: {len(split.train)} training images are fewer than a batch of {batch_size}")
    train, storage, scratch = _training(cell, data, what), place.artifacts.storage, f"plan-{uuid.uuid4().hex}/state"
    settings = cell.settings.training.model_copy(update={"epochs": 3, "patience": 3})

    def run(steps: int, images: int) -> float:
        """Seconds of a whole epoch with so many steps and validation images; the first one warms up."""
        ends: list[float] = []
        part = replace(split, train=split.train[:steps * batch_size], validation=split.validation[:images])
        with contextlib.suppress(_Enough):
            train(part, settings, learning_rate=min(grid.learning_rate), batch_size=batch_size, device=device,
                  seed=cell.settings.seed, augmentation=cell.dataset.augmentation,
                  save=lambda state: storage.write(scratch, state), on_epoch=lambda row: _mark(ends))
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


def _training(cell: Cell, data: Dataset, what: str) -> Callable[..., Any]:
    """The training of A or of an approach: called with a split, training settings and how."""
    if what == STAGE1:
        return lambda split, settings, **how: train_stage1(data, split, cell.model, settings, **how)
    approach = cell.settings.approaches[what]
    if not isinstance(approach, ImpactxSettings):
        raise WorkError(f"--plan cannot measure the approach {what} ({approach.kind})")
    a = build_classifier(cell.model, data.num_classes, data.image_size, seed=cell.settings.seed)
    # One map stands for all: the time does not depend on what is in it.
    map_ = np.random.default_rng(0).normal(size=(1, data.channels, *data.image_size)).astype(np.float32)
    maps = np.broadcast_to(map_, (len(data.train.labels), *map_.shape[1:]))

    def train(split: Split, settings: Any, **how: Any) -> Any:
        return train_stage2(data, split, cell.model, settings, classifier=a, approach=approach,
                            weight=max(approach.lambdas), maps=maps, scale=1.0, **how)

    return train


def measure_maps(cell: Cell, place: Workplace, device: str) -> float:
    """Maps a second of one process, by a cell's attribution and a model as its A."""
    torch.set_num_threads(place.threads)
    data = place.dataset(cell.dataset.model_dump(mode="json"))
    model = build_classifier(cell.model, data.num_classes, data.image_size, seed=cell.settings.seed)
    model = model.eval().requires_grad_(False).to(device)
    attribution = build_attribution(cell.settings.attribution)

    def run(count: int) -> float:
        rows = np.arange(count)
        started = time.perf_counter()
        attribution.explain(model, data.train.images[rows], data.train.labels[rows], device=device,
                            memory_bytes=place.memory_bytes, indices=rows)
        return time.perf_counter() - started

    most = min(len(data.train.labels), cell.settings.maps.shard_size)
    first = run(1)  # compiles, and brings the model into its fastest form
    seconds = run(few := min(4, most))
    if seconds > SECONDS or first > 60:
        return few / seconds
    count = min(most, math.ceil(few * 2 * SECONDS / seconds))
    return count / run(count)
