"""Most relevant first (MoRF): how fast a model loses its class when its image is replaced by noise, region by region.

Samek et al., "Evaluating the visualization of what a deep neural network has learned", 2017 (the paper's [37], section
5.2).  A map is summed over its channels and over the pixels of each region of a grid; the regions are replaced in
descending order of that sum, and the probability and the logit of the class that the model predicted for the whole
image are followed.  The noise of an image is drawn once and is the same for every order, so orders are compared on the
same pixels.  An order is judged on the model that it explains: curves of two models mean something only beside each
model's own random order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

EARLY = 0.16  # Samek et al. replace the first 100 regions of 9x9 pixels, 15.7 % of their images
_NOISE, _RANDOM = 1, 2  # streams of random numbers


@dataclass(frozen=True)
class Grid:
    """The regions of an image. index: int64 (H, W), the region that a pixel belongs to, row by row; count: of them."""

    index: np.ndarray
    side: int
    count: int

    @property
    def early(self) -> int:
        """The number of steps that replace the first 16 % of the regions, at least 1."""
        return max(1, round(EARLY * self.count))


@dataclass(frozen=True)
class Curves:
    """What becomes of the predicted class. probability, logit: float64 (N, regions + 1), entry k with k regions
    replaced; predicted: int64 (N,), the class of the whole image."""

    probability: np.ndarray
    logit: np.ndarray
    predicted: np.ndarray


def region_side(image_size: tuple[int, int]) -> int:
    """The default: an eighth of the shorter side, rounded down to a power of two; 32: 4, 96: 8, 224: 16."""
    return 2 ** ((max(8, min(image_size)) // 8).bit_length() - 1)


def grid_of(image_size: tuple[int, int], side: int | None = None) -> Grid:
    """Square regions of `side` pixels (None: `region_side`); the last of a row or column may be smaller.

    Raises ValueError for a side that is not between 1 and the shorter side of the image.
    """
    side = region_side(image_size) if side is None else side
    if not 1 <= side <= min(image_size):
        raise ValueError(f"regions of {side}x{side} pixels on images of {image_size[0]}x{image_size[1]}: allowed are "
                         f"1 to {min(image_size)}")
    height, width = image_size
    across = -(-width // side)
    index = (np.arange(height)[:, None] // side) * across + np.arange(width)[None, :] // side
    return Grid(index.astype(np.int64), side, int(index[-1, -1]) + 1)


def relevance(maps: np.ndarray, grid: Grid) -> np.ndarray:
    """The sum of a map over channels and over each region: float64 (N, regions), of maps (N, C, H, W)."""
    summed = np.asarray(maps, np.float64).sum(1)
    # One pixel after the other: equal regions must have equal sums, or rounding would decide between ties.
    places = grid.index.ravel() + grid.count * np.arange(len(maps))[:, None]
    return np.bincount(places.ravel(), summed.ravel(), len(maps) * grid.count).reshape(len(maps), grid.count)


def most_relevant_first(values: np.ndarray) -> np.ndarray:
    """The rank of each region, int64 (N, regions): 0 for the largest value, of equal ones the first in the grid."""
    order = np.argsort(-values, axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(values.shape[1])[None].repeat(len(values), 0), axis=1)
    return ranks


def ties(values: np.ndarray) -> np.ndarray:
    """int64 (N,): how many of an image's regions share their value with another one, so the grid decided."""
    found = []
    for row in values:
        _, times = np.unique(row, return_counts=True)
        found.append(int(times[times > 1].sum()))
    return np.array(found, np.int64)


def random_order(indices: np.ndarray, grid: Grid, seed: int) -> np.ndarray:
    """Ranks in random order, int64 (N, regions); an image's own, by its index in the data set."""
    return np.stack([np.random.default_rng([seed, _RANDOM, int(i)]).permutation(grid.count) for i in indices])


def noise_of(indices: np.ndarray, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Uniform noise in [0, 1), float32 (N, *shape); an image's own, by its index in the data set."""
    return np.stack([np.random.default_rng([seed, _NOISE, int(i)]).random(shape, np.float32) for i in indices])


@torch.no_grad()
def curves(score: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor, orders: Mapping[str, np.ndarray],
           grid: Grid, *, batch_size: int = 2048) -> dict[str, Curves]:
    """The curves of every order.

    score: images (B, C, H, W) -> logits (B, K); images, noise: float (N, C, H, W) in [0, 1], on the device where the
    scores are computed; orders: ranks by name, int64 (N, regions) each. batch_size: images a forward.
    Raises ValueError, naming the order, for scores that are not finite.
    """
    index = torch.from_numpy(grid.index).to(images.device)
    steps = torch.arange(1, grid.count + 1, device=images.device)
    whole = torch.cat([score(part) for part in images.split(batch_size)]).double()
    predicted = whole.argmax(1)
    at_once = max(1, batch_size // grid.count)
    found = {}
    for name, ranks in orders.items():
        # (N, H, W): how many steps come before the one that replaces a pixel
        when = torch.from_numpy(np.ascontiguousarray(ranks)).to(images.device)[:, index]
        rows: list[Tensor] = []
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            hidden = when[part, None] < steps[None, :, None, None]  # (n, steps, H, W)
            mixed = torch.where(hidden[:, :, None], noise[part, None], images[part, None])
            rows.append(torch.cat([score(b) for b in mixed.flatten(0, 1).split(batch_size)]).double())
        scores = torch.cat([whole[:, None], torch.cat(rows).unflatten(0, (len(images), grid.count))], 1)
        if not torch.isfinite(scores).all():
            raise ValueError(f"the model gives scores that are not finite in the order {name!r}")
        classes = predicted[:, None, None].expand(-1, grid.count + 1, 1)
        probability, logit = (v.gather(2, classes)[..., 0].cpu().numpy() for v in (scores.softmax(2), scores))
        found[name] = Curves(probability, logit, predicted.cpu().numpy())
    return found


def aopc(curve: np.ndarray, steps: int) -> np.ndarray:
    """Area over the perturbation curve, float64 (N,): the mean of f(x) - f(x_k) over k = 0 ... steps (theirs, eq. 12).

    curve: (N, regions + 1). Larger: the class is lost sooner.
    """
    return (curve[:, :1] - curve[:, :steps + 1]).mean(1)
