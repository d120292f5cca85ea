"""What a cell is made of before it runs: its units, as cell_run will make them, which are finished, and their size.

Nothing is computed here. What is known only once something else is finished (the selected point, A's weights) is made
up until then, and so are units that depend on it: they are as many and as large as the real ones, but never finished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from impactx.approaches.base import Approach
from impactx.evaluation.morf import grid_of
from impactx.experiment.budget import Budget
from impactx.experiment.explanations import images_judged
from impactx.experiment.plan import BASELINE, Cell, Configuration, SelectionError, select
from impactx.experiment.subject import orders_of, wants_own_maps
from impactx.experiment.units import Artifacts, Unit
from impactx.explain.store import HEAD, MapStore
from impactx.settings import AttributionSettings, EvaluationSettings, parse_attribution


@dataclass(frozen=True)
class Step:
    """Units of one kind: those that are finished, and those that are still to be done."""

    units: list[Unit]
    made: list[Unit]
    left: list[Unit]


@dataclass(frozen=True)
class Passes:
    """Forward passes of single images for one purpose; a gradient counts as three.

    attribution: as fast as whose maps they are; networks: of A's size, that each runs through; least, most: their
    number, which differs where it depends on what the model gets wrong.
    """

    attribution: AttributionSettings
    networks: int
    least: int
    most: int


@dataclass(frozen=True)
class Judgement:
    """The work of judging one model's maps on so many images.

    approach: None for A; taught: whose maps the model learned, None for none. size, of its methods: (height, width).
    """

    unit: Unit
    approach: Approach | None
    taught: AttributionSettings | None
    images: int

    @property
    def attributions(self) -> list[AttributionSettings]:
        """Those whose speed it depends on, the experiment's first: MoRF's passes are priced by it."""
        return [self._main, *(order.attribution for order in orders_of(self.unit, self.taught))]

    @property
    def _main(self) -> AttributionSettings:
        return parse_attribution(self.unit.recipe["attribution"])

    def maps(self, size: tuple[int, int]) -> list[Passes]:
        """The passes of the explainers, by order."""
        found = []
        for order in orders_of(self.unit, self.taught):
            most = self.images * (order.attribution.evaluations(size) or 0)
            found.append(Passes(order.attribution, 1 if order.of_a else self._networks, 0 if order.beside else most,
                                most))
        return found

    def morf(self, size: tuple[int, int]) -> Passes:
        """The passes that follow a class while its image is replaced."""
        settings = EvaluationSettings.model_validate(self.unit.recipe["evaluation"])
        own = self.approach is not None and self.approach.makes_maps and wants_own_maps(self.unit)
        maps = own + len(orders_of(self.unit, self.taught)) + (
            self.taught is not None and "mean_map" in settings.orders)
        # Random order, and the first order backwards.
        passes = self.images * (1 + grid_of(size, settings.region).count * (maps + 1 + bool(maps)))
        return Passes(self._main, self._networks, passes, passes)

    def most(self, size: tuple[int, int]) -> int:
        """All passes, at most."""
        return sum(passes.most for passes in [*self.maps(size), self.morf(size)])

    @property
    def _networks(self) -> int:
        return 1 if self.approach is None else self.approach.networks


@dataclass(frozen=True)
class Hours:
    """What is left of stage 1's budget: seconds of training before no other trial is begun (infinitely many without
    one), and how many trials, the first of those that are left, were begun and go on whatever is left."""

    seconds: float = math.inf
    begun: int = 0


@dataclass(frozen=True)
class Survey:
    """The steps of a cell.

    hours: what stage 1's budget has left; points: the configurations that may be the selected one: one once stage 1 is
    over; models: final trainings by approach, A's first; searches: trials by approach, where it has a search of its
    own; judged: the size of judgements, by the unit's key.
    """

    stage1: Step
    hours: Hours
    points: list[Configuration]
    models: dict[str, Step]
    stores: Step
    searches: dict[str, Step]
    judgements: Step
    judged: dict[str, Judgement]

    def exists(self) -> list[str]:
        """What the steps after stage 1 have left already, for people."""
        names = [unit.name for step in (self.models[BASELINE], self.stores) for unit in step.made]
        names += [f"{len(step.made)} trials of {name}" for name, step in self.searches.items() if step.made]
        names += [unit.name for name, step in self.models.items() if name != BASELINE for unit in step.made]
        return names + ([f"{len(self.judgements.made)} judgements"] if self.judgements.made else [])


def survey(cell: Cell, artifacts: Artifacts | None = None) -> Survey:
    """A cell's units, and what of them is finished. artifacts: None for nothing.

    Raises StorageError where a result is damaged, StoreError where the folder of a unit's maps has others.
    """
    results: dict[str, dict[str, Any]] = {}  # by folder: a trial and a final training may have the same recipe

    def step(units: Sequence[Unit], known: bool = True) -> Step:
        """known: whether these are the units that will be made, and not some that stand for them."""
        for unit in units if known and artifacts is not None else []:
            found = artifacts.result(unit)
            if found is not None and (unit.role != "maps" or not shards_left(cell, unit, artifacts)):
                results[unit.folder] = found
        return Step(list(units), [unit for unit in units if known and unit.folder in results],
                    [unit for unit in units if not known or unit.folder not in results])

    stage1, hours, chosen = _stage1(cell, artifacts, step(cell.stage1_trials()), results)
    points = [configuration_of(unit) for unit in ([chosen] if chosen else stage1.units)]
    a = step([cell.stage1_model(points[0], repeat) for repeat in range(cell.settings.repeats)], chosen is not None)
    bases = [cell.basis(points[0], unit, results.get(unit.folder, {"weights": f"of repeat {repeat}"}), repeat)
             for repeat, unit in enumerate(a.units)]
    approaches = cell.approaches()
    stores = step(list({unit.key: unit for basis in bases for approach in approaches
                        for unit in approach.stores(basis)}.values()), chosen is not None)
    searches, models = {}, {BASELINE: a}
    for approach in approaches:
        candidate, known = approach.approach.candidates()[0], chosen is not None
        if trials := approach.trials(bases[0]):
            search = searches[approach.name] = step([unit for unit, _ in trials], known)
            best = _selected(search, results, "val_accuracy")
            known = best is not None
            candidate = next((one for unit, one in trials if best and unit.key == best.key), candidate)
        models[approach.name] = step([approach.model(basis, candidate) for basis in bases], known)
    taught = {unit.folder: parse_attribution(unit.inputs["attribution"]) for unit in stores.units}
    named = {entry.name: entry.approach for entry in approaches}
    judged = {}
    for name, trained in models.items():
        for model in trained.units:
            result = results.get(model.folder, {"weights": f"of {model.key}"})
            if result["weights"] and (unit := cell.explanations(model, result)) is not None:
                e, facts = cell.settings.evaluation, cell.facts
                images = images_judged(e, facts.test_images or e.map_images, facts.num_classes)
                judged[unit.key] = Judgement(unit, named.get(name), taught.get(unit.inputs.get("maps", "")), images)
    judgements = step([judgement.unit for judgement in judged.values()], chosen is not None)
    return Survey(stage1, hours, points, models, stores, searches, judgements, judged)


def _stage1(cell: Cell, artifacts: Artifacts | None, trials: Step, results: Mapping[str, Mapping[str, Any]]
            ) -> tuple[Step, Hours, Unit | None]:
    """Stage 1 without trials that were stopped early or that the budget left out, what the budget has left, and the
    unit that is selected."""
    limit, hours = cell.settings.grid.max_hours, Hours()
    if artifacts is None:
        return trials, Hours(Budget(limit).left), None
    stopped = {unit.folder: found for unit in trials.left if (found := artifacts.stopped(unit)) is not None}
    made = [unit for unit in trials.units if unit.folder in results or unit.folder in stopped]
    left = [unit for unit in trials.left if unit.folder not in stopped]
    if limit is not None:  # as cell_run does it
        begun = [unit for unit in left if artifacts.begun(unit)]
        budget = Budget(limit, [*(results[unit.folder] for unit in trials.made), *stopped.values()])
        left = begun if budget.spent else begun + [unit for unit in left if unit not in begun]
        hours = Hours(budget.left, len(begun))
    found = Step(trials.units, made, left)
    return found, hours, _selected(found, results, cell.selection_metric)


def _selected(search: Step, results: Mapping[str, Mapping[str, Any]], metric: str) -> Unit | None:
    """The unit that a search has come to; None while it is not over, or where it failed."""
    if search.left:
        return None
    try:
        found = {unit.key: results[unit.folder] for unit in search.units if unit.folder in results}
        return select(search.units, found, metric)[0]
    except SelectionError:
        return None  # the job says so; whatever depends on it is still to be done


def configuration_of(unit: Unit) -> Configuration:
    """The point of stage 1's grid that a trial tries."""
    return Configuration(*(unit.params[k] for k in ("learning_rate", "batch_size", "validation_fraction")))


def images_of_store(cell: Cell, unit: Unit, images: int | None) -> int | None:
    """How many maps a store has, of a data set with so many training images; None where that is not known."""
    return (cell.facts.test_images or None) if unit.inputs.get("part") == "test" else images


def shards_left(cell: Cell, unit: Unit, artifacts: Artifacts | None) -> list[int]:
    """How many maps each shard of a store has that is not there yet. Raises StoreError where the store is not its own.
    """
    images, size = images_of_store(cell, unit, cell.facts.train_images) or 0, cell.settings.maps.shard_size
    if artifacts is None or not artifacts.storage.exists(f"{unit.folder}/{HEAD}"):
        return [min(size, images - start) for start in range(0, images, size)]
    store = MapStore.open(artifacts.storage, unit.folder, unit.key)
    return [len(store.shard_indices(shard)) for shard in store.missing()]


def evaluations_of_map(cell: Cell, described: dict, target: str | None, size: tuple[int, int] | None) -> int | None:
    """Of one map; a sum over classes costs as many where the attribution cannot explain the weighted sum itself."""
    attribution = parse_attribution(described)
    each = attribution.evaluations(size)
    apart = target == "class_weighted" and attribution.method != "partition"
    return each and each * (cell.facts.num_classes if apart else 1)
