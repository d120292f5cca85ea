"""The executor that does one step after the other in this process, without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from impactx.experiment.steps.base import Context, Result, Step, StepError
from impactx.experiment.steps.maps import MapsResult
from impactx.experiment.steps.training import TrainingResult, Trial
from impactx.experiment.workplace import Workplace
from impactx.run.executor import (
    UNLIMITED,
    Limits,
    OnEpoch,
    OnMaps,
    OnResult,
    Task,
    tracked,
)
from impactx.run.tracker import Tracker


class LocalExecutor:
    """All work in one process, for a notebook or a machine without Ray; see `Executor`."""

    def __init__(self, place: Workplace, tracker: Tracker, device: str = "cpu") -> None:
        self.place, self.tracker, self.device = place, tracker, device

    def search(self, tasks: Sequence[Task], on_result: OnResult, on_epoch: OnEpoch,
               limits: Limits = UNLIMITED) -> None:
        """See `Executor.search`.

        Raises:
            StepError: Trials are to be stopped early, which Ray Tune does.
        """
        if limits.halving is not None:
            raise StepError("grid.strategy = 'asha' needs a Ray cluster: in one process use grid "
                            "or random")
        for task in tasks:
            trial = cast(Trial, task.step)
            if not limits.may_begin(trial):
                return
            try:
                result = self.train(task, on_epoch)
            # One bad trial must not end the search; on_result reports it.
            except Exception as error:
                on_result(trial, None, f"{type(error).__name__}: {error}")
            else:
                on_result(trial, result, None)

    def train(self, task: Task, on_epoch: OnEpoch) -> TrainingResult:
        """See `Executor.train`."""
        context = Context(self.place, self.device,
                          on_epoch=lambda row: on_epoch(task.step, row))
        return cast(TrainingResult, tracked(task, context, self.tracker))

    def explain(self, task: Task, on_maps: OnMaps) -> MapsResult:
        """See `Executor.explain`."""
        context = Context(self.place, self.device, on_maps=on_maps)
        return cast(MapsResult, tracked(task, context, self.tracker))

    def process(self, task: Task) -> Result:
        """See `Executor.process`."""
        return tracked(task, Context(self.place, self.device), self.tracker)

    def cells_at_once(self) -> int:
        """One: there is one process."""
        return 1

    def steps_at_once(self, step: Step[Any]) -> int:
        """One."""
        return 1

    def stop(self) -> None:
        """Nothing is under way elsewhere."""
