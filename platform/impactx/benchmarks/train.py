"""The speed of the training loop: against a hand-written loop, and against a usual data loader.

The hand-written ("bare") loop is what a careful person writes for data that lie on the device:
index, augment, forward, loss, backward, optimiser, and nothing else. The loader's pipeline is
torchvision's: PIL images, RandomCrop, RandomHorizontalFlip, ToTensor, and a DataLoader with worker
processes. All take turns in one run, and ratios of their medians are printed.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from impactx.approaches.impactx import Impactx, impactx_loss
from impactx.datasets.batches import DeviceData, draws, move
from impactx.models import Classifier, build_classifier
from impactx.settings import AugmentationSettings, ModelSettings, TrainingSettings
from impactx.training.loop import make_autocast, make_optimizer, train_epoch
from impactx.training.losses import classification_loss

WEIGHT = 0.8  # lambda of stage 2
Autocast = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Case:
    """The speed of training one model in one stage.

    Attributes:
        model: The model's name.
        stage: 1 or 2.
        batch_size: Images in a batch.
        ours: Images per second of this package's loop, the median over rounds, as all that follow.
        bare: Of the hand-written loop.
        compiled: Of the hand-written loop with torch.compile; None if it was not measured.
        loader: Of the loader's pipeline.
    """

    model: str
    stage: int
    batch_size: int
    ours: float
    bare: float
    compiled: float | None
    loader: float

    def line(self) -> str:
        """Return a line of the printed table."""
        compiled = f"{self.compiled / self.bare:8.2f}" if self.compiled else "       -"
        return (f"{self.model:24} {self.stage:5d} {self.batch_size:5d} {self.ours:10.0f} "
                f"{self.bare:10.0f} {self.loader:10.0f} {self.ours / self.bare:10.2f} "
                f"{self.ours / self.loader:12.2f} {compiled}")


HEAD = (f"{'model':24} {'stage':>5} {'batch':>5} {'ours i/s':>10} {'bare i/s':>10} "
        f"{'loader i/s':>10} {'ours/bare':>10} {'ours/loader':>12} {'compiled/bare':>8}")


class _Training(NamedTuple):
    """A network and the optimiser of its parameters."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def step(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no type of it
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class _Stored(NamedTuple):
    """Images, uint8 (N, H, W, 3), labels, and maps, float (N, H, W, 3) or None, on the device."""

    images: Tensor
    labels: Tensor
    maps: Tensor | None


def _bare_epoch(training: _Training, data: _Stored, augmentation: AugmentationSettings,
                batch_size: int, epoch: int, autocast: Autocast) -> None:
    """Train for one epoch with the hand-written loop."""
    images, labels, maps = data
    order, dy, dx, flip = (drawn.to(images.device)
                           for drawn in draws(0, epoch, len(images), augmentation.shift))
    training.model.train()
    for start in range(0, len(images), batch_size):
        rows = order[start:start + batch_size]
        moves = augmentation.shift, dy[rows], dx[rows], flip[rows]
        x = (move(images[rows], *moves).float() / 255).permute(0, 3, 1, 2)
        with autocast():
            if maps is None:
                loss = F.cross_entropy(training.model(x), labels[rows])
            else:
                logits, predicted = training.model(x)
                loss = F.cross_entropy(logits, labels[rows]) + WEIGHT * F.mse_loss(
                    predicted, move(maps[rows], *moves).permute(0, 3, 1, 2))
        training.step(loss)


