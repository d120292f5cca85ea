"""Weighted average explanations: a map of all classes for every image, of the test images as well."""

from __future__ import annotations

from typing import Any

from impactx.experiment.approaches.base import Approach, Basis, Bench, Point, Trained
from impactx.experiment.units import Unit


class WaeApproach(Approach):
    """settings: WaeSettings."""

    def stores(self, basis: Basis) -> list[Unit]:
        """The class-weighted maps of the training images and of the test images."""
        return [self._maps(basis), self._maps(basis, "test")]

    def _maps(self, basis: Basis, part: str = "train") -> Unit:
        return basis.maps(self.attribution, target="class_weighted", part=part)

    def _recipe(self, basis: Basis, point: Point) -> dict[str, Any]:
        return {"weights": basis.a_result["weights"], "maps": self._maps(basis).key,
                "map_scale": basis.cell.settings.maps.scale}

    def _inputs(self, basis: Basis) -> dict[str, Any]:
        test = self._maps(basis, "test")
        return {"checkpoint": basis.a.folder, "maps": self._maps(basis).folder,
                "scale": basis.cell.settings.maps.scale, "attribution": test.inputs["attribution"],
                "test_maps": {"key": test.key, "folder": test.folder}}

    def _params(self, basis: Basis, point: Point) -> dict[str, Any]:
        return {"maps": self._maps(basis).key, "map_scale": basis.cell.settings.maps.scale}

    def train(self, bench: Bench) -> Trained:
        """See Approach.train. The checkpoint's settings name the attribution: whoever uses the model needs it."""
        from impactx.settings import extensions
        from impactx.training import train_wae

        maps, scale = bench.maps()
        net, result = train_wae(bench.data, bench.split, bench.model, bench.training, classifier=bench.classifier(),
                                approach=self.settings, maps=maps, scale=scale, **bench.how)
        attribution = extensions.attribution.parse(bench.unit.inputs["attribution"])
        return Trained(net, result, self.settings.model_copy(update={"attribution": attribution}))
