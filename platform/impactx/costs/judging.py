"""The forward passes that judging a model's maps takes."""

from __future__ import annotations

from dataclasses import dataclass

from impactx.approaches.baseline import BASELINE
from impactx.evaluation.quality import metrics_of
from impactx.experiment.cell import Cell
from impactx.experiment.steps.quality import MapQuality
from impactx.explain.attribution import Attribution
from impactx.settings.extensions import AttributionSettings


@dataclass(frozen=True)
class Passes:
    """Forward passes of single images for one purpose; a gradient counts as three.

    Attributes:
        attribution: As fast as whose evaluations they are.
        networks: Of A's size, that each pass runs through.
        least, most: Their number, which differs where it depends on what the model gets wrong.
    """

    attribution: AttributionSettings
    networks: int
    least: int
    most: int


@dataclass(frozen=True)
class JudgingPasses:
    """What one judgement takes: the maps of attributions, and the metrics.

    Attributes:
        images: Test images.
    """

    images: int
    maps: list[Passes]
    metrics: Passes

    @property
    def all(self) -> list[Passes]:
        """Everything."""
        return [*self.maps, self.metrics]

    @property
    def most(self) -> int:
        """All passes, at most."""
        return sum(passes.most for passes in self.all)


def passes_of(step: MapQuality, cell: Cell, size: tuple[int, int] | None = None) -> JudgingPasses:
    """Return the forward passes of a judgement.

    Args:
        step: The judgement.
        cell: Its data set and model.
        size: (height, width) of the images, where the cell's facts do not say.
    """
    e, facts = step.evaluation, cell.facts
    size = size or facts.image_size
    images = step.images_judged(facts.test_images or e.map_images, facts.num_classes)
    approach = step.approach_name or BASELINE
    networks = 1 if approach == BASELINE else cell.approaches[approach].networks
    maps = []
    for order in step.orders:
        a_map = order.attribution.evaluations(size) if isinstance(
            order.attribution, Attribution) else None
        most = images * (a_map or 0)
        maps.append(Passes(order.attribution, 1 if order.of_a else networks,
                           0 if order.beside else most, most))
    own = step.makes_maps and step.decoder_is_trained and "own" in e.orders
    orders = own + len(step.orders) + (step.learned is not None and "mean_map" in e.orders)
    passes = images * sum(metric.evaluations(size, orders) for metric in metrics_of(e))
    return JudgingPasses(images, maps, Passes(step.attribution, networks, passes, passes))
