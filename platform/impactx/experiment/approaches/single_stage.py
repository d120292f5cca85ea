"""IMPACTX trained in a single stage: no A, no store; it makes its maps of itself as it learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from impactx.experiment.approaches.base import Approach, Basis, Bench, Point, Trained
from impactx.experiment.units import Unit
from impactx.settings import ModelSettings
from impactx.storage import Storage

if TYPE_CHECKING:
    from torch import nn

    from impactx.datasets import Dataset


class UnitFiles:
    """Files in a unit's folder, for training.single_stage."""

    def __init__(self, storage: Storage, unit: Unit) -> None:
        self.storage, self.folder = storage, unit.folder

    def write(self, name: str, content: bytes) -> None:
        """See Storage.write."""
        self.storage.write(f"{self.folder}/{name}", content)

    def read(self, name: str) -> bytes:
        """See Storage.read."""
        return self.storage.read(f"{self.folder}/{name}")

    def delete(self, name: str) -> None:
        """See Storage.delete."""
        self.storage.delete(f"{self.folder}/{name}")


class SingleStageApproach(Approach):
    """settings: SingleStageSettings."""

    makes_maps = True

    def points(self) -> list[Point]:
        """The lambdas."""
        return [{"lambda": weight} for weight in self.settings.lambdas]

    def maps_in_training(self, images: int, epochs: int) -> int:
        """A round after every explain_every epochs but the last."""
        return (epochs - 1) // self.settings.explain_every * max(1, round(self.settings.explain_share * images))

    def explains(self, model: ModelSettings, data: Dataset, seed: int) -> nn.Module:
        """See Approach.explains: its own logits."""
        from impactx.models import build_single_stage
        from impactx.models.logits import Logits

        return Logits(build_single_stage(self.settings, model, data.num_classes, data.image_size, seed=seed,
                                         channels=data.channels))

    def without_maps_in_training(self) -> Approach:
        """See Approach.without_maps_in_training."""
        return SingleStageApproach(self.name, self.settings.model_copy(update={"explain_every": 10**6}))

    def _label(self, point: Point) -> str:
        return f" lambda={point['lambda']:g}"

    def _attribution(self, basis: Basis) -> dict[str, Any]:
        return (self.attribution or basis.cell.settings.attribution).described()

    def _recipe(self, basis: Basis, point: Point) -> dict[str, Any]:
        return point | {"attribution": self._attribution(basis), "map_scale": basis.cell.settings.maps.scale}

    def _inputs(self, basis: Basis) -> dict[str, Any]:
        return {"scale": basis.cell.settings.maps.scale}

    def _params(self, basis: Basis, point: Point) -> dict[str, Any]:
        return point | {"map_scale": basis.cell.settings.maps.scale}

    def train(self, bench: Bench) -> Trained:
        """See Approach.train. The result has the seconds that went into maps."""
        from impactx.settings import extensions
        from impactx.training import train_single_stage

        recipe, place = bench.unit.recipe, bench.place
        net, result = train_single_stage(
            bench.data, bench.split, bench.model, bench.training, approach=self.settings,
            attribution=extensions.attribution.parse(recipe["attribution"]), weight=recipe["lambda"],
            scale=bench.unit.inputs["scale"], memory_bytes=place.memory_bytes,
            files=UnitFiles(place.artifacts.storage, bench.unit), **bench.how)
        factor = float(net.factor)
        seconds = sum(row.get("explain_seconds", 0.0) for row in result.history)
        return Trained(net, result, self.settings, 1 / factor if factor > 0 else None,
                       extra={"explain_seconds": seconds})