class _Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """The loader's pipeline: a PIL image and torchvision's transforms, one sample at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, shift: int) -> None:
        from torchvision.transforms import v2

        self.images, self.labels = images, labels
        self.transform = v2.Compose([
            v2.RandomCrop(images.shape[1:3], padding=shift), v2.RandomHorizontalFlip(),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[row])), int(self.labels[row])


def _loader_epoch(training: _Training, loader: torch.utils.data.DataLoader[tuple[Tensor, int]],
                  device: torch.device, stage: int, map_size: tuple[int, ...],
                  autocast: Autocast) -> None:
    """Train for one epoch on the loader's batches.

    The maps of stage 2 would need the same random crop as the images. Zeros stand in for them,
    which costs the pipeline nothing.
    """
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with autocast():
            if stage == 1:
                loss = F.cross_entropy(training.model(x), y)
            else:
                logits, predicted = training.model(x)
                loss = F.cross_entropy(logits, y) + WEIGHT * F.mse_loss(
                    predicted, torch.zeros((len(x), *map_size), device=device))
        training.step(loss)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(architecture: str, stage: int, *, images: np.ndarray, labels: np.ndarray,
            batch_size: int = 32, rounds: int = 5, device: str = "cpu", compiled: bool = False,
            loader_workers: int = 1) -> Case:
    """Measure one model in one stage: epochs over the images in all ways, in turn.

    Args:
        architecture: lenet5 or the name of a timm model.
        stage: 1 or 2.
        images: uint8 (N, H, W, 3).
        labels: int64 (N,).
        batch_size: Images in a batch.
        rounds: Rounds after a first one that warms up.
        device: As torch names it.
        compiled: Whether the hand-written loop is measured with torch.compile as well.
        loader_workers: Worker processes of the loader.
    """
    target, training = torch.device(device), TrainingSettings()
    augmentation = AugmentationSettings(flip=True, shift=2)
    settings = ModelSettings(name="measured", architecture=architecture)
    count, classes = len(images), int(labels.max()) + 1
    height, width = images.shape[1:3]
    maps = None
    if stage == 2:
        maps = np.random.default_rng(0).standard_normal((count, 3, height, width), np.float32)
    data = DeviceData(images, labels, np.arange(count), device=target, maps=maps)
    loss = classification_loss if stage == 1 else impactx_loss(WEIGHT)

    def fresh() -> _Training:
        model: nn.Module = build_classifier(settings, classes, (height, width), seed=0,
                                            load_weights=False)
        if stage == 2:
            model = Impactx().build(settings, cast(Classifier, model), seed=0)
        model = model.to(target).to(memory_format=torch.channels_last).train()
        return _Training(model, make_optimizer(
            [p for p in model.parameters() if p.requires_grad], training, 1e-3))

    def autocast() -> contextlib.AbstractContextManager[object]:
        return make_autocast(training, target)

    def run_ours(epoch: int) -> None:
        batches = data.training(seed=0, epoch=epoch, batch_size=batch_size,
                                augmentation=augmentation)
        train_epoch(ours.model, batches, loss, ours.optimizer, autocast, count, 1)

    def run_bare(bare: _Training, epoch: int) -> None:
        _bare_epoch(bare, stored, augmentation, batch_size, epoch, autocast)

    def run_loader(epoch: int) -> None:
        _loader_epoch(piped, loader, target, stage, (3, height, width), autocast)

    ours, bare, piped = fresh(), fresh(), fresh()
    loader = torch.utils.data.DataLoader(
        _Pictures(images, labels, augmentation.shift), batch_size, shuffle=True,
        num_workers=loader_workers, persistent_workers=loader_workers > 0,
        pin_memory=target.type == "cuda")
    stored = _Stored(cast(Tensor, data.images), data.labels, data.maps)
    ways: dict[str, Callable[[int], None]] = {
        "ours": run_ours, "bare": lambda epoch: run_bare(bare, epoch), "loader": run_loader}
    if compiled:
        plain = fresh()
        fast = _Training(cast(nn.Module, torch.compile(plain.model)), plain.optimizer)
        ways["compiled"] = lambda epoch: run_bare(fast, epoch)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for epoch in range(rounds + 1):
        for name, way in ways.items():
            duration = _seconds(partial(way, epoch), target)
            if epoch:  # the first round warms up
                seconds[name].append(duration)
    rate = {name: count / statistics.median(values) for name, values in seconds.items()}
    return Case(architecture, stage, batch_size, rate["ours"], rate["bare"], rate.get("compiled"),
                rate["loader"])


def run(models: list[str], *, images: np.ndarray, labels: np.ndarray, batch_size: int, rounds: int,
        device: str, threads: int, compiled: bool, loader_workers: int = 1) -> list[Case]:
    """Measure each model in both stages and print a line for each.

    Args:
        models: lenet5 or names of timm models.
        images: As in `measure`, like all arguments that are not described here.
        labels: See there.
        batch_size: See there.
        rounds: See there.
        device: See there.
        threads: Threads of torch on a CPU.
        compiled: See there.
        loader_workers: See there.
    """
    torch.set_num_threads(threads)
    name = (torch.cuda.get_device_name() if device.startswith("cuda")
            else f"CPU, {threads} thread(s)")
    print(f"training on {name}: {len(images)} images of {images.shape[1]}x{images.shape[2]}, "
          f"medians of {rounds} rounds in turn; the loader has {loader_workers} worker "
          f"process(es)\n{HEAD}")
    cases = []
    for model in models:
        for stage in (1, 2):
            cases.append(measure(model, stage, images=images, labels=labels, batch_size=batch_size,
                                 rounds=rounds, device=device, compiled=compiled,
                                 loader_workers=loader_workers))
            print(cases[-1].line(), flush=True)
    return cases


def random_images(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw images and labels; speed does not depend on what is in an image.

    Args:
        count: Number of images N.
        size: Their side in pixels.

    Returns:
        Images, uint8 (N, size, size, 3), and labels of ten classes, int64 (N,).
    """
    generator = np.random.default_rng(0)
    return (generator.integers(0, 256, (count, size, size, 3), np.uint8),
            generator.integers(0, 10, count))
