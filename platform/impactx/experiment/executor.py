"""Who does the work: the interface of an executor, and the one that does it all in this process.

`impactx.cluster` has the executor that spreads the work over a Ray cluster.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from impactx.experiment.paper import published
from impactx.experiment.tracker import Run, Tracker
from impactx.experiment.units import CHECKPOINT, MAP_SCORES, Unit, WorkError
from impactx.experiment.work import (
    ShardWorker,
    evaluate_unit,
    finish_maps,
    open_store,
    split_of,
    train_unit,
)
from impactx.experiment.workplace import Workplace
from impactx.settings import DatasetSettings

# unit, result, error; of a trial that was stopped the result has `stopped`, and what it had come to
OnResult = Callable[[Unit, dict[str, Any] | None, str | None], None]
OnEpoch = Callable[[Unit, dict[str, float]], None]  # unit, the epoch's metrics
OnShards = Callable[[int, int, int], None]  # maps done now, maps that were there before, maps of all


@dataclass(frozen=True)
class Task:
    """A unit to work on, and the run that tracks it: its key, its parent's key and its tags."""

    unit: Unit
    run_key: str
    parent_key: str
    tags: dict[str, str]

    def open_run(self, tracker: Tracker) -> Run:
        """Begin the task's run, or continue it."""
        return tracker.run(self.run_key, name=self.unit.name, parent=self.parent_key, params=self.unit.params,
                           tags=self.tags)


@dataclass(frozen=True)
class Limits:
    """What keeps a search from training every trial to its end.

    may_begin: asked before each trial, in their order; after a no nothing more is begun. halving: how trials are
    stopped early (metric, grace_epochs, reduction, epochs), empty where none is; known: the histories of the trials
    that ended earlier, with which the others are compared.
    """

    may_begin: Callable[[Unit], bool] = lambda unit: True
    halving: Mapping[str, Any] = field(default_factory=dict)
    known: Sequence[Sequence[Mapping[str, float]]] = ()


UNLIMITED = Limits()


class Executor(Protocol):
    """Does tasks whose results are not there yet. Results and their files are artifacts when it returns."""

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch,
               limits: Limits = UNLIMITED) -> None:
        """Train many trials; on_result is called as each ends, with its result or its error."""

    def train(self, task: Task, on_epoch: OnEpoch) -> dict[str, Any]:
        """Train one model; raises what made it fail."""

    def cells_at_once(self) -> int:
        """How many cells, each in a thread of its own, may be under way."""

    def trainings_at_once(self) -> int:
        """How many calls of `train`, each in a thread of its own, there is room for."""

    def explain(self, task: Task, on_shards: OnShards) -> dict[str, Any]:
        """Make the maps of a store that are missing."""

    def evaluate(self, task: Task) -> dict[str, Any]:
        """Read the test set with one model."""

    def judge(self, task: Task) -> dict[str, Any]:
        """Judge the maps of one model on test images."""

    def stop(self) -> None:
        """End whatever is under way, here and elsewhere: the job failed or was interrupted. Nothing follows."""


STOPPED_TAG = {"impactx.stopped": "asha"}


def final_metrics(unit: Unit, result: dict[str, Any]) -> dict[str, float]:
    """What MLflow's table shows of a finished unit: its result's numbers by the names of its role.

    Of a training: the best epoch's values and the costs; of a test: beside its own numbers the model's validation
    accuracy and the paper's accuracy, if it has one, so that one row says it all.
    """
    if unit.role == "maps":
        return {f"maps_{k}" if not k.startswith("map") else k: v for k, v in _numbers(result).items()}
    if unit.role == "test":
        paper = published(DatasetSettings.model_validate(unit.inputs["dataset"]), unit.params["model"],
                          unit.params["approach"])
        return {f"test_{k}": v for k, v in _numbers(result).items()} | (
            {} if paper is None else {"paper_accuracy": paper}) | {
            f"best_{k}": v for k, v in unit.inputs["best"].items() if k == "val_accuracy"}
    if unit.role == "map_quality":
        from impactx.evaluation.judgement import MapQuality

        return MapQuality.from_json(result).metrics()
    best = result.get("best") or {}
    return {f"best_{k}": v for k, v in best.items() if k not in ("epoch", "seconds") and v is not None} | {
        "best_epoch": result["best_epoch"], "epochs": result["epochs"], "train_seconds": result["seconds"],
        "diverged": float(result["diverged"])}


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in result.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def tracked_training(task: Task, place: Workplace, tracker: Tracker, *,
                     report: Callable[[dict[str, float]], object] | None = None, **where: Any) -> dict[str, Any]:
    """train_unit with every epoch and the result in the task's run; report is called after each epoch as well.

    Where it answers with something true the training stops there, resumable (see training.loop.fit).

    The run holds the resolved unit (unit.json) and, of a model, the split (split.npz) and the checkpoint.
    where: device, rank and world_size of train_unit. Only rank 0 tracks.
    """
    if where.get("rank", 0):
        return train_unit(task.unit, place, **where)
    # The run reads its files until it ends: the folder that holds them outlives it.
    with tempfile.TemporaryDirectory(prefix="impactx-") as folder, task.open_run(tracker) as run:
        for file in training_files(task.unit, place, Path(folder), finished=False):
            run.log_file(file)

        def on_epoch(row: dict[str, float]) -> object:
            run.log_metrics({k: v for k, v in row.items() if k != "epoch"}, step=int(row["epoch"]))
            return report(row) if report is not None else None

        result = train_unit(task.unit, place, on_epoch=on_epoch, **where)
        run.log_history([{k: v for k, v in row.items() if v is not None} for row in result["history"]])
        run.log_metrics(final_metrics(task.unit, result))
        if result.get("stopped"):
            run.set_tags(STOPPED_TAG)
        if result["weights"]:
            if task.unit.role == "model":
                run.log_file(_local_file(task.unit, CHECKPOINT, place, Path(folder)))
            run.set_tags({"impactx.weights": result["weights"],
                          "impactx.checkpoint": place.artifacts.storage.uri(f"{task.unit.folder}/{CHECKPOINT}")})
        return result


