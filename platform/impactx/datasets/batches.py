"""Training batches from tensors on the device: no loader processes, no copies from the host.

Images stay uint8 (N, H, W, 3) on the device and become float (B, 3, H, W) in [0, 1] a batch at a
time; their maps lie beside them and are moved as the image is. A data set above a memory budget
stays where it is (a memory-mapped file) and is gathered a batch at a time; the batches are the
same. Order and augmentation of an epoch are drawn from (seed, epoch) for all images at once, so
they depend neither on the number of workers nor on where a training was interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from impactx.settings import AugmentationSettings


@dataclass(frozen=True)
class Batch:
    """One worker's share of a global batch.

    Attributes:
        images: float of shape (B, 3, H, W) in [0, 1].
        labels: int64 of shape (B,).
        maps: float of shape (B, C, H, W), or None.
        weights: float of shape (B,), each 1 / `total`; or zeros for a worker that got no image of a
            short last batch.
        total: Number of images in the global batch.
    """

    images: Tensor
    labels: Tensor
    maps: Tensor | None
    weights: Tensor
    total: int


def draws(seed: int, epoch: int, count: int, shift: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the order and the augmentation of one epoch.

    Args:
        seed: Seed of the training.
        epoch: Number of the epoch.
        count: Number of images.
        shift: Images are moved by at most this many pixels each way.

    Returns:
        On the CPU, each of shape (count,): the order (a permutation), the shifts dy and dx (int64
        in [0, 2 * shift], the middle moves nothing), and flips (bool).
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(count, generator=generator)
    dy = torch.randint(0, 2 * shift + 1, (count,), generator=generator)
    dx = torch.randint(0, 2 * shift + 1, (count,), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    return order, dy, dx, flip


def move(planes: Tensor, shift: int, dy: Tensor, dx: Tensor, flip: Tensor | None) -> Tensor:
    """Shift images or maps by (shift - dy, shift - dx) pixels, then mirror them left-right.

    Args:
        planes: Images or maps, of shape (B, H, W, C) and any dtype.
        shift: The largest shift in pixels. Zeros move in.
        dy: Vertical draws, int64 of shape (B,) in [0, 2 * shift].
        dx: Horizontal draws, likewise.
        flip: Which are mirrored, bool of shape (B,), or None for none.

    Returns:
        The moved images, of the same shape and dtype.
    """
    if shift:
        count, height, width, channels = planes.shape
        padded = torch.nn.functional.pad(planes, (0, 0, shift, shift, shift, shift))
        row = (width + 2 * shift) * channels
        # Every window of every image as a view, whole rows in one piece; the indexing below copies
        # one of each.
        windows = padded.as_strided(
            (count, 2 * shift + 1, 2 * shift + 1, height, width * channels),
            ((height + 2 * shift) * row, row, channels, row, 1))
        chosen = windows[torch.arange(count, device=planes.device), dy, dx]
        planes = chosen.view(count, height, width, channels)
    if flip is not None:
        planes = torch.where(flip[:, None, None, None], planes.flip(2), planes)
    return planes


def check_maps(maps: np.ndarray, images: np.ndarray, *, finite: bool = False) -> None:
    """Check that maps belong to images.

    Args:
        maps: float of shape (N, C, H, W); or an object with this shape whose rows are such arrays.
        images: uint8 of shape (N, H, W, C).
        finite: Whether their values are checked too, which reads all of them.

    Raises:
        ValueError: The maps are not one for each image, or hold values that are not finite.
    """
    count, height, width, channels = images.shape
    if tuple(maps.shape) != (count, channels, height, width):
        raise ValueError(
            f"maps of shape {tuple(maps.shape)} for {count} images of {height}x{width} pixels: "
            "there must be one map for each image, in their order, "
            f"{(count, channels, height, width)}; make them of these very images")
    for start in range(0, count if finite else 0, 1024):  # the array may be larger than memory
        rows = np.arange(start, min(start + 1024, count))
        _check_finite(maps[rows], rows)


def _check_finite(maps: np.ndarray, rows: np.ndarray) -> None:
    """Raise ValueError unless all maps are finite; `rows` are the numbers of their images."""
    finite = np.isfinite(maps)
    if not finite.all():
        bad = rows[~finite.all(axis=(1, 2, 3))]
        raise ValueError(f"the maps of {len(bad)} images, the first of them image {bad[0]}, hold "
                         "values that are not finite: make them again, or leave these images out")


class DeviceData:
    """Some images of a data set (and their maps) on a device, in batches.

    Args:
        images: uint8 of shape (N, H, W, 3).
        labels: int64 of shape (N,).
        indices: Which images are taken, int64 of shape (n,).
        device: Where the batches are wanted.
        maps: float32 of shape (N, C, H, W), one for each image; or an object with this shape whose
            rows are such arrays; or None.
        scale: Factor by which maps are multiplied: one number, or one for each image, shape (N,).
        pending: Whether maps may be NaN, because some images have none yet.
        dtype: Of the batches.
        memory_bytes: If images and maps would need more than this on the device, they are gathered
            from the given arrays batch by batch. None: no limit.

    Raises:
        ValueError: The maps are not those of the images (`check_maps`). Whether the values that are
            used are finite is checked when they are read: at once, or batch by batch.

    Attributes:
        labels: int64 of shape (n,), on the device.
        images: uint8 of shape (n, H, W, C) on the device, None if they are gathered.
        maps: `dtype` of shape (n, H, W, C) on the device, None if there are none or they are
            gathered.
        loaded: Whether images and maps lie on the device.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray, *,
                 device: torch.device | str = "cpu", maps: np.ndarray | None = None,
                 scale: float | np.ndarray = 1.0, pending: bool = False,
                 dtype: torch.dtype = torch.float32, memory_bytes: int | None = None) -> None:
        if maps is not None:
            check_maps(maps, images)
        self.device, self.dtype = torch.device(device), dtype
        self.indices = np.asarray(indices, dtype=np.int64)
        chosen = np.asarray(labels)[self.indices].astype(np.int64)
        self.labels = torch.from_numpy(chosen).to(self.device)
        self._host_images: np.ndarray | None = images
        self._host_maps = maps
        self._scale, self._pending = scale, pending
        needed = len(self.indices) * (math.prod(images.shape[1:]) + (
            math.prod(maps.shape[1:]) * dtype.itemsize if maps is not None else 0))
        self.loaded = memory_bytes is None or needed <= memory_bytes
        self.images: Tensor | None = None
        self.maps: Tensor | None = None
        if self.loaded:
            self.images, self.maps = self._gather(self.indices)
            self._host_images = self._host_maps = None

    def __len__(self) -> int:
        return len(self.indices)

    def teach(self, maps: np.ndarray, scale: float | np.ndarray) -> None:
        """Replace the maps.

        Args:
            maps: As they were given at first, float32 of shape (N, C, H, W).
            scale: Their factor, or one for each image.
        """
        if self.loaded:
            self.maps = self._scaled(maps, scale, self.indices)
        else:
            self._host_maps, self._scale = maps, scale

    def _gather(self, chosen: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Return images and scaled maps of given rows, (B, H, W, C) on the device."""
        assert self._host_images is not None  # nothing is loaded yet, or nothing ever is
        images = torch.from_numpy(np.ascontiguousarray(self._host_images[chosen])).to(self.device)
        if self._host_maps is None:
            return images, None
        return images, self._scaled(self._host_maps, self._scale, chosen)

    def _scaled(self, maps: np.ndarray, scale: float | np.ndarray, chosen: np.ndarray) -> Tensor:
        taken = maps[chosen]
        if not self._pending:
            _check_finite(taken, chosen)
        own = torch.from_numpy(np.ascontiguousarray(taken.transpose(0, 2, 3, 1)))
        factor = torch.as_tensor(
            scale if np.ndim(scale) == 0 else np.asarray(scale)[chosen], dtype=self.dtype)
        factor = factor.reshape(-1, *[1] * (3 if factor.ndim else 0))
        return (own.to(self.dtype) * factor).to(self.device)

    def _rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.images is None:
            return self._gather(self.indices[rows.cpu().numpy()])
        return self.images[rows], self.maps[rows] if self.maps is not None else None

    def _batch(self, rows: Tensor, moves: tuple[Tensor, ...] | None,
               augmentation: AugmentationSettings | None, weight: float, total: int) -> Batch:
        images, maps = self._rows(rows)
        if moves is not None and augmentation is not None:
            dy, dx, flip = (m[rows] for m in moves)
            chosen = (augmentation.shift, dy, dx, flip if augmentation.flip else None)
            images = move(images, *chosen)
            maps = move(maps, *chosen) if maps is not None else None
        weights = torch.full((len(rows),), weight, dtype=self.dtype, device=self.device)
        # NHWC seen as NCHW is torch's channels_last format: the fastest for convolutions, and
        # nothing is copied.
        return Batch(images.to(self.dtype).div_(255).permute(0, 3, 1, 2), self.labels[rows],
                     maps.permute(0, 3, 1, 2) if maps is not None else None, weights, total)

    def training(self, *, seed: int, epoch: int, batch_size: int,
                 augmentation: AugmentationSettings,
                 rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield the shuffled, augmented batches of an epoch.

        The draws belong to the image's position in this set, whichever worker it goes to. A single
        image left over joins the batch before it: batch norm cannot normalise one image of one
        pixel.

        Args:
            seed: Seed of the training.
            epoch: Number of the epoch.
            batch_size: Images of a global batch.
            augmentation: How images and maps are moved.
            rank: Number of this worker.
            world_size: Number of workers; each gets every world_size-th image of a batch.

        Yields:
            This worker's shares.
        """
        order, *moves = draws(seed, epoch, len(self), augmentation.shift)
        on_device = tuple(m.to(self.device) for m in moves)
        active = on_device if augmentation.shift or augmentation.flip else None
        order = order.to(self.device)
        starts = list(range(0, len(self), batch_size))
        if len(starts) > 1 and len(self) - starts[-1] == 1 < batch_size:
            starts.pop()
        for start, end in zip(starts, [*starts[1:], len(self)], strict=True):
            rows = order[start:end]
            # At least two images a worker, for the same reason; a short last batch is then shared
            # by fewer.
            sharing = min(world_size, max(len(rows) // 2, 1))
            if rank < sharing:
                own, weight = rows[rank::sharing], 1.0 / len(rows)
            else:  # every worker must exchange gradients: images of weight 0
                own, weight = rows[:2], 0.0
            yield self._batch(own, active, augmentation, weight, len(rows))

    def evaluation(self, *, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
        """Yield every image once, in order, not augmented.

        Args:
            batch_size: Images of a worker's batch.
            rank: Number of this worker.
            world_size: Number of workers; each gets every world_size-th image.

        Yields:
            This worker's batches; weights are 1 / n.
        """
        rows = torch.arange(rank, len(self), world_size, device=self.device)
        for start in range(0, len(rows), batch_size):
            share = rows[start:start + batch_size]
            yield self._batch(share, None, None, 1.0 / len(self), len(self))
