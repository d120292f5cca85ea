"""Where steps leave what they make: files in a folder for each step, found again by its key."""

from __future__ import annotations

import io
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
        StorageError: It is damaged or cannot be read.
    """
    content = storage.read(path)
    try:
        with np.load(io.BytesIO(content)) as arrays:
            return dict(arrays)
    # zipfile, zlib, numpy and its parser of headers each raise their own, wherever the damage is.
    except Exception as error:
        raise StorageError(f"{storage.uri(path)} is damaged ({error}): delete its folder and start "
                           "the same command again") from error


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
