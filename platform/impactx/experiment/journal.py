"""What a job plans and what became of it, kept in its folder from the start: a report can be made at any time.

    jobs/<job>/job.json                       settings, and when, how and by which code it was started
    jobs/<job>/cells/<data set>.<model>.json  its units in the order of the plan, its choices, what failed and why, rows

Results are not repeated here: a unit is finished when its own result is there.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from impactx.experiment.results import Row
from impactx.experiment.units import Unit
from impactx.storage import Storage

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


class CellJournal:
    """The journal of one cell under way. May be used by several threads."""

    def __init__(self, storage: Storage, job: str, dataset: str, model: str, about: Mapping[str, Any]) -> None:
        """about: plain facts of the cell, such as its class names."""
        self._storage, self._path = storage, f"jobs/{job}/{CELLS}/{dataset}.{model}.json"
        self._about = {"dataset": dataset, "model": model} | dict(about)
        self._units: dict[tuple[str, str], dict[str, Any]] = {}
        self._failed: dict[str, str] = {}
        self._lost: dict[str, str] = {}
        self._selected: dict[str, str] = {}
        self._error: str | None = None
        self._rows: list[dict[str, Any]] = []
        self._lock = threading.Lock()

    def plan(self, units: Iterable[Unit], step: str = "") -> None:
        """Units that belong to the cell; those that it has already are left as they are. step: the search's name."""
        with self._lock:
            before = len(self._units)
            for unit in units:
                self._units.setdefault((unit.folder, unit.name), {
                    "role": unit.role, "name": unit.name, "folder": unit.folder, "step": step,
                    "params": unit.params})
            if len(self._units) > before:
                self._write()

    def failed(self, unit: Unit, error: str) -> None:
        """A unit could not be done."""
        with self._lock:
            self._failed[unit.folder] = error
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

    def selected(self, what: str, unit: Unit) -> None:
        """A search chose this unit."""
        with self._lock:
            self._selected[what] = unit.folder
            self._write()

    def tested(self, row: Row) -> None:
        """A final model read the test set."""
        with self._lock:
            self._rows.append(row.as_dict())
            self._write()

    def _write(self) -> None:
        self._storage.write_json(self._path, self._about | {
            "units": list(self._units.values()), "failed": self._failed, "lost": self._lost,
            "selected": self._selected, "error": self._error, "rows": self._rows})
