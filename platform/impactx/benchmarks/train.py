"""How fast the training loop is, as ratios in one run: against the bare step, and the usual loader pipeline.

The bare step is what a careful person writes by hand for data that lie on the device: index, augment, forward,
loss, backward, optimiser, and nothing else. The pipeline is torchvision's: PIL images, RandomCrop,
RandomHorizontalFlip, ToTensor, a DataLoader with worker processes.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from impactx.approaches.impactx import Impactx, impactx_loss
from impactx.datasets.batches import DeviceData, draws, move
from impactx.models import build_classifier
from impactx.settings import AugmentationSettings, ModelSettings, TrainingSettings
from impactx.training.loop import make_autocast, make_optimizer, train_epoch
from impactx.training.losses import classification_loss

WEIGHT = 0.8  # lambda of stage 2


@dataclass(frozen=True)
class Case:
    """One measurement: a model, a stage, and images/s of each way (medians over rounds)."""

    model: str
    stage: int
    batch_size: int
    ours: float
    bare: float
    compiled: float | None
    loader: float

    def line(self) -> str:
        """A table row."""
        compiled = f"{self.compiled / self.bare:8.2f}" if self.compiled else "       -"
        return (f"{self.model:24} {self.stage:5d} {self.batch_size:5d} {self.ours:10.0f} {self.bare:10.0f} "
                f"{self.loader:10.0f} {self.ours / self.bare:10.2f} {self.ours / self.loader:12.2f} {compiled}")


HEAD = (f"{'model':24} {'stage':>5} {'batch':>5} {'ours i/s':>10} {'bare i/s':>10} {'loader i/s':>10} "
        f"{'ours/bare':>10} {'ours/loader':>12} {'compiled/bare':>8}")


def _bare_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor,
                maps: torch.Tensor | None, augmentation: AugmentationSettings, batch_size: int, epoch: int,
                autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
    """images: uint8 (N, H, W, 3), maps: float (N, H, W, 3) or None, all on the device."""
    order, dy, dx, flip = (d.to(images.device) for d in draws(0, epoch, len(images), augmentation.shift))
    model.train()
    for start in range(0, len(images), batch_size):
        rows = order[start:start + batch_size]
        chosen = augmentation.shift, dy[rows], dx[rows], flip[rows]
        x = (move(images[rows], *chosen).float() / 255).permute(0, 3, 1, 2)
        with autocast():
            if maps is None:
                loss = F.cross_entropy(model(x), labels[rows])
            else:
                logits, found = model(x)
                loss = F.cross_entropy(logits, labels[rows]) + WEIGHT * F.mse_loss(
                    found, move(maps[rows], *chosen).permute(0, 3, 1, 2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


class _Pictures(torch.utils.data.Dataset):
    """The usual pipeline: a PIL image, torchvision's transforms, one sample at a time."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, shift: int) -> None:
        from torchvision.transforms import v2

        self.images, self.labels = images, labels
        self.transform = v2.Compose([v2.RandomCrop(images.shape[1:3], padding=shift), v2.RandomHorizontalFlip(),
                                     v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[row])), int(self.labels[row])


