"""Before an experiment starts: everything that can be known to be wrong is found here, and a dry run is listed."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from impactx.configuration import ConfigurationError, check_weights_file
from impactx.datasets import DataError, Dataset, load_dataset, locate, make_split, without_downloads
from impactx.evaluation.morf import grid_of
from impactx.experiment.approaches import approaches_of
from impactx.experiment.plan import Cell, DataFacts
from impactx.experiment.survey import evaluations_of_map, images_of_store, survey
from impactx.experiment.units import Artifacts
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import build_attribution
from impactx.explain.masking import MaskerError, parse_masker
from impactx.explain.scores import MissingPackage
from impactx.fetching import fetch_file, is_remote
from impactx.models import UnknownArchitecture, build_classifier, check_architecture
from impactx.settings import (
    AttributionSettings,
    DatasetSettings,
    ExperimentSettings,
    ModelSettings,
)
from impactx.storage import Storage, StorageError

log = logging.getLogger("impactx")


@dataclass(frozen=True)
class Prepared:
    """What a job needs to start."""

    cells: list[Cell]
    place: Workplace


def workplace(settings: ExperimentSettings) -> Workplace:
    """Where the settings say that work is done."""
    return Workplace(Storage(settings.output).root, absolute_path(settings.data_root),
                     str(Path(settings.cache).expanduser().absolute()) if settings.cache else None,
                     settings.cluster.threads, settings.cluster.explain_memory_mb * 2**20,
                     settings.cluster.storage_patience)


def absolute_path(path: str) -> str:
    """A local path as every process finds it, whatever folder it runs in; an address as it is."""
    return path if is_remote(path) else str(Path(path).expanduser().absolute())


def _absolute(settings: ExperimentSettings) -> list[DatasetSettings]:
    """The data sets with absolute paths: workers do not run in the driver's folder."""
    return [d.model_copy(update={"path": absolute_path(d.path)}) if d.path else d
            for d in settings.datasets.values()]


def _absolute_models(settings: ExperimentSettings) -> list[ModelSettings]:
    """The models with absolute paths of their files, as `_absolute`."""
    return [m if m.weights in ("random", "hub") else m.model_copy(
        update={"weights": absolute_path(m.weights)}) for m in settings.models.values()]


def _weights_file(model: ModelSettings) -> str | None:
    """The fingerprint of the file that a model's weights come from. Raises ConfigurationError where it is absent."""
    if model.weights in ("random", "hub"):
        return None
    check_weights_file(model.name, model.weights)
    try:
        path = fetch_file(model.weights) if is_remote(model.weights) else Path(model.weights).expanduser()
    except (FileNotFoundError, StorageError) as error:
        raise ConfigurationError(f"models.{model.name}.weights = {model.weights!r}: {error}") from error
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_names(settings: ExperimentSettings) -> dict[str, str | None]:
    """What can be checked without data, all errors at once; returns each model's weights file's fingerprint."""
    errors, files = [], {}
    for model in settings.models.values():
        try:
            check_architecture(model.architecture)
        except UnknownArchitecture as error:
            errors.append(f"models.{model.name}.architecture = {model.architecture!r}: {error}")
        try:
            files[model.name] = _weights_file(model)
        except ConfigurationError as error:
            errors.append(str(error))
    for place, attribution in _attributions(settings).items():
        try:
            check_attribution(attribution, place=place)
        except ConfigurationError as error:
            errors.append(str(error))
    if errors:
        raise ConfigurationError("the experiment cannot run:\n" + "\n".join(f"  - {e}" for e in errors))
    return files


def _attributions(settings: ExperimentSettings) -> dict[str, AttributionSettings]:
    """The experiment's attribution and those that approaches have of their own, by where they are set."""
    own = {f"approaches.{a.name}.attribution": a.attribution for a in approaches_of(settings)}
    return {"attribution": settings.attribution} | {place: found for place, found in own.items() if found is not None}


def check_attribution(attribution: AttributionSettings, data: Dataset | None = None, *,
                      place: str = "attribution") -> None:
    """Raise ConfigurationError where maskers do not fit the data's images, or a package is missing.

    place: where it is set, for the message.
    """
    for name in attribution.hidden_by if data is not None else ():
        try:
            parse_masker(name).background(torch.zeros(1, data.channels, *data.image_size))
        except MaskerError as error:
            raise ConfigurationError(f"{place}: {error}, for {data.name}") from error
    try:
        build_attribution(attribution)
    except MissingPackage as error:
        raise ConfigurationError(f"{place}: {error}" if place != "attribution" else str(error)) from error
    window = getattr(attribution, "window", 0)
    if data is not None and window > min(data.image_size):
        raise ConfigurationError(f"{place}.window = {window} is larger than the images of {data.name} "
                                 f"({data.image_size[0]}x{data.image_size[1]})")


