"""The score that an attribution explains, and helpers that attributions share.

The model and its scores are checked here before anybody relies on them, and what goes through the
model together is chosen to fit the memory.
"""

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


# Layers that do the same in both modes, by the modules of torch.nn that define them.
_SAME_IN_BOTH_MODES = frozenset(f"torch.nn.modules.{name}" for name in (
    "activation", "container", "conv", "flatten", "linear", "padding", "pooling", "upsampling"))


def training_part(score: object) -> str | None:
    """Return what of a model is in training mode, for a message; None if nothing is.

    A layer inside of it counts where it may do otherwise in training.
    """
    if isinstance(score, nn.Module):
        for name, part in score.named_modules():
            same = type(part).__module__ in _SAME_IN_BOTH_MODES and not isinstance(
                part, nn.RReLU | nn.MultiheadAttention)
            if part.training and not (name and same):
                return f"{name} ({type(part).__name__}) in the model" if name else "the model"
    return None


class Probabilities(nn.Module):
    """A model followed by softmax, (B, C, H, W) to (B, K); the model's own mode stays as it is."""

    def __init__(self, model: Score) -> None:
        super().__init__()
        self.model, self.training = model, False

    def forward(self, images: Tensor) -> Tensor:
        """Return the probabilities (B, K) of images (B, C, H, W)."""
        return self.model(images).softmax(1)


class ClassScores:
    """A model's scores or probabilities for a stack of images, and those of each image's class.

    Args:
        score: float32 (B, C, H, W) in [0, 1] to logits (B, K); a module must be in eval mode.
        explained: "logit" or "probability".
        images: float32 (N, C, H, W) in [0, 1].
        labels: int64 (N,), the class whose score is explained.
        names: N numbers that messages call the images by, such as their indices in a data set.

    Raises:
        AttributionError: The module is in training mode, or the numbers of images, labels and names
            differ. (Later: scores have another form or are not finite, or a label has no score.)
    """

    def __init__(self, score: Score, explained: str, images: Tensor, labels: Tensor,
                 names: Sequence[int]) -> None:
        if (part := training_part(score)) is not None:
            raise AttributionError(f"{part} is in training mode (dropout, batch statistics): call "
                                   "eval() first")
        if len(images) == 0 or len(images) != len(labels) or len(names) != len(images):
            raise AttributionError(f"{len(images)} images with {len(labels)} labels and "
                                   f"{len(names)} indices: the same number of each is needed, at "
                                   "least 1")
        self.score, self.explained = score, explained
        self.images, self.labels, self.names = images, labels, names

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores or probabilities of any images.

        Args:
            images: float32 (B, C, H, W) in [0, 1].

        Returns:
            Floating point (B, K), differentiable.

        Raises:
            AttributionError: The model returns something else.
        """
        scores = self.score(images)
        if not isinstance(scores, Tensor) or scores.ndim != 2 or len(scores) != len(images) \
                or not scores.is_floating_point():
            returned = (f"{scores.dtype} {tuple(scores.shape)}" if isinstance(scores, Tensor)
                        else f"a {type(scores).__name__}")
            raise AttributionError(f"the model returned {returned} for {len(images)} images; it "
                                   f"must return floating point scores ({len(images)}, K)")
        return scores.softmax(1) if self.explained == "probability" else scores

    @torch.no_grad()
    def of_class(self, versions: Tensor, rows: int, what: str = "image") -> np.ndarray:
        """Return the score of each image's class for a version of each image.

        Args:
            versions: float32 (N, C, H, W), such as the images themselves or their baselines.
            rows: How many of them go through the model together at most.
            what: What messages call a version.

        Returns:
            float64 (N,), finite.

        Raises:
            AttributionError: A score is not finite, or a label has none; the message names the
                image.
        """
        parts = []
        for part in chunks(len(versions), rows):
            scores = self(versions[part])
            labels = self.labels[part]
            outside = ((labels < 0) | (labels >= scores.shape[1])).nonzero()
            if len(outside):
                i = int(outside[0])
                raise AttributionError(f"image {self.names[part.start + i]} has the label "
                                       f"{int(labels[i])}, the model has {scores.shape[1]} scores; "
                                       f"allowed: 0 to {scores.shape[1] - 1}")
            parts.append(scores.gather(1, labels[:, None])[:, 0].double().cpu().numpy())
        values = np.concatenate(parts)
        if not np.isfinite(values).all():
            i = int(np.argmin(np.isfinite(values)))
            raise AttributionError(f"the model gives the {what} {self.names[i]} the score "
                                   f"{values[i]}: only finite scores can be explained")
        return values

    def finite(self, maps: Tensor) -> np.ndarray:
        """Return maps as an array, after checking that they are finite.

        Args:
            maps: Floating point (N, C, H, W), on any device.

        Returns:
            float32 (N, C, H, W), C-contiguous.

        Raises:
            AttributionError: A map is not finite; the message names the image.
        """
        whole = maps.detach().float().cpu().numpy()
        good = np.isfinite(whole).reshape(len(whole), -1).all(1)
        if not good.all():
            raise AttributionError(f"the map of image {self.names[int(np.argmin(good))]} is not "
                                   f"finite ({int((~good).sum())} such images): the model's scores "
                                   "or gradients are not")
        return np.ascontiguousarray(whole)


def open_images(
    images: np.ndarray, labels: np.ndarray, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Bring images and labels onto a device.

    Args:
        images: uint8 (N, H, W, C).
        labels: Whole numbers (N,).
        device: The device.

    Returns:
        The images, float32 (N, C, H, W) in [0, 1], and the labels, int64 (N,).

    Raises:
        AttributionError: The images have another form.
    """
    if images.ndim != 4 or images.dtype != np.uint8:
        raise AttributionError("images must be uint8 (N, H, W, C), got "
                               f"{images.dtype} {images.shape}")
    # Copies: images and labels may be read-only files.
    stack = torch.from_numpy(np.array(images)).to(device)
    pixels = (stack.permute(0, 3, 1, 2).float() / 255).contiguous()
    return pixels, torch.from_numpy(np.array(labels, np.int64)).to(device)


