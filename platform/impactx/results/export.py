"""What a job left, finished or not, as plain data: what `impactx.report` is made from.

Everything comes from the job's journal and the results of its steps. Neither the data set nor a
checkpoint is opened, so it can be done on another machine, and while the job still runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from impactx.approaches.baseline import BASELINE
from impactx.experiment.artifacts import (
    MAP_SCORES,
    RESULT,
    RUNNING,
    STOPPED,
    read_arrays,
    read_record,
)
from impactx.experiment.steps.training import Model, Trial
from impactx.results.evidence import evidence
from impactx.results.records import CELLS, JOB, CellRecord, JobRecord, StepRecord, cell_path, now
from impactx.results.rows import Row, cell_rows
from impactx.settings import ExperimentSettings
from impactx.storage import DamagedError, Storage

READERS = 16  # files read at once: an S3 store answers each in tens of milliseconds
DROPPED = {"recipe", "code", "kind", "history", "name"}  # of a result


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
    there = [name for name in storage.folders("jobs") if storage.exists(f"jobs/{name}/{JOB}")]
    matching = [name for name in there if job is None or name == job] or [
        name for name in there if job is not None and name.startswith(job)]
    if len(matching) == 1:
        return matching[0]
    listed = "\n".join(f"  {name}" for name in matching or there)
    if not there:
        raise ExportError(
            f"{storage.root} holds no job with a {JOB}: give the output folder of a job, or start "
            "the job again with the same command (what is finished is not computed again)")
    raise ExportError(f"{storage.root} holds " + (
        f"{len(matching)} jobs" if matching else f"no job {job!r}") + f": give one of\n{listed}")


def export_job(storage: Storage, job: str) -> dict[str, Any]:
    """Return the job as plain data.

    It has the keys job, made (time), output, settings, starts (see `records.Start`), evidence (see
    `results.evidence`), and cells, a list of mappings with

        dataset, model, class_names, image_size, train_images, selection_metric
        selected   folder of the selected trial, by the search's title
        units      steps in the flow's order: role (kind), name, folder, group, step (the group's
                   title where it is a search, else ""), params, state (finished, diverged, stopped
                   early, failed, under way, missing or damaged), error, result (of a finished one;
                   a final model's with its history)
        error      what ended the cell, or None
        rows       of the final models that were tested (`results.rows.Row` as plain data)
        missing    sentences on what is not there yet

    Args:
        storage: The job's output.
        job: The job's key.

    Raises:
        StorageError: The job's own file is damaged, or the storage does not answer.
    """
    record = read_record(storage, f"jobs/{job}/{JOB}", JobRecord)
    settings = ExperimentSettings.model_validate(record.settings)
    there = set(storage.names(f"jobs/{job}/{CELLS}"))
    cells: list[dict[str, Any]] = []
    rows: list[Row] = []
    for dataset in settings.datasets:
        for model in settings.models:
            path = cell_path(job, dataset, model)
            if path.rpartition("/")[2] not in there:
                cells.append(_nothing(dataset, model, "everything: it has not begun"))
                continue
            try:
                journal = read_record(storage, path, CellRecord)
            except DamagedError as damage:
                cells.append(_nothing(dataset, model, f"everything: {damage}"))
                continue
            own = _rows(storage, journal)
            rows += own
            cells.append(_cell(storage, settings, journal, own))
    return {"job": job, "made": now(), "output": storage.root, "settings": record.settings,
            "starts": [start.model_dump() for start in record.starts], "cells": cells,
            "evidence": evidence(storage, rows, settings)}


def _rows(storage: Storage, journal: CellRecord) -> list[Row]:
    """Return a cell's rows without those whose results are damaged, which are named as missing."""
    readable = [step for step in journal.steps if not _damaged(storage, step)]
    return cell_rows(storage, journal.model_copy(update={"steps": readable}))


def _damaged(storage: Storage, step: StepRecord) -> bool:
    try:
        storage.read_json(f"{step.folder}/{RESULT}")
    except FileNotFoundError:
        return False
    except DamagedError:
        return True
    return False


def _nothing(dataset: str, model: str, why: str) -> dict[str, Any]:
    return {"dataset": dataset, "model": model, "class_names": [], "image_size": None,
            "train_images": None, "selection_metric": "val_accuracy", "selected": {}, "units": [],
            "error": None, "rows": [], "missing": [why]}


def _cell(storage: Storage, settings: ExperimentSettings, journal: CellRecord, rows: Sequence[Row]
          ) -> dict[str, Any]:
    with ThreadPoolExecutor(READERS, thread_name_prefix="results") as pool:
        steps = list(pool.map(lambda step: _step(storage, step, journal.failed.get(step.folder)),
                              journal.steps))
    facts = journal.facts.model_dump(exclude={"fingerprint"})
    return facts | {
        "selected": journal.selected, "units": steps, "error": journal.error,
        "rows": [row.as_dict() for row in rows],
        "missing": list(_missing(settings, journal, steps, rows))}


def _step(storage: Storage, step: StepRecord, error: str | None) -> dict[str, Any]:
    plain = {"role": step.kind, "name": step.name, "folder": step.folder, "group": step.group,
             "step": step.group if step.search else "", "params": step.parameters}
    try:
        result = storage.read_json(f"{step.folder}/{RESULT}")
    except DamagedError as damage:
        return plain | {"state": "damaged", "error": str(damage), "result": None}
    except FileNotFoundError:
        state = "failed" if error else _unfinished(storage, step)
        return plain | {"state": state, "error": error, "result": None}
    kept = {key: value for key, value in result.items()
            if key not in DROPPED or (key == "history" and step.kind == Model.kind)}
    state = "diverged" if kept.get("diverged") else "finished"
    return plain | {"state": state, "error": None, "result": kept}


def _unfinished(storage: Storage, step: StepRecord) -> str:
    if step.kind == Trial.kind and storage.exists(f"{step.folder}/{STOPPED}"):
        return "stopped early"
    under_way = storage.exists(f"{step.folder}/{RUNNING}")
    return "under way" if under_way else "missing"


def _missing(settings: ExperimentSettings, journal: CellRecord, steps: list[dict[str, Any]],
             rows: Sequence[Row]) -> Iterable[str]:
    """Yield sentences on what a finished cell would have and this one has not."""
    if journal.error:
        yield f"the cell stopped: {journal.error}"
    for what, error in journal.left_out.items():
        yield f"{what} failed: {error}"
    for search in dict.fromkeys(step["step"] for step in steps if step["step"]):
        trials = [step for step in steps if step["step"] == search]
        left = [step for step in trials if step["state"] in ("missing", "under way")]
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
        if step["name"] in journal.left_out:
            continue
        others = step["role"] not in ("trial", "model", "test") and step["state"] != "finished"
        diverged = (step["role"], step["state"]) == ("model", "diverged")
        if step["state"] in ("failed", "damaged") or diverged or others:
            yield f"{step['name']}: {step['state']}" + (
                f" ({step['error']})" if step["error"] else "")


def map_scores(storage: Storage, folder: str) -> dict[str, np.ndarray] | None:
    """Return what a judgement of maps left for each image; None where the file is gone.

    Raises:
        StorageError: It is damaged.
    """
    try:
        return read_arrays(storage, f"{folder}/{MAP_SCORES}")
    except FileNotFoundError:
        return None
