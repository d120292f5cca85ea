"""IMPACTX, trained in two stages, and the controls that differ from it by lambda or by what the decoder is taught."""

from __future__ import annotations

from typing import Any

from impactx.experiment.approaches.base import Approach, Basis, Bench, Point, Trained
from impactx.experiment.units import Unit


class ImpactxApproach(Approach):
    """settings: ImpactxSettings."""

    makes_maps = True

    def stores(self, basis: Basis) -> list[Unit]:
        """The maps of the training images."""
        return [basis.maps(self.attribution)]

    def points(self) -> list[Point]:
        """The lambdas, each with every factor of the learning rate; a factor of 1 is not named."""
        return [{"lambda": weight} | ({} if one["learning_rate_factor"] == 1 else one)
                for weight in self.settings.lambdas for one in super(ImpactxApproach, self).points()]

    def _label(self, point: Point) -> str:
        factor = point.get("learning_rate_factor", 1)
        return f" lambda={point['lambda']:g}" + (f" rate x{factor:g}" if factor != 1 else "")

    def _recipe(self, basis: Basis, point: Point) -> dict[str, Any]:
        return point | {"weights": basis.a_result["weights"], "maps": basis.maps(self.attribution).key,
                        "map_scale": basis.cell.settings.maps.scale}

    def _inputs(self, basis: Basis) -> dict[str, Any]:
        return {"checkpoint": basis.a.folder, "maps": basis.maps(self.attribution).folder,
                "scale": basis.cell.settings.maps.scale}

    def _params(self, basis: Basis, point: Point) -> dict[str, Any]:
        control = {"taught": self.settings.maps} if self.settings.maps != "own" else {}
        return point | {"maps": basis.maps(self.attribution).key, "map_scale": basis.cell.settings.maps.scale} | control

    def train(self, bench: Bench) -> Trained:
        """See Approach.train."""
        from impactx.training import train_stage2

        maps, scale = bench.maps()
        net, result = train_stage2(
            bench.data, bench.split, bench.model, bench.training, classifier=bench.classifier(),
            approach=self.settings, weight=bench.unit.recipe["lambda"], maps=maps, scale=scale, **bench.how)
        # The network's maps are in scaled units: 1 / scale leads back to the attribution's own.
        return Trained(net, result, self.settings, 1 / scale if isinstance(scale, float) else None)
