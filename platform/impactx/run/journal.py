"""What a job came to, kept in its folder from the start, so that a report can be made at any time.

    jobs/<job>/job.json                       settings; when and by which code it was started
    jobs/<job>/cells/<data set>.<model>.json  steps in the order of the flow, choices, what failed

Results are not repeated here: a step is finished when its own result is there. A job that is
started again keeps the steps and choices of its earlier starts until it comes to others, or to the
cell's end.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from impactx.experiment.artifacts import read_record
from impactx.experiment.steps.base import Step, StepError
from impactx.results.records import (
    EVIDENCE,
    JOB,
    CellFacts,
    CellRecord,
    JobRecord,
    Look,
    Start,
    StepRecord,
    cell_path,
    now,
    pilot_repeats,
)
from impactx.settings import ExperimentSettings
from impactx.storage import DamagedError, Storage

log = logging.getLogger("impactx")


def note_start(storage: Storage, job: str, settings: ExperimentSettings, start: Start
               ) -> list[Start]:
    """Write down that a job is started, once more or for the first time.

    Args:
        storage: The job's output.
        job: The job's key.
        settings: The experiment's.
        start: How it is started; the rest of it is filled in here.

    Returns:
        All starts, this one last.

    Raises:
        StepError: All repeats that are asked for were a pilot.
    """
    path = f"jobs/{job}/{JOB}"
    try:
        earlier = read_record(storage, path, JobRecord).starts
    except FileNotFoundError:
        earlier = []
    pilot = pilot_repeats(earlier)
    if not start.pilot and settings.repeats <= pilot:
        raise StepError(f"repeats = {settings.repeats}: the first {pilot} repeats of this job were "
                        "a pilot, which is not counted; ask for more, as the pilot proposed "
                        "(--pilot shows it again)")
    starts = [*earlier, start.model_copy(update={
        "time": now(), "repeats": settings.repeats, "seen": _seen(storage, job)})]
    # The address of the tracker may hold a password.
    described = settings.model_dump(mode="json", exclude={"tracking": {"uri"}})
    storage.write_json(path, JobRecord(settings=described, starts=starts).model_dump(mode="json"))
    return starts


def _seen(storage: Storage, job: str) -> Look | None:
    """Return what the start asked for whose evidence is there."""
    try:
        shown = storage.read_json(f"jobs/{job}/{EVIDENCE}")
        return Look(repeats=shown["repeats"], margin=shown["margin"])
    except (FileNotFoundError, DamagedError, KeyError, TypeError, ValidationError):
        return None


class CellJournal:
    """The journal of one cell under way; several threads may use it."""

    def __init__(self, storage: Storage, job: str, facts: CellFacts) -> None:
        self._storage, self._facts = storage, facts
        self._path = cell_path(job, facts.dataset, facts.model)
        self._steps: dict[tuple[str, str], StepRecord] = {}
        self._failed: dict[str, str] = {}
        self._left_out: dict[str, str] = {}
        self._selected: dict[str, str] = {}
        self._error: str | None = None
        self._earlier = self._read()
        self._lock = threading.Lock()

    def _read(self) -> CellRecord:
        """Return what earlier starts noted, without what ended them."""
        nothing = CellRecord(facts=self._facts)
        try:
            earlier = read_record(self._storage, self._path, CellRecord)
        except FileNotFoundError:
            return nothing
        except DamagedError as error:
            log.warning("%s cannot be read and is written anew (%s)",
                        self._storage.uri(self._path), error)
            return nothing
        return earlier if earlier.facts == self._facts else nothing

    def plan(self, group: str, steps: Iterable[Step[Any]], search: bool = False) -> None:
        """Note steps of a group; those that are noted already are left as they are."""
        with self._lock:
            before = len(self._steps)
            for step in steps:
                self._steps.setdefault((step.folder, step.name), StepRecord(
                    kind=step.kind, name=step.name, folder=step.folder, group=group, search=search,
                    parameters=step.parameters(), inputs=step.inputs(),
                    reused_code=step.reused_code))
            if len(self._steps) > before:
                self._write()

    def failed(self, step: Step[Any], error: str) -> None:
        """Note that a step could not be done."""
        with self._lock:
            self._failed[step.folder] = error
            self._write()

    def done(self, step: Step[Any]) -> None:
        """Note that a step is done, also where it failed before."""
        with self._lock:
            if step.folder in self._failed or step.folder in self._earlier.failed:
                self._failed.pop(step.folder, None)
                self._earlier.failed.pop(step.folder, None)
                self._write()

    def left_out(self, what: str, reason: str) -> None:
        """Note that the cell goes on without an approach or a step."""
        with self._lock:
            self._left_out[what] = reason
            self._write()

    def stopped(self, error: str) -> None:
        """Note that the cell cannot go on."""
        with self._lock:
            self._error = error
            self._write()

    def finished(self) -> None:
        """Note that the cell has ended: what only earlier starts noted no longer holds."""
        with self._lock:
            self._earlier = CellRecord(facts=self._facts)
            self._write()

    def selected(self, search: str, trial: Step[Any]) -> None:
        """Note what a search selected."""
        with self._lock:
            if self._earlier.selected.get(search, trial.folder) != trial.folder:
                # What followed from the other choice follows no more.
                self._earlier = CellRecord(facts=self._facts)
            self._selected[search] = trial.folder
            self._write()

    def folders(self) -> set[str]:
        """Return the folders of the steps of this start."""
        with self._lock:
            return {folder for folder, _ in self._steps}

    @property
    def record(self) -> CellRecord:
        """All that is noted, by this start and the earlier ones."""
        earlier = {(step.folder, step.name): step for step in self._earlier.steps}
        return CellRecord(
            facts=self._facts, steps=list((earlier | self._steps).values()),
            failed=self._earlier.failed | self._failed, left_out=self._left_out,
            selected=self._earlier.selected | self._selected, error=self._error)

    def _write(self) -> None:
        self._storage.write_json(self._path, self.record.model_dump(mode="json"))
