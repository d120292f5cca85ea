"""What a job left, finished or not, as typed records: what `impactx.report` is made from.

Everything comes from the job's journal and the results of its steps. Neither the data set nor a
checkpoint is opened, so a report can be made on another machine, and while the job still runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import ConfigDict, ValidationError

from impactx.approaches.baseline import BASELINE
from impactx.experiment.artifacts import (
    MAP_SCORES,
    RUNNING,
    STOPPED,
    read_arrays,
    read_record,
    read_result,
)
from impactx.experiment.steps.base import Result
from impactx.experiment.steps.maps import Maps
from impactx.experiment.steps.quality import MapQuality
from impactx.experiment.steps.test import Test
from impactx.experiment.steps.training import Model, TrainingResult, Trial
from impactx.results.evidence import evidence
from impactx.results.evidence_records import Evidence
from impactx.results.records import CELLS, JOB, CellRecord, JobRecord, StepRecord, cell_path, now
from impactx.results.rows import Row, cell_rows
from impactx.settings import ExperimentSettings
from impactx.storage import DamagedError, Storage

READERS = 16  # files read at once: an S3 store answers each in tens of milliseconds
State = Literal[
    "finished", "diverged", "stopped early", "failed", "under way", "missing", "damaged"]
RESULT_TYPES: dict[str, type[Result]] = {
    step.kind: step.result_type for step in (Trial, Model, Maps, Test, MapQuality)}


class OtherResult(Result):
    """The result of a step whose kind is not in `RESULT_TYPES`, with all values of its file."""

    model_config = ConfigDict(extra="allow", frozen=True)

    @property
    def values(self) -> dict[str, Any]:
        """The values without `seconds`, as plain data."""
        return dict(self.model_extra or {})


@dataclass(frozen=True)
class StepExport:
    """A step of a cell.

    Attributes:
        kind: The kind of the step, such as "trial".
        name, folder: As in the journal.
        group: The title of the step's group in the flow.
        search: Whether the group is a search, which selects one of its trials.
        parameters: What MLflow and the report show of the step.
        state: How far the step is; "diverged" is a finished training whose loss was not finite.
        error: Why the step failed, or what is damaged.
        result: Of a finished step.
    """

    kind: str
    name: str
    folder: str
    group: str
    search: bool
    parameters: Mapping[str, Any]
    state: State
    error: str | None = None
    result: Result | None = None

    @property
    def training(self) -> TrainingResult | None:
        """The result of a finished training; None for all others."""
        return self.result if isinstance(self.result, TrainingResult) else None


@dataclass(frozen=True)
class CellExport:
    """One data set with one model.

    Attributes:
        dataset, model: Their names.
        missing: Sentences on what is not there yet.
        class_names: In the order of the labels; empty where the cell has not begun.
        selection_metric: By which the trials of stage 1 are compared.
        selected: The folder of the selected trial, by the search's title.
        steps: In the order of the flow.
        error: What ended the cell; None while nothing has.
        rows: Of the final models that were tested.
    """

    dataset: str
    model: str
    missing: Sequence[str]
    class_names: Sequence[str] = ()
    selection_metric: str = "val_accuracy"
    selected: Mapping[str, str] = field(default_factory=dict)
    steps: Sequence[StepExport] = ()
    error: str | None = None
    rows: Sequence[Row] = ()


@dataclass(frozen=True)
class JobExport:
    """A job.

    Attributes:
        job: The job's key.
        made: When this was read: ISO 8601, UTC.
        output: The address of the job's output.
        record: The job's own file: its settings as they were written, and its starts.
        settings: The same settings.
        cells: In the order of the settings.
        evidence: What the finished rows of all cells show.
    """

    job: str
    made: str
    output: str
    record: JobRecord
    settings: ExperimentSettings
    cells: Sequence[CellExport]
    evidence: Evidence


class ExportError(RuntimeError):
    """There is no such job in the output folder; the message lists those that are."""


def find_job(storage: Storage, job: str | None = None) -> str:
    """Return the key of a job.

    Args:
        storage: The output.
        job: The key, or the beginning of it; None for the only one that there is.

    Raises:
        ExportError: There is no such job, or more than one.
    """
    jobs = [name for name in storage.folders("jobs") if storage.exists(f"jobs/{name}/{JOB}")]
    matching = [name for name in jobs if job is None or name == job] or [
        name for name in jobs if job is not None and name.startswith(job)]
    if len(matching) == 1:
        return matching[0]
    listed = "\n".join(f"  {name}" for name in matching or jobs)
    if not jobs:
        raise ExportError(
            f"{storage.root} holds no job with a {JOB}: give the output folder of a job, or start "
            "the job again with the same command (what is finished is not computed again)")
    raise ExportError(f"{storage.root} holds " + (
        f"{len(matching)} jobs" if matching else f"no job {job!r}") + f": give one of\n{listed}")


def export_job(storage: Storage, job: str) -> JobExport:
    """Return what a job left.

    Args:
        storage: The job's output.
        job: The job's key.

    Raises:
        StorageError: The job's own file is damaged, or the storage does not answer.
    """
    record = read_record(storage, f"jobs/{job}/{JOB}", JobRecord)
    try:
        settings = ExperimentSettings.model_validate(record.settings)
    except ValidationError as error:
        first = error.errors()[0]
        raise DamagedError(
            f"{storage.uri(f'jobs/{job}/{JOB}')}: no settings of this version "
            f"({'.'.join(map(str, first['loc']))}: {first['msg']}): the job's own command writes "
            "the file anew") from error
    begun = set(storage.names(f"jobs/{job}/{CELLS}"))
    cells = [_cell(storage, settings, cell_path(job, dataset, model), begun, dataset, model)
             for dataset in settings.datasets for model in settings.models]
    rows = [row for cell in cells for row in cell.rows]
    return JobExport(job=job, made=now(), output=storage.root, record=record, settings=settings,
                     cells=cells, evidence=evidence(storage, rows, settings, record.starts))


def _cell(storage: Storage, settings: ExperimentSettings, path: str, begun: set[str], dataset: str,
          model: str) -> CellExport:
    """Return what a cell left.

    Args:
        storage: The job's output.
        settings: The experiment's.
        path: Of the cell's journal.
        begun: The names of all journals that exist.
        dataset: The data set's name.
        model: The model's name.
    """
    if path.rpartition("/")[2] not in begun:
        return CellExport(dataset, model, ["everything: it has not begun"])
    try:
        journal = read_record(storage, path, CellRecord)
    except DamagedError as damage:
        return CellExport(dataset, model, [f"everything: {damage}"])
    if (journal.facts.dataset, journal.facts.model) != (dataset, model):
        return CellExport(dataset, model, [
            f"everything: {storage.uri(path)} is the journal of another cell, "
            f"{journal.facts.dataset} x {journal.facts.model}"])
    with ThreadPoolExecutor(READERS, thread_name_prefix="results") as pool:
        steps = list(pool.map(lambda step: _step(storage, step, journal.failed.get(step.folder)),
                              journal.steps))
    damaged = {step.folder for step in steps if step.state == "damaged"}
    rows = cell_rows(storage, journal.model_copy(update={
        "steps": [step for step in journal.steps if step.folder not in damaged]}))
    facts = journal.facts
    return CellExport(
        dataset, model, list(_missing(settings, journal, steps, rows)),
        class_names=facts.class_names, selection_metric=facts.selection_metric,
        selected=journal.selected, steps=steps, error=journal.error, rows=rows)


def _step(storage: Storage, record: StepRecord, failure: str | None) -> StepExport:
    def step(state: State, error: str | None = None, result: Result | None = None) -> StepExport:
        return StepExport(kind=record.kind, name=record.name, folder=record.folder,
                          group=record.group, search=record.search, parameters=record.parameters,
                          state=state, error=error, result=result)

    try:
        result = read_result(storage, record.folder, RESULT_TYPES.get(record.kind, OtherResult))
    except DamagedError as damage:
        return step("damaged", str(damage))
    except FileNotFoundError:
        return step("failed" if failure else _unfinished(storage, record), failure)
    diverged = isinstance(result, TrainingResult) and result.diverged
    return step("diverged" if diverged else "finished", result=result)


def _unfinished(storage: Storage, step: StepRecord) -> State:
    if step.kind == Trial.kind and storage.exists(f"{step.folder}/{STOPPED}"):
        return "stopped early"
    return "under way" if storage.exists(f"{step.folder}/{RUNNING}") else "missing"


def _missing(settings: ExperimentSettings, journal: CellRecord, steps: Sequence[StepExport],
             rows: Sequence[Row]) -> Iterable[str]:
    """Yield sentences on what a finished cell would have and this one has not."""
    if journal.error:
        yield f"the cell stopped: {journal.error}"
    for name, error in journal.left_out.items():
        yield f"{name} failed: {error}"
    for search in dict.fromkeys(step.group for step in steps if step.search):
        trials = [step for step in steps if step.search and step.group == search]
        left = [step for step in trials if step.state in ("missing", "under way")]
        selected = search in journal.selected
        if left:
            yield (f"{search}: {len(left)} of {len(trials)} trials are not finished"
                   + (", the choice was made among the others" if selected else ""))
        if not selected:
            yield f"{search}: nothing is selected yet"
    tested = {(row.approach, row.repeat) for row in rows}
    for approach in (BASELINE, *settings.approaches):
        if approach in journal.left_out:
            continue
        absent = [r for r in range(settings.repeats) if (approach, r) not in tested]
        if len(absent) == settings.repeats:
            yield f"{approach}: no final model is tested yet"
        elif absent:
            yield f"{approach}: repeat {', '.join(map(str, absent))} is not tested yet"
    for step in steps:
        if step.name in journal.left_out:
            continue
        of_other_kind = step.kind not in (Trial.kind, Model.kind, Test.kind)
        diverged = (step.kind, step.state) == (Model.kind, "diverged")
        if (step.state in ("failed", "damaged") or diverged
                or of_other_kind and step.state != "finished"):
            yield f"{step.name}: {step.state}" + (f" ({step.error})" if step.error else "")


def map_scores(storage: Storage, folder: str) -> dict[str, np.ndarray] | None:
    """Return what a judgement of maps left for each image; None where the file is gone.

    Raises:
        StorageError: It is damaged.
    """
    try:
        return read_arrays(storage, f"{folder}/{MAP_SCORES}")
    except FileNotFoundError:
        return None
