"""How fast this process trains and explains: a few real steps, and a few real maps."""

from __future__ import annotations

import contextlib
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from impactx.approaches.base import Approach, Bench
from impactx.approaches.baseline import BASELINE, Baseline
from impactx.datasets import Dataset, make_split
from impactx.experiment.cell import Cell
from impactx.experiment.steps.base import StepError
from impactx.experiment.steps.maps import Target
from impactx.experiment.steps.training import StepFiles
from impactx.experiment.workplace import Workplace
from impactx.explain.allocation import keep_freed_memory
from impactx.explain.attribution import Attribution
from impactx.explain.weighted import explain_by_own_probabilities
from impactx.models import build_classifier
from impactx.settings.extensions import AttributionSettings
from impactx.training.loop import LoopArguments

SECONDS = 2.0  # of work that is measured; more only where one step takes longer


@dataclass(frozen=True)
class TrainingRate:
    """Seconds of an epoch, as they add up.

    Attributes:
        step: Of one training step.
        image: Of one image of the validation part.
        epoch: What each epoch costs beside these.
    """

    step: float
    image: float
    epoch: float

    def seconds(self, train: int, validation: int, batch_size: int) -> float:
        """Return the seconds of one epoch over so many images."""
        return math.ceil(train / batch_size) * self.step + validation * self.image + self.epoch


def measure_training(cell: Cell, place: Workplace, subject: str, batch_size: int, device: str
                     ) -> TrainingRate:
    """Train an approach for a few steps, each epoch saved as always. Nothing is kept.

    Maps that a training makes itself are left out.

    Args:
        cell: Data set and model.
        place: Where the states of trainings are written.
        subject: The approach's name; "baseline" for A.
        batch_size: Of this process.
        device: Of this process.

    Raises:
        StepError: The batch is larger than the training part.
    """
    torch.set_num_threads(place.threads)
    data, grid = place.dataset(cell.dataset, cell.facts.fingerprint), cell.settings.grid
    split = make_split(data.train.labels, max(grid.validation_fraction), seed=cell.settings.seed,
                       class_names=data.class_names,
                       common_fraction=min(grid.validation_fraction))
    most = len(split.train) // batch_size
    if not most:
        raise StepError(f"{cell.name}: {len(split.train)} training images are fewer than a batch "
                        f"of {batch_size}")
    storage, scratch = place.artifacts.storage, f"plan-{uuid.uuid4().hex}"
    approach = approach_of(cell, subject).without_maps_in_training()
    bench = _bench(cell, place, data, approach, scratch)

    def run(steps: int, images: int) -> float:
        """Seconds of a whole epoch with so many steps and images; the first one warms up."""
        ends: list[float] = []
        part = replace(split, train=split.train[:steps * batch_size],
                       validation=split.validation[:images])
        loop = LoopArguments(
            device=device, save=lambda state: storage.write(f"{scratch}/state", state),
            on_epoch=lambda row: _mark(ends))
        with contextlib.suppress(_Enough):
            approach.train(replace(bench, split=part, batch_size=batch_size, loop=loop))
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
        image = max((run(few, images) - short) / (images - some),
                    0.0) if images > some else step / batch_size / 3
        return TrainingRate(step, image, max(short - few * step - some * image, 0.0))
    finally:
        for name in storage.names(scratch):
            storage.delete(f"{scratch}/{name}")


class _Enough(Exception):
    """Two epochs are done."""


def _mark(ends: list[float]) -> None:
    ends.append(time.perf_counter())
    if len(ends) == 2:
        raise _Enough


def approach_of(cell: Cell, subject: str) -> Approach:
    """Return the approach of a name; A's is "baseline"."""
    return Baseline() if subject == BASELINE else cell.approaches[subject]


def _bench(cell: Cell, place: Workplace, data: Dataset, approach: Approach, scratch: str) -> Bench:
    """Return a bench with a fresh A and one made-up map for all: time does not depend on them."""
    s, shape = cell.settings, (1, data.channels, *data.image_size)
    one = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    maps = np.broadcast_to(one, (len(data.train.labels), *shape[1:]))
    return Bench(
        data=data, split=make_split(
            data.train.labels, max(s.grid.validation_fraction), seed=s.seed,
            class_names=data.class_names, common_fraction=min(s.grid.validation_fraction)),
        model=cell.model, training=s.training.model_copy(update={"epochs": 3, "patience": 3}),
        learning_rate=min(s.grid.learning_rate), batch_size=1, seed=s.seed,
        augmentation=cell.dataset.augmentation, candidate=approach.candidates()[-1],
        attribution=cell.attribution(approach), map_scale=s.maps.scale,
        memory_bytes=place.memory_bytes,
        classifier=lambda: build_classifier(cell.model, data.num_classes, data.image_size,
                                            seed=s.seed),
        maps=lambda: (maps, 1.0), files=StepFiles(place.artifacts.storage, scratch))


def measure_maps(cell: Cell, place: Workplace, attribution: AttributionSettings, target: Target,
                 device: str, subject: str | None = None) -> float:
    """Return the maps a second of one process.

    Args:
        cell: Data set and model.
        place: Where data sets lie.
        attribution: Makes the maps.
        target: As in `steps.maps.Maps`.
        device: Of this process.
        subject: The approach whose trainings make maps of their own network; None: maps of a model
            such as the cell's A.

    Raises:
        StepError: The attribution makes no maps.
    """
    torch.set_num_threads(place.threads)
    keep_freed_memory()
    if not isinstance(attribution, Attribution):
        raise StepError(f"{attribution.method} makes no maps")
    data, seed = place.dataset(cell.dataset, cell.facts.fingerprint), cell.settings.seed
    model = build_classifier(
        cell.model, data.num_classes, data.image_size, seed=seed) if subject is None else (
        approach_of(cell, subject).explains(cell.model, data, seed))
    model = model.eval().requires_grad_(False).to(device)
    run = _maps_run(attribution, model, data, place, target, device)
    most = min(len(data.train.labels), cell.settings.maps.shard_size)
    first = run(1)  # compiles, and brings the model into its fastest form
    few = min(4, most)
    seconds = run(few)
    if seconds > SECONDS or first > 60:
        return few / seconds
    count = min(most, math.ceil(few * 2 * SECONDS / seconds))
    spent = run(count)
    # The first call of a size takes its memory, too, which would be half as fast again.
    if spent < SECONDS:
        times = math.ceil(SECONDS / spent)
        return times * count / sum(run(count) for _ in range(times))
    return count / spent


def _maps_run(attribution: Attribution, model: torch.nn.Module, data: Dataset, place: Workplace,
              target: Target, device: str) -> Callable[[int], float]:
    """Return a function that explains so many images and returns the seconds."""
    def run(count: int) -> float:
        rows = np.arange(count)
        images, started = data.train.images[rows], time.perf_counter()
        if target == "class_weighted":
            explain_by_own_probabilities(attribution, model, images, device=device,
                                         memory_bytes=place.memory_bytes, indices=rows)
        else:
            attribution.explain(model, images, data.train.labels[rows], device=device,
                                memory_bytes=place.memory_bytes, indices=rows)
        return time.perf_counter() - started

    return run
