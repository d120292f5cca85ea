"""What a job would do, cell by cell and group by group, and what of it is finished: `--dry-run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from impactx.costs.count import Count, CountedGroup, count, images_of
from impactx.costs.judging import passes_of
from impactx.costs.pricing import epochs_of
from impactx.datasets import DataError, load_dataset, locate, without_downloads
from impactx.experiment.artifacts import Artifacts
from impactx.experiment.cell import Cell, DataFacts
from impactx.experiment.preparation import (
    absolute_datasets,
    check_metrics,
    check_names,
    facts_of,
    reusable_by,
    workplace,
)
from impactx.experiment.steps.maps import Maps
from impactx.experiment.steps.quality import MapQuality
from impactx.experiment.steps.training import Model, Training, Trial
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import Attribution
from impactx.settings import DatasetSettings, ExperimentSettings


@dataclass
class _Totals:
    trials: int = 0
    trainings: int = 0
    evaluations: int = 0
    shards: int = 0
    passes: int = 0


def dry_run(settings: ExperimentSettings) -> str:
    """Return what would run. Nothing is started, and no data set is downloaded.

    Raises:
        ConfigurationError: Something can be known to be wrong without data.
    """
    place, models = workplace(settings), check_names(settings)
    lines: list[str] = []
    totals = _Totals()
    for dataset in absolute_datasets(settings):
        facts, where = _facts_if_here(dataset, place)
        train_images = facts.train_images if facts else dataset.train_images
        lines.append(f"{dataset.name}: {where}" + (
            f"; {train_images} training images" if train_images else ""))
        for model in models:
            side = dataset.image_size or 0
            cell = Cell(settings, dataset, model, facts or DataFacts(
                "unknown", train_images or 0, 0, (side, side), ()), reusable_by(settings, place))
            lines += _cell_lines(cell, place.artifacts if facts else None, totals)
    passes = f", at most {totals.passes:,} forward passes to judge maps" if totals.passes else ""
    head = [f"{settings.name}: {len(settings.datasets) * len(settings.models)} cells, output "
            f"{place.artifacts.storage.root}",
            f"in all: {totals.trials} trials and {totals.trainings} final trainings of at most "
            f"{settings.training.epochs} epochs, {totals.evaluations:,} explainer evaluations in "
            f"{totals.shards} shards{passes}", ""]
    return "\n".join(head + lines)


def _facts_if_here(dataset: DatasetSettings, place: Workplace) -> tuple[DataFacts | None, str]:
    here = without_downloads(dataset)
    try:
        where = locate(here, place.data_root)
        data = load_dataset(here, place.data_root, place.cache, limit=place.cache_bytes,
                            session=place.session)
    except DataError as error:
        try:
            locate(dataset, place.data_root)
        except DataError:
            return None, f"not here yet ({str(error).splitlines()[0]})"
        return None, "not here yet: would be downloaded by torchvision"
    return facts_of(data), where


def _cell_lines(cell: Cell, artifacts: Artifacts | None, totals: _Totals) -> list[str]:
    flow = count(cell, artifacts)
    lines = [f"  {cell.name}"]
    for group in flow.groups:
        text = _text(group, flow, totals)
        finished = f"; {len(group.done)} finished" if group.done else ""
        lines.append(f"    {group.title}: {text}{finished}")
    for name, approach in cell.approaches.items():
        epochs = cell.settings.training.epochs
        maps = approach.maps_in_training(cell.facts.train_images, epochs)
        if not maps:
            continue
        lines.append(f"    {name}: explains itself, at most {maps:,} maps a training")
        trainings = sum(step.approach_name == name for step in flow.steps(Training))
        attribution = cell.attribution(approach)
        if isinstance(attribution, Attribution):
            totals.evaluations += maps * trainings * (attribution.evaluations(_size(cell)) or 0)
    if flow.end is not None:
        lines.append(f"    it ends here: {flow.end}")
    return lines


def _size(cell: Cell) -> tuple[int, int] | None:
    return cell.facts.image_size if cell.facts.image_size != (0, 0) else None


def _text(group: CountedGroup, flow: Count, totals: _Totals) -> str:
    """Return how much work a group is, and add it up."""
    steps = group.group.steps
    trainings = [step for step in steps if isinstance(step, Training)]
    maps = [step for step in steps if isinstance(step, Maps)]
    judged = [step for step in steps if isinstance(step, MapQuality)]
    if trainings:
        epochs = round(len(trainings) * epochs_of(flow.cell).high)
        totals.trials += sum(isinstance(step, Trial) for step in trainings)
        totals.trainings += sum(isinstance(step, Model) for step in trainings)
        kind = "trials" if isinstance(trainings[0], Trial) else "final trainings"
        names = dict.fromkeys(step.approach_name or "" for step in trainings)
        of = f" of {', '.join(names)}" if isinstance(trainings[0], Model) else ""
        return f"{len(trainings)} {kind}{of}, at most {epochs} epochs"
    if maps:
        return _maps_text(maps, flow.cell, totals)
    if judged:
        return _judged_text(judged, flow.cell, totals)
    return str(len(steps))


def _maps_text(stores: Sequence[Maps], cell: Cell, totals: _Totals) -> str:
    counted = [images_of(step, cell) for step in stores]
    each = [_evaluations(step, cell) for step in stores]
    shards = sum(-(-number // step.shard_size) for number, step in zip(counted, stores, strict=True)
                 if number)
    evaluations = sum((number or 0) * (a_map or 0)
                      for number, a_map in zip(counted, each, strict=True))
    totals.shards += shards
    totals.evaluations += evaluations
    known = all(number is not None for number in counted)
    maps = f"{counted[0]} maps" if known and len(set(counted)) == 1 else (
        f"{sum(number or 0 for number in counted)} maps in all" if known
        else "an unknown number of maps")
    return (f"{len(stores)} stores of {maps}, "
            f"{f'{evaluations:,}' if all(each) else 'an unknown number of'} evaluations, "
            f"{shards} shards")


def _evaluations(step: Maps, cell: Cell) -> int | None:
    if not isinstance(step.attribution, Attribution):
        return None
    size = _size(cell)
    if step.target == "class_weighted":
        return step.attribution.weighted_evaluations(size, cell.facts.num_classes)
    return step.attribution.evaluations(size)


def _judged_text(steps: Sequence[MapQuality], cell: Cell, totals: _Totals) -> str:
    e, size = cell.settings.evaluation, _size(cell)
    whose = "every model" if e.approaches is None else ", ".join(e.approaches)
    text = f"{len(steps)}, maps of {whose} on {e.map_images} test images"
    if size is None:
        return f"{text}, an unknown number of forward passes"
    check_metrics(cell.settings, size, cell.dataset.name)
    passes = sum(passes_of(step, cell, size).most for step in steps)
    totals.passes += passes
    return f"{text}, at most {passes:,} forward passes"
