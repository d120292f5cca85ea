"""What every approach answers: which maps it needs, what it searches, what it is made of, and how it is trained.

Planning is pure bookkeeping; torch is imported where a training begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from impactx.experiment.units import Unit
from impactx.settings import (
    ApproachSettings,
    ModelSettings,
    Settings,
    TrainingSettings,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from impactx.datasets import Dataset, Split
    from impactx.experiment.plan import Cell, Configuration
    from impactx.experiment.workplace import Workplace
    from impactx.explain.attribution import Attribution
    from impactx.models import Classifier
    from impactx.training import FitResult

Point = dict[str, float]  # a candidate of an approach's search


@dataclass(frozen=True)
class Basis:
    """What the approaches of one repeat start from: the unit that trains A, and A's result (with its weights)."""

    cell: Cell
    configuration: Configuration
    repeat: int
    a: Unit
    a_result: Mapping[str, Any]

    def maps(self, attribution: Attribution | None = None, *, target: str = "label",
             part: str = "train") -> Unit:
        """The maps that an attribution (None: the experiment's) makes of this A; see `Cell.maps`."""
        return self.cell.maps(self.a, self.a_result, self.repeat, attribution=attribution, target=target, part=part)


@dataclass(frozen=True)
class Bench:
    """What a training has at hand. how: the arguments of `training.fit` that are the same for every approach."""

    unit: Unit
    place: Workplace
    data: Dataset
    split: Split
    model: ModelSettings
    training: TrainingSettings
    how: Mapping[str, Any]

    def maps(self) -> tuple[np.ndarray, float | np.ndarray]:
        """The maps that the unit's inputs name, and the factor(s) by which they are to be multiplied.

        Raises StoreError where they are not those of the unit's recipe.
        """
        from impactx.explain.maps.scale import map_scale
        from impactx.explain.maps.store import MapStore

        store = MapStore.open(self.place.artifacts.storage, self.unit.inputs["maps"], self.unit.recipe["maps"])
        maps = self.place.map_array(store, self.data)
        return maps, map_scale(maps, self.split.train, self.unit.inputs["scale"])

    def classifier(self) -> Classifier:
        """The classifier A that the unit starts from."""
        return self.place.checkpoint(self.unit.inputs["checkpoint"], self.unit.recipe["weights"]).model


@dataclass(frozen=True)
class Trained:
    """What a training left. settings: for the checkpoint.

    map_scale: what the network's maps are multiplied with for the attribution's units, where it makes maps; best:
    metrics of the model that stand for those of the best epoch; extra: plain values for the unit's result.
    """

    model: nn.Module
    fit: FitResult
    settings: Settings | None = None
    map_scale: float | None = None
    best: Mapping[str, float] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


class Approach:
    """One entry of the setting `approaches`.

    makes_maps: whether its model makes maps in its forward pass (`with_maps`); networks: how many networks of A's size
    a forward pass for its scores runs through, about.
    """

    makes_maps = False
    networks = 2

    def __init__(self, name: str, settings: ApproachSettings) -> None:
        self.name = name
        self.settings: Any = settings

    # ---- the plan

    @property
    def attribution(self) -> Attribution | None:
        """The attribution of its own that makes its maps; None: the experiment's, or there are no maps."""
        return getattr(self.settings, "attribution", None)

    def stores(self, basis: Basis) -> list[Unit]:
        """The stores of maps that its trainings and tests need in a repeat."""
        return []

    def points(self) -> list[Point]:
        """What is searched; one point: nothing is."""
        return [{"learning_rate_factor": f} for f in getattr(self.settings, "learning_rate_factors", [1.0])]

    def trials(self, basis: Basis) -> list[tuple[Unit, Point]]:
        """One trial a point, in repeat 0. Empty where there is only one: nothing to choose."""
        points = self.points()
        return [(self._unit("trial", basis, point), point) for point in points] if len(points) > 1 else []

    def model(self, basis: Basis, point: Point) -> Unit:
        """The final training in one repeat."""
        return self._unit("model", basis, point)

    def maps_in_training(self, images: int, epochs: int) -> int:
        """How many maps one training of at most so many epochs makes itself; images: of its training part."""
        return 0

    def explains(self, model: ModelSettings, data: Dataset, seed: int) -> nn.Module:
        """What these maps explain, freshly built: images to scores. Only where trainings make any."""
        raise NotImplementedError

    def without_maps_in_training(self) -> Approach:
        """The same, but that its trainings of a few epochs make no maps: to measure the rest of their time."""
        return self

    def check(self, model: ModelSettings, num_classes: int, image_size: tuple[int, int]) -> None:
        """Raise ValueError where the approach cannot be had for such a model and images, before anything starts."""

    def _label(self, point: Point) -> str:
        """What tells a point from others, in a unit's name."""
        return f" rate x{point['learning_rate_factor']:g}" if len(self.points()) > 1 else ""

    def _recipe(self, basis: Basis, point: Point) -> dict[str, Any]:
        """What the network depends on beside settings, data, model and seed."""
        return {}

    def _inputs(self, basis: Basis) -> dict[str, Any]:
        """Where to find what goes in."""
        return {}

    def _params(self, basis: Basis, point: Point) -> dict[str, Any]:
        """What MLflow shows of it beside the usual."""
        return {}

    def _unit(self, role: str, basis: Basis, point: Point) -> Unit:
        from impactx.experiment.plan import Configuration

        c, s = basis.configuration, self.settings
        rate = getattr(s, "learning_rate", None) or c.learning_rate
        point_of_c = Configuration(rate * point.get("learning_rate_factor", 1.0),
                                   getattr(s, "batch_size", None) or c.batch_size, c.validation_fraction)
        name = f"{self.name}{self._label(point)}" + (f" repeat {basis.repeat}" if role == "model" else "")
        return basis.cell.training(
            role, name, 2, self.name, point_of_c, basis.repeat,
            {"approach": s.described()} | self._recipe(basis, point),
            {"approach": s.model_dump(mode="json")} | self._inputs(basis), self._params(basis, point))

    # ---- the work

    def train(self, bench: Bench) -> Trained:
        """Train one unit of this approach, wherever that is."""
        raise NotImplementedError