def _check_region(settings: ExperimentSettings, size: tuple[int, int], name: str) -> None:
    """Raise ConfigurationError where MoRF's regions do not fit images of a size (height, width)."""
    try:
        grid_of(size, settings.evaluation.region)
    except ValueError as error:
        raise ConfigurationError(f"evaluation.region = {settings.evaluation.region}: {error} ({name})") from error


def _check_evaluation(settings: ExperimentSettings, data: Dataset) -> None:
    """Raise ConfigurationError where MoRF's regions or a further attribution do not fit the data's images."""
    _check_region(settings, data.image_size, data.name)
    for attribution in settings.evaluation.attributions:
        try:
            check_attribution(attribution, data)
        except ConfigurationError as error:
            raise ConfigurationError(f"evaluation.attributions: {error}") from error


def opened(dataset: DatasetSettings, place: Workplace) -> Dataset:
    """The data set, decoded where that was not done before; says what was converted, drawn or left out."""
    data = load_dataset(dataset, place.data_root, place.cache, progress=log.info)
    for note in data.notes:
        log.info("%s: %s", dataset.name, note)
    return data


def prepare(settings: ExperimentSettings) -> Prepared:
    """Check names, storage, data, splits, masks and models; decode the data.

    Raises ConfigurationError, DataError or StorageError before anything is computed.
    """
    place = workplace(settings)
    weights_files = _check_names(settings)
    place.artifacts.storage.check()
    cells = []
    for dataset in _absolute(settings):
        data = opened(dataset, place)
        for fraction in settings.grid.validation_fraction:
            make_split(data.train.labels, fraction, seed=settings.seed, class_names=data.class_names,
                       common_fraction=min(settings.grid.validation_fraction))
        log.info("%s: %d training images of %dx%d, %d classes, from %s", dataset.name, len(data.train.labels),
                 *data.image_size, data.num_classes, locate(dataset, place.data_root))
        facts = _facts(data)
        for where, attribution in _attributions(settings).items():
            check_attribution(attribution, data, place=where)
        _check_evaluation(settings, data)
        for model in _absolute_models(settings):
            try:
                build_classifier(model, data.num_classes, data.image_size, seed=settings.seed)
            except ValueError as error:
                raise ConfigurationError(f"models.{model.name}, for {dataset.name}: {error}") from error
            for approach in approaches_of(settings):
                try:
                    approach.check(model, data.num_classes, data.image_size)
                except ValueError as error:
                    raise ConfigurationError(f"approaches.{approach.name}, for {dataset.name} x {model.name}: {error}"
                                             ) from error
            cells.append(Cell(settings, dataset, model, facts, weights_files[model.name]))
    _check_distinct(cells)
    return Prepared(cells, place)


def _check_distinct(cells: list[Cell]) -> None:
    """Two cells that are the same under two names would work on the same units at once."""
    names: dict[str, str] = {}
    for cell in cells:
        key = cell.stage1_trials()[0].key
        if key in names:
            raise ConfigurationError(f"the cells {names[key]} and {cell.name} are the same experiment (same images, "
                                     "same model): remove one of the two")
        names[key] = cell.name


def _facts(data: Dataset) -> DataFacts:
    return DataFacts(data.fingerprint, len(data.train.labels), data.num_classes, data.image_size, data.class_names,
                     data.test_fingerprint, len(data.load_test().labels))


def _facts_if_here(dataset: DatasetSettings, place: Workplace) -> tuple[DataFacts | None, str]:
    here = without_downloads(dataset)
    try:
        where = locate(here, place.data_root)
        data = load_dataset(here, place.data_root, place.cache)
    except DataError as error:
        try:
            locate(dataset, place.data_root)
        except DataError:
            return None, f"not here yet ({str(error).splitlines()[0]})"
        return None, "not here yet: would be downloaded by torchvision"
    return _facts(data), where


