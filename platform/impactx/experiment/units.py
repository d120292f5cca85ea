"""Units of work and their fingerprints: everything that an experiment computes and keeps.

A unit's `recipe` is what its numbers depend on (settings, data, weights that go in); its key is the
fingerprint of the recipe, and its artifacts lie in a folder named by the key.  `inputs` say where to find
what goes in: they may change without making another unit.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from impactx.storage import Storage, StorageError

FORMAT = 1  # raised when the same recipe would give other numbers than before
Role = Literal["trial", "model", "maps", "test", "map_quality"]
RESULT, CHECKPOINT, RUNNING, PREDICTIONS = "result.json", "checkpoint.pt", "running.pt", "predictions.npz"
STOPPED, CLAIM = "stopped.json", "claim.json"
MAP_SCORES = "map_scores.npz"


class WorkError(RuntimeError):
    """A unit cannot be worked on; the message names it and says what to do."""


def fingerprint(value: Any) -> str:
    """32 hex digits of the sha256 of plain data as canonical JSON (numbers by their shortest form)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def read_arrays(storage: Storage, path: str) -> dict[str, np.ndarray]:
    """The arrays of a unit's .npz file. Raises FileNotFoundError, or StorageError where it is damaged or unreadable."""
    content = storage.read(path)
    try:
        with np.load(io.BytesIO(content)) as held:
            return dict(held)
    except Exception as error:  # of zipfile, zlib, numpy or its parser of headers: wherever the damage lies
        raise StorageError(f"{storage.uri(path)} is damaged ({error}): delete its folder and start the same command "
                           "again") from error


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    role: trial (a training of the search, weights not kept), model (a final training), maps, test, or map_quality
    (the judgement of a final model's maps);
    name: for people; recipe, inputs, params: plain data; params are what MLflow shows of it.
    """

    role: Role
    name: str
    recipe: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """The fingerprint of the recipe."""
        return fingerprint({"format": FORMAT} | self.recipe)

    @property
    def folder(self) -> str:
        """Where the unit's artifacts lie under the output's root."""
        return f"{'map_quality' if self.role == 'map_quality' else self.role.removesuffix('s') + 's'}/{self.key}"


class Artifacts:
    """Results of units, found again by their keys. A unit is finished when its result is there."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def result(self, unit: Unit) -> dict[str, Any] | None:
        """The result of a finished unit, or None. Raises StorageError where it is damaged."""
        try:
            return self.storage.read_json(f"{unit.folder}/{RESULT}")
        except FileNotFoundError:
            return None

    def finish(self, unit: Unit, result: dict[str, Any], files: dict[str, bytes] | None = None) -> None:
        """Keep a unit's files, then its result: once the result is there, everything is."""
        for name, data in (files or {}).items():
            self.storage.write(f"{unit.folder}/{name}", data)
        self.storage.write_json(f"{unit.folder}/{RESULT}", {"name": unit.name, "recipe": unit.recipe} | result)
        for name in (RUNNING, STOPPED, CLAIM):
            self.storage.delete(f"{unit.folder}/{name}")

    def stop(self, unit: Unit, so_far: dict[str, Any]) -> None:
        """Keep what a trial had come to when its search stopped it. It is not finished: it can go on from here."""
        self.storage.write_json(f"{unit.folder}/{STOPPED}", {
            "name": unit.name, "recipe": unit.recipe, "halving": unit.inputs["halving"]} | so_far)

    def stopped(self, unit: Unit) -> dict[str, Any] | None:
        """What a trial had come to when the same search stopped it, or None.

        Raises StorageError where that is damaged.
        """
        if "halving" not in unit.inputs:
            return None
        try:
            found = self.storage.read_json(f"{unit.folder}/{STOPPED}")
        except FileNotFoundError:
            return None
        return found if found["halving"] == unit.inputs["halving"] else None

    def begun(self, unit: Unit) -> bool:
        """Whether somebody has begun a training."""
        return self.storage.exists(f"{unit.folder}/{RUNNING}")
