"""The score that an attribution explains: the model's, of the class asked for, checked before anybody relies on it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from impactx.explain.errors import AttributionError

log = logging.getLogger(__name__)

Score = Callable[[Tensor], Tensor]
T = TypeVar("T")


class ClassScores:
    """A model's scores or probabilities for a stack of images, and those of each image's class.

    score: (B, C, H, W) float32 in [0, 1] -> logits (B, K); explain: "logit" or "probability";
    images: float32 (N, C, H, W); labels: int64 (N,); names: (N,), what messages call the images.
    Raises AttributionError for a module in training mode, scores of another shape or not finite, a label that the
    model has no score for.
    """

    def __init__(self, score: Score, explain: str, images: Tensor, labels: Tensor, names: Sequence[int]) -> None:
        if isinstance(score, nn.Module) and score.training:
            raise AttributionError("the model is in training mode (dropout, batch statistics): call eval() first")
        if len(images) == 0 or len(images) != len(labels) or len(names) != len(images):
            raise AttributionError(f"{len(images)} images with {len(labels)} labels and {len(names)} indices: the same "
                                   "number of each is needed, at least 1")
        self.score, self.explain = score, explain
        self.images, self.labels, self.names = images, labels, names

    def __call__(self, images: Tensor) -> Tensor:
        """(B, K) of any images; differentiable."""
        scores = self.score(images)
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images) \
                or not scores.is_floating_point():
            found = (f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor)
                     else f"a {type(scores).__name__}")
            raise AttributionError(f"the model returned {found} for {len(images)} images; it must return floating "
                                   f"point scores ({len(images)}, K)")
        return scores.softmax(1) if self.explain == "probability" else scores

    @torch.no_grad()
    def of_class(self, versions: Tensor, rows: int, what: str = "image") -> np.ndarray:
        """float64 (N,): the score of each image's class for a version of it; `rows` of them a forward.

        Raises AttributionError, naming the image, where it is not finite or there is none.
        """
        found = []
        for part in chunks(len(versions), rows):
            scores = self(versions[part])
            labels = self.labels[part]
            outside = ((labels < 0) | (labels >= scores.shape[1])).nonzero()
            if len(outside):
                i = int(outside[0])
                raise AttributionError(f"image {self.names[part.start + i]} has the label {int(labels[i])}, the model "
                                       f"has {scores.shape[1]} scores; allowed: 0 to {scores.shape[1] - 1}")
            found.append(scores.gather(1, labels[:, None])[:, 0].double().cpu().numpy())
        values = np.concatenate(found)
        if not np.isfinite(values).all():
            i = int(np.argmin(np.isfinite(values)))
            raise AttributionError(f"the model gives the {what} {self.names[i]} the score {values[i]}: only finite "
                                   "scores can be explained")
        return values

    def finite(self, maps: Tensor) -> np.ndarray:
        """The maps as float32 (N, C, H, W). Raises AttributionError, naming the image, where one is not finite."""
        whole = maps.detach().float().cpu().numpy()
        good = np.isfinite(whole).reshape(len(whole), -1).all(1)
        if not good.all():
            raise AttributionError(f"the map of image {self.names[int(np.argmin(good))]} is not finite "
                                   f"({int((~good).sum())} such images): the model's scores or gradients are not")
        return np.ascontiguousarray(whole)


def open_images(images: np.ndarray, labels: np.ndarray, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """float32 (N, C, H, W) in [0, 1] and int64 (N,) on the device, of uint8 (N, H, W, C)."""
    if images.ndim != 4 or images.dtype != np.uint8:
        raise AttributionError(f"images must be uint8 (N, H, W, C), got {images.dtype} {images.shape}")
    stack = torch.from_numpy(np.array(images)).to(device)  # a copy: the images may be a read-only file
    x = (stack.permute(0, 3, 1, 2).float() / 255).contiguous()
    return x, torch.from_numpy(np.array(labels, np.int64)).to(device)


def names_of(indices: np.ndarray | None, count: int) -> list[int]:
    """What the images are called: their indices in the data set, or their places."""
    return list(range(count)) if indices is None else [int(i) for i in indices]


def chunks(total: int, size: int) -> Iterator[slice]:
    """Even slices of at most `size`."""
    step = math.ceil(total / math.ceil(total / max(1, size))) if total else 1
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def rows_that_fit(scores: ClassScores, memory_bytes: int) -> int:
    """How many images go through the model together with what a gradient needs; at least 1, on a CPU at most 200.

    What a gradient keeps of one image is measured; the model's own parameters are not counted. On a GPU the limit is
    half of the memory that is free there.
    """
    own = {p.data_ptr() for p in scores.score.parameters()} if isinstance(scores.score, nn.Module) else set()
    image, kept = scores.images[:1].clone().requires_grad_(), [0]

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[0] += tensor.nbytes
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        scores(image)
    most = 200
    if image.device.type == "cuda":
        memory_bytes, most = torch.cuda.mem_get_info(image.device)[0] // 2, 4096
    # As much again for the gradients themselves, and what a forward needs for a moment.
    return max(1, min(most, memory_bytes // (3 * kept[0] + 4 * image.nbytes)))


def until_it_fits(work: Callable[[int], T], rows: int) -> T:
    """work(rows), again with half as many rows where the device runs out of memory.

    Raises torch.OutOfMemoryError where not even one row fits.
    """
    while True:
        try:
            return work(rows)
        except torch.OutOfMemoryError:
            if rows <= 1:
                raise
            log.warning("out of memory with %d images a forward: going on with %d", rows, rows // 2)
            rows //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # after the error is gone, and with it what it still held


def completeness_gaps(maps: np.ndarray | Tensor, scores: np.ndarray, base_values: np.ndarray) -> np.ndarray:
    """float64 (N,): |sum of the map - (score - base value)| as a share of the sum of the map's absolute values."""
    flat = np.asarray(maps, np.float64).reshape(len(maps), -1)
    return np.abs(flat.sum(1) - (scores - base_values)) / np.maximum(np.abs(flat).sum(1), np.finfo(np.float32).tiny)
