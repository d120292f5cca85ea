"""Most relevant first (MoRF): how fast a model loses its class when noise replaces its image.

Samek et al., "Evaluating the visualization of what a deep neural network has learned", 2017 (the
paper's [37], section 5.2). A map is summed over its channels and over the pixels of each region of
a grid; the regions are replaced in descending order of that sum, and the probability and the logit
of the class that the model predicted for the whole image are followed. The noise of an image is
drawn once and is the same for every order, so orders are compared on the same pixels. An order is
judged on the model that it explains: curves of two models mean something only beside each model's
own random order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from impactx.evaluation.quality import (
    Band,
    MapMetric,
    Measurement,
    MetricResult,
    Record,
    Subject,
)
from impactx.settings.extensions import map_metric

EARLY = 0.16  # Samek et al. replace the first 100 regions of 9x9 pixels, 15.7 % of their images
RANDOM, LEAST = "random", "least_relevant_first"  # orders that are always drawn beside the maps'
_NOISE, _RANDOM = 1, 2  # streams of random numbers


class Curve(Record):
    """The predicted class of an order, with k = 0 ... regions replaced; means over the images."""

    probability: Band
    logit: Band


class Ties(Record):
    """Regions of equal relevance, whose order the grid decides.

    Attributes:
        images: The share of images that have any.
        regions: Their mean number in these images; 0 where there are none.
    """

    images: float
    regions: float


class MorfResult(MetricResult):
    """MoRF of one model.

    The values of an order are areas over the curve (AOPC; the larger, the sooner the class is
    lost): "aopc" of the probability over the first 16 % of the regions, "aopc_all" over all of
    them, "aopc_logit" and "aopc_logit_all" of the logit; and paired differences of each, such as
    "aopc_over_random" and "aopc_logit_over_shap_predicted".

    Attributes:
        region: The side of a region in pixels.
        regions: The number of regions.
        early_regions: The number of the first 16 % of them.
        curves: By order.
        ties: By order, of those that maps give.
    """

    metric: str = "morf"
    region: int
    regions: int
    early_regions: int
    curves: dict[str, Curve]
    ties: dict[str, Ties]

    def metrics(self) -> dict[str, float]:
        """Return the areas of the probability, `morf_aopc_<order>` and `morf_aopc_all_<order>`."""
        return {f"{self.metric}_{name}_{order}": mean for name in ("aopc", "aopc_all")
                for order, values in self.values.items()
                if (mean := values[name].mean) is not None}


@map_metric
class Morf(MapMetric):
    """MoRF curves and the areas over them (Samek et al. 2017; the paper's section 5.2)."""

    result: ClassVar[type[MetricResult]] = MorfResult

    metric: Literal["morf"] = "morf"
    region: int | None = Field(None, ge=1, description=(
        "side in pixels of the regions; None: an eighth of the image's, rounded down to a power "
        "of two (4 at 32, 8 at 96)"))

    def check(self, image_size: tuple[int, int]) -> None:
        """See MapMetric.check."""
        try:
            grid_of(image_size, self.region)
        except ValueError as error:
            raise ValueError(f"region = {self.region}: {error}") from error

    def evaluations(self, image_size: tuple[int, int], orders: int) -> int:
        """See MapMetric.evaluations. Random order and the first order backwards are added."""
        return 1 + grid_of(image_size, self.region).count * (orders + 1 + bool(orders))

    def measure(self, subject: Subject) -> Measurement:
        """See MapMetric.measure.

        Arrays: aopc.<order>.<probability or logit>.<early or all> (N,), and curve.<order>,
        float32 (N, regions + 1), the probabilities.
        """
        height, width, channels = subject.images.shape[1:]
        grid = grid_of((height, width), self.region)
        relevances = {order: relevance(maps, grid) for order, maps in subject.maps.items()}
        ranks = {order: most_relevant_first(values) for order, values in relevances.items()}
        ranks[RANDOM] = random_order(subject.rows, grid, subject.seed)
        if relevances:
            ranks[LEAST] = most_relevant_first(-next(iter(relevances.values())))
        noise = noise_of(subject.rows, (channels, height, width), subject.seed)
        lost = curves(subject.score, subject.pixels, torch.from_numpy(noise).to(subject.device),
                      ranks, grid, batch_size=subject.batch_size)
        areas = {order: _areas(one, grid) for order, one in lost.items()}
        against = [RANDOM] + [order for order in relevances if order.endswith("_predicted")][:1]
        scores = {order: {f"aopc{end}": values for end, values in of.items()}
                  | {f"aopc{end}_over_{other}": values - areas[other][end]
                     for other in against if other != order for end, values in of.items()}
                  for order, of in areas.items()}
        tied = {order: ties(values) for order, values in relevances.items()}
        result = MorfResult(
            values=subject.intervals(scores), region=grid.side, regions=grid.count,
            early_regions=grid.early,
            curves={order: Curve(probability=subject.band(one.probability),
                                 logit=subject.band(one.logit)) for order, one in lost.items()},
            ties={order: Ties(images=float((count > 0).mean()),
                              regions=float(count[count > 0].mean()) if count.any() else 0.0)
                  for order, count in tied.items()})
        arrays = {f"curve.{order}": one.probability.astype(np.float32)
                  for order, one in lost.items()}
        for order, of in areas.items():
            arrays |= {f"aopc.{order}.{_KEPT[end]}": values for end, values in of.items()}
        return Measurement(result, arrays)


# The quantity and the part of the regions of an area, by the end of the value's name.
_KEPT = {"": "probability.early", "_all": "probability.all",
         "_logit": "logit.early", "_logit_all": "logit.all"}


def _areas(curves_of_order: Curves, grid: Grid) -> dict[str, np.ndarray]:
    return {end: aopc(getattr(curves_of_order, quantity),
                      grid.early if part == "early" else grid.count)
            for end, (quantity, part) in ((end, kept.split(".")) for end, kept in _KEPT.items())}


@dataclass(frozen=True)
class Grid:
    """The regions of an image.

    Attributes:
        index: int64 (H, W), the region that a pixel belongs to, counted row by row.
        side: The side of a region in pixels.
        count: The number of regions.
    """

    index: np.ndarray
    side: int
    count: int

    @property
    def early(self) -> int:
        """The number of steps that replace the first 16 % of the regions, at least 1."""
        return max(1, round(EARLY * self.count))


@dataclass(frozen=True)
class Curves:
    """What becomes of the predicted class of each image.

    Attributes:
        probability: float64 (N, regions + 1), entry k with k regions replaced.
        logit: The same of the class's score before the softmax.
        predicted: int64 (N,), the class of the whole image.
    """

    probability: np.ndarray
    logit: np.ndarray
    predicted: np.ndarray


def region_side(image_size: tuple[int, int]) -> int:
    """Return the default side of a region, in pixels.

    It is an eighth of the image's shorter side, rounded down to a power of two; 32: 4, 96: 8,
    224: 16.
    """
    return 1 << ((max(8, min(image_size)) // 8).bit_length() - 1)


def grid_of(image_size: tuple[int, int], side: int | None = None) -> Grid:
    """Return square regions; the last of a row or column may be smaller.

    Args:
        image_size: (height, width) in pixels.
        side: Of a region, in pixels; None: `region_side`.

    Raises:
        ValueError: The side is not between 1 and the shorter side of the image.
    """
    side = region_side(image_size) if side is None else side
    if not 1 <= side <= min(image_size):
        raise ValueError(f"regions of {side}x{side} pixels on images of "
                         f"{image_size[0]}x{image_size[1]}: allowed are 1 to {min(image_size)}")
    height, width = image_size
    across = -(-width // side)
    index = (np.arange(height)[:, None] // side) * across + np.arange(width)[None, :] // side
    return Grid(index.astype(np.int64), side, int(index[-1, -1]) + 1)


def relevance(maps: np.ndarray, grid: Grid) -> np.ndarray:
    """Sum maps (N, C, H, W) over channels and over each region; returns float64 (N, regions)."""
    summed = np.asarray(maps, np.float64).sum(1)
    # Pixel by pixel: equal regions must have equal sums, or rounding would decide between ties.
    places = grid.index.ravel() + grid.count * np.arange(len(maps))[:, None]
    sums = np.bincount(places.ravel(), summed.ravel(), len(maps) * grid.count)
    return sums.reshape(len(maps), grid.count)


def most_relevant_first(values: np.ndarray) -> np.ndarray:
    """Rank regions by their relevance (N, regions).

    Returns:
        int64 (N, regions): 0 for the largest value; of equal ones the first in the grid comes
        first.
    """
    order = np.argsort(-values, axis=1, kind="stable")
    ranks = np.empty_like(order)
    steps = np.arange(values.shape[1])[None].repeat(len(values), 0)
    np.put_along_axis(ranks, order, steps, axis=1)
    return ranks


def ties(values: np.ndarray) -> np.ndarray:
    """Count the regions of each image that share their relevance with another one.

    Args:
        values: (N, regions).

    Returns:
        int64 (N,).
    """
    counts = []
    for row in values:
        _, times = np.unique(row, return_counts=True)
        counts.append(int(times[times > 1].sum()))
    return np.array(counts, np.int64)


def random_order(indices: np.ndarray, grid: Grid, seed: int) -> np.ndarray:
    """Draw ranks in random order, int64 (N, regions): each image's by its index in the data set."""
    return np.stack([np.random.default_rng([seed, _RANDOM, int(i)]).permutation(grid.count)
                     for i in indices])


def noise_of(indices: np.ndarray, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Draw uniform noise in [0, 1), float32 (N, *shape): each image's by its index."""
    return np.stack([np.random.default_rng([seed, _NOISE, int(i)]).random(shape, np.float32)
                     for i in indices])


@torch.no_grad()
def curves(score: Callable[[Tensor], Tensor], images: Tensor, noise: Tensor,
           orders: Mapping[str, np.ndarray], grid: Grid, *, batch_size: int = 2048
           ) -> dict[str, Curves]:
    """Follow the predicted class while regions are replaced, in every order.

    Args:
        score: Images (B, C, H, W) to logits (B, K).
        images: float (N, C, H, W) in [0, 1], on the device where scores are computed.
        noise: What replaces them, the same shape.
        orders: Ranks by name, int64 (N, regions) each.
        grid: The regions.
        batch_size: Images in one forward pass.

    Raises:
        ValueError: Scores are not finite; the message names the order.
    """
    index = torch.from_numpy(grid.index).to(images.device)
    steps = torch.arange(1, grid.count + 1, device=images.device)
    whole = torch.cat([score(part) for part in torch.split(images, batch_size)]).double()
    predicted = whole.argmax(1)
    at_once = max(1, batch_size // grid.count)
    followed = {}
    for name, ranks in orders.items():
        # (N, H, W): how many steps come before the one that replaces a pixel
        when = torch.from_numpy(np.ascontiguousarray(ranks)).to(images.device)[:, index]
        rows: list[Tensor] = []
        for start in range(0, len(images), at_once):
            part = slice(start, start + at_once)
            hidden = when[part, None] < steps[None, :, None, None]  # (n, steps, H, W)
            mixed = torch.where(hidden[:, :, None], noise[part, None], images[part, None])
            batches = torch.split(mixed.flatten(0, 1), batch_size)
            rows.append(torch.cat([score(batch) for batch in batches]).double())
        replaced = torch.cat(rows).reshape(len(images), grid.count, -1)
        scores = torch.cat([whole[:, None], replaced], 1)
        if not torch.isfinite(scores).all():
            raise ValueError(f"the model gives scores that are not finite in the order {name!r}")
        classes = predicted[:, None, None].expand(-1, grid.count + 1, 1)
        probability, logit = (v.gather(2, classes)[..., 0].cpu().numpy()
                              for v in (scores.softmax(2), scores))
        followed[name] = Curves(probability, logit, predicted.cpu().numpy())
    return followed


def aopc(curve: np.ndarray, steps: int) -> np.ndarray:
    """Average the drop of a curve, the area over it (Samek et al. 2017, equation 12).

    Args:
        curve: (N, regions + 1).
        steps: How many steps count.

    Returns:
        float64 (N,): the mean of f(x) - f(x_k) over k = 0 ... steps. The larger, the sooner the
        class is lost.
    """
    return np.asarray((curve[:, :1] - curve[:, :steps + 1]).mean(1))
