"""The order of an experiment, for one cell (arXiv 2502.12222, sections 3.3 and 4.3).

Stage 1 searches Table 1's grid for the classifier A and trains the selected configuration once in
each repeat. Every image of the training split then gets a map of each A. Stage 2 searches and
trains every approach that is compared with A, IMPACTX among them. At last each final model reads
the test images once, and its maps are judged on them.

This is the only place that knows the order. A job carries it out (`impactx.run`); `--dry-run` and
`--plan` count it (`impactx.costs`); the report and MLflow show the steps that it came to. A step
that is added here, or taken out, is added or missing everywhere.
"""

from __future__ import annotations

from collections.abc import Generator

from impactx.approaches.base import Candidate
from impactx.approaches.baseline import BASELINE
from impactx.experiment.cell import Cell, Classifier, Configuration
from impactx.experiment.groups import (
    Flow,
    LeftOut,
    Outcomes,
    Request,
    SelectionError,
    do,
    search,
)
from impactx.experiment.steps.base import StepError
from impactx.experiment.steps.training import Model, TrainingResult

Trained = list[tuple[Model, TrainingResult]]


def flow(cell: Cell) -> Flow:
    """Ask for the steps of a cell, one group after the other.

    Raises:
        SelectionError: Stage 1 came to no configuration.
        StepError: No repeat has a classifier A.
    """
    classifiers = yield from stage1(cell)
    others = yield from stage2(cell, [Classifier(a, a.ref(result)) for a, result in classifiers])
    yield from test(cell, classifiers + others)


def stage1(cell: Cell) -> Generator[Request, Outcomes, Trained]:
    """Search the grid for A, and train the selected configuration in each repeat (4.3, Table 1)."""
    grid, repeats = cell.settings.grid, range(cell.settings.repeats)
    trials = [cell.classifier_trial(point) for point in cell.configurations()]
    best = yield from search("stage 1", BASELINE, trials, cell.selection_metric, grid.max_hours)
    configuration = Configuration.of(best.trial)
    steps = [cell.classifier(configuration, repeat) for repeat in repeats]
    trained: Trained = yield from do("training A", steps)
    usable = yield from without_diverged(trained, "the repeat is left out, for every approach")
    if not usable:
        raise StepError(f"no classifier A is left in {len(steps)} repeats, there is nothing to go "
                        "on from")
    return usable


def stage2(cell: Cell, classifiers: list[Classifier]) -> Generator[Request, Outcomes, Trained]:
    """Make the maps of each A; search each approach in one repeat, train it in all (3.3)."""
    stores = {maps.key: maps for a in classifiers for name in cell.approaches
              for maps in cell.maps_of(name, a)}
    explained = yield from do("maps", stores.values())
    present = {maps.key for maps, _ in explained}
    models: list[Model] = []
    for name in cell.approaches:
        lacking = {a: [maps.name for maps in cell.maps_of(name, a) if maps.key not in present]
                   for a in classifiers}
        repeats = [a for a in classifiers if not lacking[a]]
        if not repeats:
            names = ", ".join(name for names in lacking.values() for name in names)
            yield LeftOut(name, f"it has no maps, their making failed: {names}", failed=True)
            continue
        try:
            candidate = yield from approach_search(cell, name, repeats[0])
        except SelectionError as error:
            yield LeftOut(name, f"SelectionError: {error}", failed=True)
            continue
        models += [cell.approach_model(name, candidate, a) for a in repeats]
    trained: Trained = yield from do("final trainings", models)
    return (yield from without_diverged(trained, "it is not in the table"))


def approach_search(cell: Cell, name: str, a: Classifier
                    ) -> Generator[Request, Outcomes, Candidate]:
    """Search an approach's candidates, such as lambda; with one candidate there is no search."""
    candidates = cell.approaches[name].candidates()
    if len(candidates) == 1:
        return candidates[0]
    trials = [cell.approach_trial(name, candidate, a) for candidate in candidates]
    best = yield from search(f"stage 2 of {name}", name, trials, "val_accuracy")
    return best.trial.candidate


def test(cell: Cell, models: Trained) -> Flow:
    """Let every final model read the test images once; then judge its maps on them (4.4, 5.2)."""
    yield from do("tests", [cell.test(model, result) for model, result in models])
    qualities = [cell.map_quality(model, result) for model, result in models]
    yield from do("map quality", [quality for quality in qualities if quality is not None])


def without_diverged(trained: Trained, consequence: str
                     ) -> Generator[Request, Outcomes, Trained]:
    """Leave out trainings that diverged in their first epoch and left no weights."""
    for model, result in trained:
        if result.weights is None:
            yield LeftOut(model.name, f"it diverged in its first epoch: {consequence}",
                          failed=False)
    return [(model, result) for model, result in trained if result.weights is not None]
