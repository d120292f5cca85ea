"""Before an experiment starts, everything that can be known to be wrong is found here."""

from __future__ import annotations

import hashlib
import logging
import uuid
from dataclasses import dataclass
from pathlib import Path

from impactx.configuration import ConfigurationError, check_weights_file
from impactx.datasets import Dataset, load_dataset, locate, make_split
from impactx.evaluation.quality import metrics_of
from impactx.experiment.cell import Cell, DataFacts, Reusable
from impactx.experiment.history import History
from impactx.experiment.workplace import Workplace
from impactx.explain.attribution import Attribution, MissingPackage
from impactx.fetching import fetch_file, is_remote
from impactx.models import UnknownArchitecture, build_classifier, check_architecture
from impactx.settings import (
    DatasetSettings,
    ExperimentSettings,
    ExplainSettings,
    ModelSettings,
)
from impactx.settings.extensions import AttributionSettings
from impactx.storage import Storage, StorageError

log = logging.getLogger("impactx")


@dataclass(frozen=True)
class Prepared:
    """What a job needs to start."""

    cells: list[Cell]
    place: Workplace


def workplace(settings: ExperimentSettings | ExplainSettings) -> Workplace:
    """Return where the settings say that work is done."""
    return Workplace(
        Storage(settings.output).root, absolute_path(settings.data_root),
        str(Path(settings.cache).expanduser().absolute()) if settings.cache else None,
        settings.cluster.threads, settings.cluster.explain_memory_mb * 2**20,
        settings.cluster.storage_patience,
        None if settings.cache_gb is None else int(settings.cache_gb * 2**30), uuid.uuid4().hex)


def absolute_path(path: str) -> str:
    """Return a local path as every process finds it, whatever folder it runs in."""
    return path if is_remote(path) else str(Path(path).expanduser().absolute())


def absolute_datasets(settings: ExperimentSettings) -> list[DatasetSettings]:
    """Return the data sets with absolute paths: workers do not run in the driver's folder."""
    return [data.model_copy(update={"path": absolute_path(data.path)}) if data.path else data
            for data in settings.datasets.values()]


def _planned(model: ModelSettings) -> ModelSettings:
    """Return a model with the absolute path and the SHA-256 of its file of weights, if it has one.

    Raises:
        ConfigurationError: There is no such file, or it is another than the settings say.
    """
    if model.weights in ("random", "hub"):
        return model
    check_weights_file(model.name, model.weights)
    try:
        path = fetch_file(model.weights) if is_remote(model.weights) else Path(
            model.weights).expanduser()
    except (FileNotFoundError, StorageError) as error:
        raise ConfigurationError(
            f"models.{model.name}.weights = {model.weights!r}: {error}") from error
    present = hashlib.sha256(path.read_bytes()).hexdigest()
    if model.weights_sha256 not in (None, present):
        raise ConfigurationError(
            f"models.{model.name}.weights_sha256 = {model.weights_sha256}: the file "
            f"{model.weights} has {present}; give the file that is meant, or correct the setting")
    return model.model_copy(update={
        "weights": absolute_path(model.weights), "weights_sha256": present})


def check_names(settings: ExperimentSettings) -> list[ModelSettings]:
    """Check what can be checked without data, and report all errors at once.

    Returns:
        The models, with absolute paths and contents of their files of weights: workers do not run
        in the driver's folder, and the files may be replaced by others meanwhile.

    Raises:
        ConfigurationError: Something is wrong.
    """
    errors: list[str] = []
    models: list[ModelSettings] = []
    for model in settings.models.values():
        try:
            check_architecture(model.architecture)
        except UnknownArchitecture as error:
            errors.append(f"models.{model.name}.architecture = {model.architecture!r}: {error}")
        try:
            models.append(_planned(model))
        except ConfigurationError as error:
            errors.append(str(error))
    for place, attribution in attributions_of(settings).items():
        try:
            check_attribution(attribution, place=place)
        except ConfigurationError as error:
            errors.append(str(error))
    if errors:
        raise ConfigurationError("the experiment cannot run:\n" + "\n".join(
            f"  - {error}" for error in errors))
    return models


def attributions_of(settings: ExperimentSettings) -> dict[str, AttributionSettings]:
    """Return the experiment's attribution and those of approaches, by where they are set."""
    own = {f"approaches.{name}.attribution": attribution
           for name, approach in settings.approaches.items()
           if (attribution := getattr(approach, "attribution", None)) is not None}
    return {"attribution": settings.attribution} | own