def names_of(indices: np.ndarray | None, count: int) -> list[int]:
    """Return what messages call images: their indices in the data set, else 0 to count-1."""
    return list(range(count)) if indices is None else [int(i) for i in indices]


def chunks(total: int, size: int) -> Iterator[slice]:
    """Yield slices of at most `size` that cover 0 to total-1, all about equally long."""
    step = math.ceil(total / math.ceil(total / max(1, size))) if total else 1
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))


def rows_that_fit(scores: ClassScores, memory_bytes: int) -> int:
    """Return how many images fit through the model together, with what a gradient needs.

    What a gradient keeps of one image is measured; the model's own parameters are not counted.

    Args:
        scores: The model with its images.
        memory_bytes: The memory on a CPU; on a GPU it is half of what is free there.

    Returns:
        At least 1, on a CPU at most 200, on a GPU at most 4096.
    """
    model = scores.score
    own = {p.data_ptr() for p in model.parameters()} if isinstance(model, nn.Module) else set()
    image, kept = scores.images[:1].clone().requires_grad_(), [0]

    def count(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            kept[0] += tensor.nbytes
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with torch.enable_grad(), hooks:
        scores(image)
    most = 200
    if image.device.type == "cuda":
        memory_bytes, most = torch.cuda.mem_get_info(image.device)[0] // 2, 4096
    # As much again for the gradients themselves, and what a forward needs for a moment.
    return max(1, min(most, memory_bytes // (3 * kept[0] + 4 * image.nbytes)))


def until_it_fits(work: Callable[[int], T], rows: int) -> T:
    """Return work(rows), with half as many rows again and again while the memory runs out.

    Raises:
        torch.OutOfMemoryError: Not even one row fits.
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


def completeness_gaps(
    maps: np.ndarray | Tensor, scores: np.ndarray, base_values: np.ndarray
) -> np.ndarray:
    """Return how far maps are from summing to score - base value.

    Args:
        maps: (N, ...), of any shape.
        scores: float64 (N,).
        base_values: float64 (N,).

    Returns:
        float64 (N,): the absolute difference, as a share of the sum of the map's absolute values.
    """
    flat = np.asarray(maps, np.float64).reshape(len(maps), -1)
    size = np.maximum(np.abs(flat).sum(1), np.finfo(np.float32).tiny)
    gaps: np.ndarray = np.abs(flat.sum(1) - (scores - base_values)) / size
    return gaps