def dry_run(settings: ExperimentSettings) -> str:
    """What would run, cell by cell, and what of it exists already. Starts nothing, downloads no data set.

    Raises ConfigurationError for what can be known to be wrong without data.
    """
    place, weights_files = workplace(settings), _check_names(settings)
    artifacts, lines, totals = place.artifacts, [], [0, 0, 0, 0, 0]
    for dataset in _absolute(settings):
        facts, where = _facts_if_here(dataset, place)
        images = facts.train_images if facts else dataset.train_images
        lines.append(f"{dataset.name}: {where}" + (f"; {images} training images" if images else ""))
        for model in _absolute_models(settings):
            cell = Cell(settings, dataset, model, facts or DataFacts("unknown", images or 0, 0, (0, 0), ()),
                        weights_files[model.name])
            lines += _dry_cell(cell, artifacts, images, bool(facts), totals)
    trials, trainings, evaluations, shards, judging = totals
    head = [f"{settings.name}: {len(settings.datasets) * len(settings.models)} cells, output {artifacts.storage.root}",
            f"in all: {trials} trials and {trainings} final trainings of at most {settings.training.epochs} epochs, "
            f"{evaluations:,} explainer evaluations in {shards} shards"
            + (f", at most {judging:,} forward passes to judge maps" if judging else ""), ""]
    return "\n".join(head + lines)


def _dry_cell(cell: Cell, artifacts: Artifacts, images: int | None, known: bool, totals: list[int]) -> list[str]:
    settings, approaches = cell.settings, approaches_of(cell.settings)
    found = survey(cell, artifacts)
    trials, stores, repeats = found.stage1.units, found.stores.units, settings.repeats
    size = cell.facts.image_size if known else (cell.dataset.image_size,) * 2 if cell.dataset.image_size else None
    searched = {a.name: n for a in approaches if (n := len(a.points())) > 1}
    trainings = repeats * (1 + len(approaches))
    counted = [images_of_store(cell, unit, images) for unit in stores]
    of_stores = [evaluations_of_map(cell, unit.inputs["attribution"], unit.inputs.get("target"), size)
                 for unit in stores]
    shards = sum(-(-n // settings.maps.shard_size) for n in counted if n)
    evaluations = sum((n or 0) * (per_map or 0) for n, per_map in zip(counted, of_stores, strict=True))
    in_training = {a.name: (a.maps_in_training(images or 0, settings.training.epochs),
                            (a.attribution or settings.attribution).evaluations(size) or 0) for a in approaches}
    own = sum(maps * per_map * (repeats + searched.get(name, 0)) for name, (maps, per_map) in in_training.items())
    stage2_trials = sum(searched.values())
    judging = 0
    if size and found.judged:
        _check_region(settings, size, cell.dataset.name)
        judging = sum(judgement.most(size) for judgement in found.judged.values())
    totals[:] = [a + b for a, b in zip(totals, (len(trials) + stage2_trials, trainings, evaluations + own, shards,
                                                judging), strict=True)]
    names = ", ".join(a.name for a in approaches) or "nothing else"
    lines = [f"  {cell.name}",
             f"    stage 1: {len(trials)} trials, at most {len(trials) * settings.training.epochs} epochs"
             + (f"; {len(found.stage1.made)} finished" if known else ""),
             f"    models:  {trainings} final trainings (A and {names}; {repeats} repeats), "
             f"at most {trainings * settings.training.epochs} epochs"]
    if stores:
        all_known = all(n is not None for n in counted)
        each = f"{counted[0]} maps" if len(set(counted)) == 1 and all_known else (
            f"{sum(n or 0 for n in counted)} maps in all" if all_known else "an unknown number of maps")
        lines.append(f"    maps:    {len(stores)} stores of {each}, "
                     f"{f'{evaluations:,}' if all(of_stores) else 'an unknown number of'} evaluations, {shards} shards")
    lines += [f"    {name}: explains itself, at most {maps:,} maps a training"
              for name, (maps, _) in in_training.items() if maps]
    if approaches:
        lines.append(f"    stage 2: {stage2_trials} trials"
                     + (f" ({', '.join(f'{k}: {n}' for k, n in searched.items())})" if searched else ""))
    e = settings.evaluation
    if found.judged:
        whose = "every model" if e.approaches is None else ", ".join(e.approaches)
        lines.append(f"    judged:  maps of {whose} in {repeats} repeats, on {e.map_images} test images, "
                     f"{f'at most {judging:,}' if size else 'an unknown number of'} forward passes")
    if known and (exists := found.exists()):
        lines.append(f"    exists:  {', '.join(exists)}")
    return lines
