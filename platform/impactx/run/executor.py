"""Who does the work: the protocol of an executor, and what all of them share.

`run.local` does everything in this process; `impactx.cluster` spreads it over a Ray cluster.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from impactx.experiment.steps.base import Context, Result, Step
from impactx.experiment.steps.maps import MapsResult
from impactx.experiment.steps.training import Halving, TrainingResult, Trial
from impactx.experiment.workplace import Workplace
from impactx.run.tracker import Run, RunIdentity, Tracker

R = TypeVar("R", bound=Result)
Epoch = dict[str, float]


@dataclass(frozen=True)
class Task:
    """A step to be done, and the run that tracks it."""

    step: Step[Any]
    run: RunIdentity

    @property
    def owner(self) -> str:
        """The key of what the run belongs to: its cell's."""
        return self.run.parent or self.run.key

    def open_run(self, tracker: Tracker) -> Run:
        """Begin the task's run, or continue it."""
        return tracker.run(self.run)


# Called as a trial ends: its step, its result (None where it failed), and the error. The result of
# a trial that was stopped early says so.
OnResult = Callable[[Trial, TrainingResult | None, str | None], None]
OnEpoch = Callable[[Step[Any], Epoch], None]  # a training's step, and an epoch's metrics
OnMaps = Callable[[int, int, int], None]  # maps made now, maps that were there before, maps of all


@dataclass(frozen=True)
class Limits:
    """What keeps a search from training every trial to its end.

    Attributes:
        may_begin: Asked before each trial, in their order; after a no, nothing more begins.
        halving: By what trials are stopped early; None where none is.
        histories: Of the trials that ended earlier, with which the others are compared.
    """

    may_begin: Callable[[Trial], bool] = lambda trial: True
    halving: Halving | None = None
    histories: Sequence[Sequence[dict[str, float | None]]] = ()


UNLIMITED = Limits()


class Executor(Protocol):
    """Does tasks whose results are not there yet; what it returns is kept by then."""

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch,
               limits: Limits = UNLIMITED) -> None:
        """Train many trials; on_result is called as each ends."""

    def train(self, task: Task, on_epoch: OnEpoch) -> TrainingResult:
        """Train one model; raises what made it fail."""

    def explain(self, task: Task, on_maps: OnMaps) -> MapsResult:
        """Make the maps of a store that are missing."""

    def process(self, task: Task) -> Result:
        """Do a step in one process."""

    def cells_at_once(self) -> int:
        """Return how many cells, each in a thread of its own, may be under way."""

    def steps_at_once(self, step: Step[Any]) -> int:
        """Return how many steps like this one there is room for at once."""

    def stop(self) -> None:
        """End whatever is under way: the job failed or was interrupted. Nothing follows."""


def tracked(task: Task, context: Context, tracker: Tracker) -> Result:
    """Do a step with its epochs, files, result and tags in the task's run.

    Only rank 0 of a training's workers tracks.
    """
    step, place = task.step, context.place
    step.check_code()
    if context.rank:
        rest: Result = step.execute(context)
        return rest
    # The run reads its files until it ends: the folder that holds them outlives it.
    with tempfile.TemporaryDirectory(prefix="impactx-") as folder, task.open_run(tracker) as run:
        early = set(step.files(place, Path(folder), None))
        for file in sorted(early):
            run.log_file(file)

        def on_epoch(row: Epoch) -> object:
            run.log_metrics({name: value for name, value in row.items() if name != "epoch"},
                            step=int(row["epoch"]))
            return context.on_epoch(row) if context.on_epoch is not None else None

        result: Result = step.execute(replace(context, on_epoch=on_epoch))
        if isinstance(result, TrainingResult):
            run.log_history([_known(row) for row in result.history])
        log_result(run, step, result, place)
        for file in step.files(place, Path(folder), result):
            if file not in early:
                run.log_file(file)
        return result


def log_result(run: Run, step: Step[Any], result: Result, place: Workplace) -> None:
    """Log a finished step's numbers and tags."""
    run.log_metrics(step.metrics(result))
    run.set_tags(step.tags(result, place.artifacts.storage))


def history_of(result: Result) -> list[Epoch]:
    """Return the epochs of a training's result; empty for other steps."""
    return [_known(row) for row in result.history] if isinstance(result, TrainingResult) else []


def _known(row: dict[str, float | None]) -> Epoch:
    return {name: value for name, value in row.items() if value is not None}