def training_files(unit: Unit, place: Workplace, folder: Path, *, finished: bool = True) -> list[Path]:
    """What a training's run holds for whoever looks at it, as files in the folder: what it depends on (unit.json),
    and of a model its split (split.npz) and, once it is finished, its checkpoint."""
    about = folder / "unit.json"
    about.write_text(json.dumps({"recipe": unit.recipe, "inputs": unit.inputs}, indent=1, sort_keys=True))
    if unit.role != "model":
        return [about]
    split, kept = split_of(unit, place.dataset(unit.inputs["dataset"])), folder / "split.npz"
    np.savez_compressed(kept, train=split.train, validation=split.validation, common=split.common)
    files = [about, kept]
    if finished and place.artifacts.storage.exists(f"{unit.folder}/{CHECKPOINT}"):
        files.append(_local_file(unit, CHECKPOINT, place, folder))
    return files


def _local_file(unit: Unit, name: str, place: Workplace, folder: Path) -> Path:
    """A file of the unit as a local one: where it lies, or a copy in the folder."""
    storage, path = place.artifacts.storage, f"{unit.folder}/{name}"
    if not storage.remote:
        return Path(storage.uri(path))
    copy = folder / name
    copy.write_bytes(storage.read(path))
    return copy


def tracked_evaluation(task: Task, place: Workplace, tracker: Tracker, **where: Any) -> dict[str, Any]:
    """evaluate_unit with its result in the task's run."""
    with task.open_run(tracker) as run:
        result = evaluate_unit(task.unit, place, **where)
        run.log_metrics(final_metrics(task.unit, result))
        return result


def tracked_judgement(task: Task, place: Workplace, tracker: Tracker, **where: Any) -> dict[str, Any]:
    """judge_maps with its numbers, its result (map_quality.json) and map_scores.npz in the task's run."""
    from impactx.experiment.map_quality import judge_maps

    with tempfile.TemporaryDirectory(prefix="impactx-") as folder, task.open_run(tracker) as run:
        result = judge_maps(task.unit, place, **where)
        run.log_metrics(final_metrics(task.unit, result))
        run.log_text(json.dumps(result, indent=1), "map_quality.json")
        run.log_file(_local_file(task.unit, MAP_SCORES, place, Path(folder)))
        return result


class LocalExecutor:
    """All work one after the other in this process: for a notebook, or a machine without Ray."""

    def __init__(self, place: Workplace, tracker: Tracker, device: str = "cpu") -> None:
        self.place, self.tracker, self.device = place, tracker, device

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch,
               limits: Limits = UNLIMITED) -> None:
        """See Executor.search. Raises WorkError where trials are to be stopped early: that is Ray Tune's."""
        if limits.halving:
            raise WorkError("grid.strategy = 'asha' needs a Ray cluster: in one process use grid or random")
        for task in tasks:
            if not limits.may_begin(task.unit):
                return
            try:
                result = self.train(task, on_epoch)
            except Exception as error:  # one bad trial must not stop the grid; it is reported by on_result
                on_result(task.unit, None, f"{type(error).__name__}: {error}")
            else:
                on_result(task.unit, result, None)

    def train(self, task: Task, on_epoch: OnEpoch) -> dict[str, Any]:
        """See Executor.train."""
        return tracked_training(task, self.place, self.tracker, device=self.device,
                                report=lambda row: on_epoch(task.unit, row))

    def cells_at_once(self) -> int:
        """One: there is one process."""
        return 1

    def trainings_at_once(self) -> int:
        """One."""
        return 1

    def explain(self, task: Task, on_shards: OnShards) -> dict[str, Any]:
        """See Executor.explain."""
        with task.open_run(self.tracker) as run:
            store, started, done, worked = open_store(task.unit, self.place), time.perf_counter(), 0, 0.0
            missing = store.missing()
            before = store.spec.images - sum(len(store.shard_indices(k)) for k in missing)
            worker = ShardWorker(task.unit, self.place, self.device) if missing else None
            for shard in missing:
                about = worker.make(shard)
                done, worked = done + int(about["maps"]), worked + about["seconds"]
                on_shards(done, before, store.spec.images)
            result = finish_maps(task.unit, self.place, time.perf_counter() - started, done, worked)
            log_maps(run, task.unit, result)
            return result

    def evaluate(self, task: Task) -> dict[str, Any]:
        """See Executor.evaluate."""
        return tracked_evaluation(task, self.place, self.tracker, device=self.device)

    def judge(self, task: Task) -> dict[str, Any]:
        """See Executor.judge."""
        return tracked_judgement(task, self.place, self.tracker, device=self.device)

    def stop(self) -> None:
        """Nothing is under way elsewhere."""


def log_maps(run: Run, unit: Unit, result: dict[str, Any]) -> None:
    """Log a finished store."""
    run.log_metrics(final_metrics(unit, result))
    run.set_tags({"impactx.maps": result["folder"]})