def check_attribution(attribution: AttributionSettings, data: Dataset | None = None, *,
                      place: str = "attribution") -> None:
    """Check that an attribution can be had, and that it fits the images of a data set.

    Args:
        attribution: What makes maps.
        data: None while there is none.
        place: Where the attribution is set, for the message.

    Raises:
        ConfigurationError: A package is missing, or something does not fit the images.
    """
    if not isinstance(attribution, Attribution):
        raise ConfigurationError(
            f"{place}: {attribution.method} makes no maps: an attribution is a subclass of "
            "impactx.explain.attribution.Attribution")
    try:
        attribution.check_available()
        if data is not None:
            attribution.check(data.channels, data.image_size)
    except MissingPackage as error:
        text = f"{place}: {error}" if place != "attribution" else str(error)
        raise ConfigurationError(text) from error
    except ValueError as error:
        name = "" if data is None else f", for {data.name}"
        raise ConfigurationError(f"{place}: {error}{name}") from error


def check_metrics(settings: ExperimentSettings, size: tuple[int, int], name: str) -> None:
    """Check that the metrics of maps fit images of a size.

    Raises:
        ConfigurationError: One does not.
    """
    for metric in metrics_of(settings.evaluation):
        try:
            metric.check(size)
        except ValueError as error:
            raise ConfigurationError(
                f"evaluation.metrics: {metric.metric}: {error} ({name})") from error


def _check_evaluation(settings: ExperimentSettings, data: Dataset) -> None:
    if settings.evaluation.map_images:
        check_metrics(settings, data.image_size, data.name)
    for attribution in settings.evaluation.attributions:
        check_attribution(attribution, data, place="evaluation.attributions")


def opened(dataset: DatasetSettings, place: Workplace) -> Dataset:
    """Return a data set, and say what was converted, drawn or left out of it."""
    data = load_dataset(dataset, place.data_root, place.cache, progress=log.info,
                        limit=place.cache_bytes, session=place.session)
    for note in data.notes:
        log.info("%s: %s", dataset.name, note)
    return data


def prepare(settings: ExperimentSettings) -> Prepared:
    """Check names, storage, data, splits, attributions, metrics and models; decode the data.

    Raises:
        ConfigurationError: A setting is wrong.
        DataError: A data set cannot be used.
        StorageError: The output cannot be written.
    """
    place, models = workplace(settings), check_names(settings)
    place.artifacts.storage.check()
    cells: list[Cell] = []
    for dataset in absolute_datasets(settings):
        data = opened(dataset, place)
        for fraction in settings.grid.validation_fraction:
            make_split(data.train.labels, fraction, seed=settings.seed,
                       class_names=data.class_names,
                       common_fraction=min(settings.grid.validation_fraction))
        log.info("%s: %d training images of %dx%d, %d classes, from %s", dataset.name,
                 len(data.train.labels), *data.image_size, data.num_classes,
                 locate(dataset, place.data_root))
        for where, attribution in attributions_of(settings).items():
            check_attribution(attribution, data, place=where)
        _check_evaluation(settings, data)
        facts = facts_of(data)
        for model in models:
            cell = Cell(settings, dataset, model, facts, reusable_by(settings, place))
            _check_networks(cell, data)
            cells.append(cell)
    _check_distinct(cells)
    return Prepared(cells, place)


def reusable_by(settings: ExperimentSettings, place: Workplace) -> Reusable | None:
    """Return what finds steps of other code, where the settings say that they are reused."""
    history = History(place.artifacts.storage)
    return None if settings.reuse == "same_code" else lambda step: history.reusable(step, place)


def _check_networks(cell: Cell, data: Dataset) -> None:
    """Build the classifier, and let every approach say whether it can be had."""
    model = cell.model
    try:
        build_classifier(model, data.num_classes, data.image_size, seed=cell.settings.seed)
    except ValueError as error:
        raise ConfigurationError(
            f"models.{model.name}, for {cell.dataset.name}: {error}") from error
    for name, approach in cell.approaches.items():
        try:
            approach.check(model, data.num_classes, data.image_size)
        except ValueError as error:
            raise ConfigurationError(f"approaches.{name}, for {cell.name}: {error}") from error


def _check_distinct(cells: list[Cell]) -> None:
    """Refuse two names of one cell: both would work on the same steps at once."""
    names: dict[str, str] = {}
    for cell in cells:
        if cell.fingerprint in names:
            raise ConfigurationError(
                f"the cells {names[cell.fingerprint]} and {cell.name} are the same experiment "
                "(same images, same model): remove one of the two")
        names[cell.fingerprint] = cell.name


def facts_of(data: Dataset) -> DataFacts:
    """Return what a plan must know of an opened data set."""
    return DataFacts(
        data.fingerprint, len(data.train.labels), data.num_classes, data.image_size,
        data.class_names, data.test_fingerprint, len(data.load_test().labels))