def _loader_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, loader: torch.utils.data.DataLoader,
                  device: torch.device, stage: int, map_size: tuple[int, ...],
                  autocast: Callable[[], contextlib.AbstractContextManager]) -> None:
    # Stage 2's maps would need the same random crop: zeros stand in, which costs the pipeline nothing.
    for x, y in loader:
        x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
        with autocast():
            if stage == 1:
                loss = F.cross_entropy(model(x), y)
            else:
                logits, found = model(x)
                loss = F.cross_entropy(logits, y) + WEIGHT * F.mse_loss(
                    found, torch.zeros((len(x), *map_size), device=device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(architecture: str, stage: int, *, images: np.ndarray, labels: np.ndarray, batch_size: int = 32,
            rounds: int = 5, device: str = "cpu", compiled: bool = False, loader_workers: int = 1) -> Case:
    """Time epochs over the images in all ways, in turn, `rounds` times after a warm-up.

    architecture: lenet5 or a timm name; images: uint8 (N, H, W, 3); labels: int64 (N,).
    """
    place, training = torch.device(device), TrainingSettings()
    augmentation = AugmentationSettings(flip=True, shift=2)
    settings = ModelSettings(name="measured", architecture=architecture)
    count, classes = len(images), int(labels.max()) + 1
    maps = np.random.default_rng(0).standard_normal((count, 3, *images.shape[1:3]), np.float32) if stage == 2 else None
    data = DeviceData(images, labels, np.arange(count), device=place, maps=maps)
    loss = classification_loss if stage == 1 else impactx_loss(WEIGHT)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model: nn.Module = build_classifier(settings, classes, images.shape[1:3], seed=0, load_weights=False)
        if stage == 2:
            model = Impactx().build(settings, model, seed=0)  # type: ignore[arg-type]
        model = model.to(place, memory_format=torch.channels_last).train()
        return model, make_optimizer([p for p in model.parameters() if p.requires_grad], training, 1e-3)

    def autocast() -> contextlib.AbstractContextManager:
        return make_autocast(training, place)

    ours, bare, piped = fresh(), fresh(), fresh()
    squeezed = fresh() if compiled else None
    if squeezed is not None:
        squeezed = torch.compile(squeezed[0]), squeezed[1]  # type: ignore[assignment]
    loader = torch.utils.data.DataLoader(
        _Pictures(images, labels, augmentation.shift), batch_size, shuffle=True, num_workers=loader_workers,
        persistent_workers=loader_workers > 0, pin_memory=place.type == "cuda")
    stored = data.images, data.labels, data.maps
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "compiled": [], "loader": []}
    for epoch in range(rounds + 1):
        def run_ours(epoch: int = epoch) -> None:
            train_epoch(ours[0], data.training(seed=0, epoch=epoch, batch_size=batch_size, augmentation=augmentation),
                        loss, ours[1], autocast, count, 1)

        def run_bare(pair: tuple, epoch: int = epoch) -> None:
            _bare_epoch(*pair, *stored, augmentation, batch_size, epoch, autocast)

        found = {"ours": _timed(run_ours, place), "bare": _timed(lambda: run_bare(bare), place),
                 "loader": _timed(lambda: _loader_epoch(*piped, loader, place, stage, (3, *images.shape[1:3]),
                                                        autocast), place)}
        if squeezed is not None:
            found["compiled"] = _timed(lambda: run_bare(squeezed), place)
        if epoch:  # the first round warms up
            for name, value in found.items():
                seconds[name].append(value)
    rate = {name: count / statistics.median(values) for name, values in seconds.items() if values}
    return Case(architecture, stage, batch_size, rate["ours"], rate["bare"], rate.get("compiled"), rate["loader"])


def run(models: list[str], *, images: np.ndarray, labels: np.ndarray, batch_size: int, rounds: int, device: str,
        threads: int, compiled: bool, loader_workers: int = 1) -> list[Case]:
    """Measure each model in both stages and print a line for each. See `measure`."""
    torch.set_num_threads(threads)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {threads} thread(s)"
    print(f"training on {name}: {len(images)} images of {images.shape[1]}x{images.shape[2]}, medians of {rounds} "
          f"rounds in turn; the loader has {loader_workers} worker process(es)\n{HEAD}")
    cases = []
    for model in models:
        for stage in (1, 2):
            cases.append(measure(model, stage, images=images, labels=labels, batch_size=batch_size, rounds=rounds,
                                 device=device, compiled=compiled, loader_workers=loader_workers))
            print(cases[-1].line(), flush=True)
    return cases


def random_images(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (count, size, size, 3) and labels of ten classes: speed does not depend on what is in a picture."""
    generator = np.random.default_rng(0)
    return generator.integers(0, 256, (count, size, size, 3), np.uint8), generator.integers(0, 10, count)
