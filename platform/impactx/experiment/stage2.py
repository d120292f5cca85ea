"""From an approach to its units: generic over what an approach declares (`approaches.base`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from impactx.approaches.base import Approach, Candidate, MapsNeeded
from impactx.approaches.baseline import Baseline
from impactx.approaches.role import Role
from impactx.experiment.units import Unit
from impactx.settings import AttributionSettings, ExperimentSettings, parse_attribution
from impactx.settings.extensions import approach as registry

if TYPE_CHECKING:
    from impactx.experiment.plan import Cell, Configuration

BASELINE = "baseline"


@dataclass(frozen=True)
class Basis:
    """What the approaches of one repeat start from.

    Attributes:
        cell: The cell.
        configuration: The point of the grid that was selected for A.
        repeat: Number of the repeat, from 0.
        a: The unit that trains A.
        a_result: Its result, with its weights.
    """

    cell: Cell
    configuration: Configuration
    repeat: int
    a: Unit
    a_result: Mapping[str, Any]

    def maps(self, attribution: AttributionSettings | None = None,
             needed: MapsNeeded | None = None) -> Unit:
        """Return a store of maps of this A.

        Args:
            attribution: Makes the maps; None: the experiment's.
            needed: What they are of; None: of the training images' true classes.
        """
        needed = needed or MapsNeeded()
        return self.cell.maps(self.a, self.a_result, self.repeat, attribution=attribution,
                              target=needed.target, part=needed.part)


@dataclass(frozen=True)
class Entry:
    """One entry of the setting `approaches`: its name in the experiment, and the approach."""

    name: str
    approach: Approach

    def stores(self, basis: Basis) -> list[Unit]:
        """Return the stores of maps that its trainings and tests need in a repeat."""
        return [basis.maps(self.approach.own_attribution, needed)
                for needed in self.approach.maps_needed()]

    def trials(self, basis: Basis) -> list[tuple[Unit, Candidate]]:
        """Return one trial for each candidate, in repeat 0; none where there is only one."""
        candidates = self.approach.candidates()
        if len(candidates) == 1:
            return []
        return [(self._unit("trial", basis, candidate), candidate) for candidate in candidates]

    def model(self, basis: Basis, candidate: Candidate) -> Unit:
        """Return the final training of a candidate in one repeat."""
        return self._unit("model", basis, candidate)

    def _unit(self, role: str, basis: Basis, candidate: Candidate) -> Unit:
        from impactx.experiment.plan import Configuration

        c, approach, settings = basis.configuration, self.approach, basis.cell.settings
        rate, batch_size = approach.point(c.learning_rate, c.batch_size, candidate)
        point = Configuration(rate, batch_size, c.validation_fraction)
        attribution = approach.own_attribution or settings.attribution
        recipe: dict[str, Any] = {"approach": approach.described()}
        inputs: dict[str, Any] = {
            "approach": approach.model_dump(mode="json"),
            "attribution": attribution.model_dump(mode="json"),
            "learning_rate_factor": candidate.learning_rate_factor}
        params: dict[str, Any] = {}
        if candidate.weight is not None:
            recipe["lambda"] = params["lambda"] = candidate.weight
        if approach.uses_classifier:
            recipe["weights"], inputs["checkpoint"] = basis.a_result["weights"], basis.a.folder
        for needed in approach.maps_needed():
            store = basis.maps(approach.own_attribution, needed)
            if needed.part == "train":
                recipe["maps"] = params["maps"] = store.key
                inputs["maps"] = store.folder
            else:
                inputs["test_maps"] = {"key": store.key, "folder": store.folder}
        if approach.explains_itself:
            recipe["attribution"] = attribution.described()
        if "maps" in recipe or approach.explains_itself:
            recipe["map_scale"] = params["map_scale"] = settings.maps.scale
        extra = approach.recipe_extra(settings.seed + basis.repeat)
        label = candidate.label()
        if not label and len(approach.candidates()) > 1:  # others have another learning rate
            label = f"rate x{candidate.learning_rate_factor:g}"
        name = " ".join(filter(None, [
            self.name, label, f"repeat {basis.repeat}" if role == "model" else ""]))
        return basis.cell.training(role, name, 2, self.name, point, basis.repeat, recipe | extra,
                                   inputs, params | extra)


def entries_of(settings: ExperimentSettings) -> list[Entry]:
    """Return the approaches that an experiment compares with A, in its order."""
    return [Entry(name, approach) for name, approach in settings.approaches.items()]


def roles(settings: Mapping[str, Any]) -> dict[str, Role]:
    """Return the role of each approach by its name, A's included.

    Args:
        settings: The settings of an experiment, as plain data.
    """
    attribution = parse_attribution(settings["attribution"])
    return {BASELINE: Baseline().role(attribution)} | {
        name: registry.parse(approach).role(attribution)
        for name, approach in settings["approaches"].items()}
