"""Where steps leave what they make: files in a folder for each step, found again by its key."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from pydantic import BaseModel, ValidationError

from impactx.experiment.history import keep_code, note_finished
from impactx.experiment.steps.base import Result, Step
from impactx.storage import DamagedError, Storage, StorageError

if TYPE_CHECKING:
    from impactx.experiment.steps.training import TrainingResult, Trial

RESULT, CHECKPOINT, RUNNING = "result.json", "checkpoint.pt", "running.pt"
PREDICTIONS, MAP_SCORES = "predictions.npz", "map_scores.npz"
STOPPED, OWNER = "stopped.json", "owner.json"
R = TypeVar("R", bound=Result)
M = TypeVar("M", bound=BaseModel)


def read_arrays(storage: Storage, path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a step's .npz file.

    Raises:
        FileNotFoundError: There is no such file.
        StorageError: It is damaged, lacks arrays or cannot be read.
    """
    content = storage.read(path)
    try:
        with np.load(io.BytesIO(content)) as arrays:
            found = dict(arrays)
        _check_arrays(found, path.rpartition("/")[2])
        return found
    # zipfile, zlib, numpy and its parser of headers each raise their own, wherever the damage is.
    except Exception as error:
        raise StorageError(f"{storage.uri(path)} is damaged ({error}): delete its folder and start "
                           "the same command again") from error


# By file: arrays with a row for each test image, and their numbers of dimensions. Of those in
# INDICES each value is an index: of a class, or of a row.
COLUMNS = {PREDICTIONS: {"labels": 1, "probabilities": 2},
           MAP_SCORES: {"rows": 1, "labels": 1, "predicted": 1}}
INDICES = ("rows", "labels", "predicted", "shown")


def _check_arrays(arrays: Mapping[str, np.ndarray], name: str) -> None:
    """Check that a file holds the arrays that every reader needs, in shapes that fit each other.

    Raises:
        ValueError: It does not.
    """
    columns = COLUMNS.get(name, {})
    for key, dimensions in columns.items():
        if key not in arrays:
            raise ValueError(f"it has no {key}")
        if arrays[key].ndim != dimensions or len(arrays[key]) != len(arrays["labels"]):
            raise ValueError(f"{key} have the shape {arrays[key].shape}")
    for key in (key for key in INDICES if key in arrays and columns):
        values = arrays[key]
        if values.ndim != 1 or values.dtype.kind not in "iu" or (values < 0).any():
            raise ValueError(f"{key} are no indices")
    if name == PREDICTIONS:
        scores = arrays["probabilities"]
        if scores.dtype.kind != "f" or not np.isfinite(scores).all():
            raise ValueError("probabilities are no finite numbers")
        if len(scores) and arrays["labels"].max() >= scores.shape[1]:
            raise ValueError(f"labels of {arrays['labels'].max() + 1} classes, probabilities of "
                             f"{scores.shape[1]}")
    if "shown" in arrays and (len(arrays["shown"]) != len(arrays.get("images", ()))
                              or (arrays["shown"] >= len(arrays["labels"])).any()):
        raise ValueError("shown are not the rows of images")


def read_record(storage: Storage, path: str, kind: type[M], ignore: frozenset[str] = frozenset()
                ) -> M:
    """Return a typed record from a JSON file.

    Args:
        storage: Where the file lies.
        path: Relative to the storage's root.
        kind: The record's class.
        ignore: Top-level entries of the file that belong to people, and not to the record.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedError: It is no JSON, or JSON of another shape.
        StorageError: It cannot be read.
    """
    value = storage.read_json(path)
    if isinstance(value, dict):
        value = {name: entry for name, entry in value.items() if name not in ignore}
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise DamagedError(
            f"{storage.uri(path)} is not what this version writes ({where}: {first['msg']}): "
            "delete it, it is made anew") from error


_FOR_PEOPLE = frozenset({"name", "recipe", "code", "kind", "halving"})


def read_result(storage: Storage, folder: str, kind: type[R]) -> R:
    """Return the result that lies in a step's folder.

    Raises:
        FileNotFoundError: The step is not finished.
        StorageError: The result is damaged, of another kind, or cannot be read.
    """
    return read_record(storage, f"{folder}/{RESULT}", kind, _FOR_PEOPLE)


class Artifacts:
    """Results of steps, found again by their keys. A step is finished when its result is there."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def result(self, step: Step[R]) -> R | None:
        """Return the result of a finished step, or None.

        Raises:
            StorageError: The result is damaged or cannot be read.
        """
        try:
            return cast("R", read_result(self.storage, step.folder, step.result_type))
        except FileNotFoundError:
            return None

    def finish(self, step: Step[R], result: R, files: dict[str, bytes] | None = None) -> None:
        """Keep a step's files and then its result, so that with the result everything is there.

        By which code it was done is kept beside all results; see `history`.
        """
        keep_code(self.storage, step)
        for name, content in (files or {}).items():
            self.storage.write(f"{step.folder}/{name}", content)
        self.storage.write_json(f"{step.folder}/{RESULT}", self._about(step) | result.model_dump(
            mode="json"))
        note_finished(self.storage, step)
        for name in (RUNNING, STOPPED, OWNER):
            self.storage.delete(f"{step.folder}/{name}")

    def _about(self, step: Step[R]) -> dict[str, object]:
        return {"name": step.name, "kind": step.kind, "recipe": step.recipe, "code": step.code}

    def stop(self, trial: Trial, so_far: TrainingResult) -> None:
        """Keep how far a trial was when its search stopped it; it is not finished and can go on."""
        halving = trial.halving.model_dump(mode="json") if trial.halving else None
        self.storage.write_json(f"{trial.folder}/{STOPPED}", self._about(trial) | {
            "halving": halving} | so_far.model_dump(mode="json"))

    def stopped(self, trial: Trial) -> TrainingResult | None:
        """Return how far a trial was when the same search stopped it, or None.

        Raises:
            StorageError: The file is damaged or cannot be read.
        """
        if trial.halving is None:
            return None
        path = f"{trial.folder}/{STOPPED}"
        try:
            search = self.storage.read_json(path).get("halving")
            if search != trial.halving.model_dump(mode="json"):
                return None
            return cast("TrainingResult", read_record(
                self.storage, path, trial.result_type, _FOR_PEOPLE))
        except FileNotFoundError:
            return None

    def begun(self, step: Step[R]) -> bool:
        """Return whether a training has been begun by anybody."""
        return self.storage.exists(f"{step.folder}/{RUNNING}")
