"""What a job plans and what became of it, kept in its folder from the start: a report can be made at any time.

    jobs/<job>/job.json                       settings, and when, how and by which code it was started
    jobs/<job>/cells/<data set>.<model>.json  its units in the order of the plan, its choices, what failed and why, rows

Results are not repeated here: a unit is finished when its own result is there. A job that is started again keeps the
units, choices and rows of its earlier starts until it comes to others, or to the cell's end.
"""

from __future__ import annotations

import datetime
import logging
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from impactx.experiment.results import Row
from impactx.experiment.units import Unit
from impactx.storage import Storage, StorageError

log = logging.getLogger("impactx")
JOB, CELLS = "job.json", "cells"


def now() -> str:
    """The time as ISO 8601, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def note_start(storage: Storage, job: str, settings: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Write down that a job is started, once more or for the first time. about: plain data."""
    path = f"jobs/{job}/{JOB}"
    try:
        starts = storage.read_json(path)["starts"]
    except FileNotFoundError:
        starts = []
    storage.write_json(path, {"settings": dict(settings), "starts": [*starts, {"time": now()} | dict(about)]})


@dataclass
class _Notes:
    """units: by folder and name; failed: reasons by folder; selected: folders by search; rows: by approach, repeat."""

    units: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    selected: dict[str, str] = field(default_factory=dict)
    rows: dict[tuple[str, int], dict[str, Any]] = field(default_factory=dict)


class CellJournal:
    """The journal of one cell under way. May be used by several threads."""

    def __init__(self, storage: Storage, job: str, dataset: str, model: str, about: Mapping[str, Any]) -> None:
        """about: plain facts of the cell, such as its class names; what was noted of other facts is not kept."""
        self._storage, self._path = storage, f"jobs/{job}/{CELLS}/{dataset}.{model}.json"
        self._about = {"dataset": dataset, "model": model} | dict(about)
        self._now, self._before = _Notes(), self._earlier()
        self._lost: dict[str, str] = {}
        self._error: str | None = None
        self._lock = threading.Lock()

    def _earlier(self) -> _Notes:
        """What earlier starts of the job noted. Not what ended them: this start goes on from there."""
        try:
            found = self._storage.read_json(self._path)
            if any(found.get(key) != value for key, value in self._about.items()):
                return _Notes()
            return _Notes({(unit["folder"], unit["name"]): unit for unit in found["units"]}, dict(found["failed"]),
                          dict(found["selected"]), {(row["approach"], row["repeat"]): row for row in found["rows"]})
        except FileNotFoundError:
            return _Notes()
        except (StorageError, AttributeError, KeyError, TypeError, ValueError) as error:
            log.warning("%s cannot be read and is written anew (%s)", self._storage.uri(self._path), error)
            return _Notes()

    def plan(self, units: Iterable[Unit], step: str = "") -> None:
        """Units that belong to the cell; those that it has already are left as they are. step: the search's name."""
        with self._lock:
            before = len(self._now.units)
            for unit in units:
                self._now.units.setdefault((unit.folder, unit.name), {
                    "role": unit.role, "name": unit.name, "folder": unit.folder, "step": step,
                    "params": unit.params})
            if len(self._now.units) > before:
                self._write()

    def failed(self, unit: Unit, error: str) -> None:
        """A unit could not be done."""
        with self._lock:
            self._now.failed[unit.folder] = error
            self._write()

    def done(self, unit: Unit) -> None:
        """A unit is done, also where it failed before."""
        with self._lock:
            if unit.folder in self._now.failed.keys() | self._before.failed.keys():
                self._now.failed.pop(unit.folder, None)
                self._before.failed.pop(unit.folder, None)
                self._write()

    def lost(self, what: str, error: str) -> None:
        """The cell goes on without this (an approach, or a unit by its name)."""
        with self._lock:
            self._lost[what] = error
            self._write()

    def stopped(self, error: str) -> None:
        """The cell cannot go on."""
        with self._lock:
            self._error = error
            self._write()

    def finished(self) -> None:
        """The cell has come to its end: what only earlier starts noted is no longer so."""
        with self._lock:
            self._before = _Notes()
            self._write()

    def selected(self, what: str, unit: Unit) -> None:
        """A search chose this unit."""
        with self._lock:
            if self._before.selected.get(what, unit.folder) != unit.folder:
                self._before = _Notes()  # another choice: what followed from that one follows no more
            self._now.selected[what] = unit.folder
            self._write()

    def tested(self, row: Row) -> None:
        """A final model read the test set."""
        with self._lock:
            self._now.rows[row.approach, row.repeat] = row.as_dict()
            self._write()

    def folders(self) -> set[str]:
        """Of the units of this start."""
        with self._lock:
            return {folder for folder, _ in self._now.units}

    def _write(self) -> None:
        now, before = self._now, self._before
        self._storage.write_json(self._path, self._about | {
            "units": list((before.units | now.units).values()), "failed": before.failed | now.failed,
            "lost": self._lost, "selected": before.selected | now.selected, "error": self._error,
            "rows": list((before.rows | now.rows).values())})
