"""What a job left, finished or not, as one table of plain data: what `impactx.report` is made from.

Everything comes from the job's journal (`experiment.journal`) and its units' results; neither the data set nor a
checkpoint is opened, so it can be done on another machine and while the job still runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from impactx.experiment.evidence import evidence
from impactx.experiment.journal import CELLS, JOB, now
from impactx.experiment.results import Row
from impactx.experiment.units import MAP_SCORES, RESULT, RUNNING, STOPPED, read_arrays
from impactx.storage import DamagedError, Storage

READERS = 16  # files read at once: an S3 store answers each in tens of milliseconds
DROPPED = {"recipe", "history", "name"}  # of a result; a final model keeps its history


class ExportError(RuntimeError):
    """There is no such job in the output folder; the message lists those that are."""


def find_job(storage: Storage, job: str | None = None) -> str:
    """The key of a job by its key or the beginning of it; of the only one where job is None. Raises ExportError."""
    there = [name for name in storage.folders("jobs") if storage.exists(f"jobs/{name}/{JOB}")]
    found = [name for name in there if job is None or name == job] or [
        name for name in there if job is not None and name.startswith(job)]
    if len(found) == 1:
        return found[0]
    listed = "\n".join(f"  {name}" for name in found or there)
    if not there:
        raise ExportError(f"{storage.root} holds no job with a {JOB}: give the output folder of a job, or start the "
                          "job again with the same command (what is finished is not computed again)")
    raise ExportError(f"{storage.root} holds " + (f"{len(found)} jobs" if found else f"no job {job!r}")
                      + f": give one of\n{listed}")


def export_job(storage: Storage, job: str) -> dict[str, Any]:
    """The job as plain data:

    job, made (time), settings, starts (time, command, code, versions, machine), cells: a list of
      dataset, model, class_names, image_size, train_images, selection_metric, selected ({search: folder}),
      units: role, name, folder, step, params, state (finished, diverged, stopped early, failed,
        under way, missing or damaged), error,
        result (of a finished one; a final model's with its history)
      error: what stopped the cell, or None
      rows: of the final models that were tested (experiment.results.Row as plain data)
      missing: sentences on what is not there yet,
    evidence: what the rows show (experiment.evidence).
    Raises StorageError where the job's own file is damaged, or the storage does not answer.
    """
    about = storage.read_json(f"jobs/{job}/{JOB}")
    there = set(storage.names(f"jobs/{job}/{CELLS}"))
    cells = []
    for dataset in about["settings"]["datasets"]:
        for model in about["settings"]["models"]:
            if (name := f"{dataset}.{model}.json") not in there:
                cells.append(_nothing(dataset, model, "everything: it has not begun"))
                continue
            try:
                journal = storage.read_json(f"jobs/{job}/{CELLS}/{name}")
            except DamagedError as damage:
                cells.append(_nothing(dataset, model, f"everything: {damage}"))
            else:
                cells.append(_cell(storage, about["settings"], journal))
    rows, e = [Row(**row) for cell in cells for row in cell["rows"]], about["settings"]["evaluation"]
    return {"job": job, "made": now(), "output": storage.root, **about, "cells": cells,
            "evidence": evidence(storage, rows, about["settings"], resamples=e["resamples"], seed=e["seed"],
                                 confidence=e["confidence"])}


def _nothing(dataset: str, model: str, why: str) -> dict[str, Any]:
    return {"dataset": dataset, "model": model, "class_names": [], "image_size": None, "train_images": None,
            "selection_metric": "val_accuracy", "selected": {}, "units": [], "error": None, "rows": [],
            "missing": [why]}


def _cell(storage: Storage, settings: dict[str, Any], journal: dict[str, Any]) -> dict[str, Any]:
    with ThreadPoolExecutor(READERS, thread_name_prefix="results") as pool:
        units = list(pool.map(lambda unit: _unit(storage, unit, journal["failed"].get(unit["folder"])),
                              journal["units"]))
    return {k: v for k, v in journal.items() if k not in ("failed", "lost", "common")} | {
        "units": units, "missing": list(_missing(settings, journal, units))}


def _unit(storage: Storage, unit: dict[str, Any], error: str | None) -> dict[str, Any]:
    try:
        result = storage.read_json(f"{unit['folder']}/{RESULT}")
    except DamagedError as damage:
        return unit | {"state": "damaged", "error": str(damage), "result": None}
    except FileNotFoundError:
        return unit | {"state": "failed" if error else _unfinished(storage, unit), "error": error, "result": None}
    kept = {k: v for k, v in result.items() if k not in DROPPED or (k == "history" and unit["role"] == "model")}
    return unit | {"state": "diverged" if kept.get("diverged") else "finished", "error": None, "result": kept}


def _unfinished(storage: Storage, unit: dict[str, Any]) -> str:
    if unit["role"] == "trial" and storage.exists(f"{unit['folder']}/{STOPPED}"):
        return "stopped early"
    under_way = unit["role"] in ("trial", "model") and storage.exists(f"{unit['folder']}/{RUNNING}")
    return "under way" if under_way else "missing"


def _missing(settings: dict[str, Any], journal: dict[str, Any], units: list[dict[str, Any]]) -> Iterable[str]:
    """What a finished cell would have and this one has not, in words."""
    if journal["error"]:
        yield f"the cell stopped: {journal['error']}"
    lost = journal.get("lost", {})  # earlier versions noted none
    for what, error in lost.items():
        yield f"{what} failed: {error}"
    for step in dict.fromkeys(unit["step"] for unit in units if unit["step"]):
        left = [u for u in units if u["step"] == step and u["state"] in ("missing", "under way")]
        if left:
            yield (f"{step}: {len(left)} of {sum(u['step'] == step for u in units)} trials are not finished"
                   + (", the choice was made among the others" if step in journal["selected"] else ""))
        if step not in journal["selected"]:
            yield f"{step}: nothing is selected yet"
    tested = {(row["approach"], row["repeat"]) for row in journal["rows"]}
    for approach in ("baseline", *settings["approaches"]):
        if approach in lost:
            continue
        absent = [r for r in range(settings["repeats"]) if (approach, r) not in tested]
        if len(absent) == settings["repeats"]:
            yield f"{approach}: no final model is tested yet"
        elif absent:
            yield f"{approach}: repeat {', '.join(map(str, absent))} is not tested yet"
    for unit in units:
        if unit["name"] in lost:
            continue
        if unit["state"] in ("failed", "damaged") or (unit["role"], unit["state"]) == ("model", "diverged") or (
                unit["role"] not in ("trial", "model", "test") and unit["state"] != "finished"):
            yield f"{unit['name']}: {unit['state']}" + (f" ({unit['error']})" if unit["error"] else "")


def map_scores(storage: Storage, folder: str) -> dict[str, np.ndarray] | None:
    """What a unit that judged maps left, image by image (`judge_maps`); None where the file is gone.

    Raises StorageError where it is damaged.
    """
    try:
        return read_arrays(storage, f"{folder}/{MAP_SCORES}")
    except FileNotFoundError:
        return None
