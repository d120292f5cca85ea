"""A search by Ray Tune: its Tuner, its resources, its scheduler and its callbacks.

Ray places the trials of all cells together. A scheduler of our own that shared the cluster between
the cells was measured against that and given up (docs/LOG.md).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from impactx.cluster.trial import Shared, TrainTrial, trial_class
from impactx.experiment.artifacts import Artifacts
from impactx.experiment.steps.training import TrainingResult, Trial
from impactx.run.executor import Limits, OnEpoch, OnResult, Task

_REGISTERING = threading.Lock()  # Tune's registry of trainables is not made for several threads


class InOrder(Searcher):
    """Hands Tune the trials in their order, as long as the next one may begin.

    Args:
        trials: Of the search.
        may_begin: See `run.executor.Limits`.
        places: One for each trial that may be under way, of all searches together; None: no limit.
    """

    def __init__(self, trials: Sequence[Trial], may_begin: Callable[[Trial], bool],
                 places: threading.Semaphore | None = None) -> None:
        super().__init__()
        self._waiting, self._may_begin = list(reversed(trials)), may_begin
        self._places, self._held = places, set[str]()

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial, that there is none, or None: Tune then asks again."""
        if self._places is not None and self._waiting:
            if not self._places.acquire(blocking=False):
                return None
            self._held.add(trial_id)
        if not self._waiting or not self._may_begin(self._waiting[-1]):
            self._waiting.clear()
            self.on_trial_complete(trial_id)
            return Searcher.FINISHED
        return {"step": self._waiting.pop().key}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None,
                          error: bool = False) -> None:
        """Give a trial's place back."""
        if self._places is not None and trial_id in self._held:
            self._held.remove(trial_id)
            self._places.release()

    def close(self) -> None:
        """Give all places back, where the search has ended before its trials."""
        for trial_id in list(self._held):
            self.on_trial_complete(trial_id)

    def __getstate__(self) -> dict[str, Any]:
        # Tune keeps a copy of its settings on disk, from which nobody restores anything: what is
        # finished is found in the output.
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing; see `__getstate__`."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing; see `__getstate__`."""


class Halving(ASHAScheduler):
    """Tune's ASHA, which begins with the trials of the search that ended earlier."""

    def __init__(self, limits: Limits) -> None:
        halving = limits.halving
        if halving is None:
            raise ValueError("the limits of this search stop no trial early")
        # At its last epoch a training ends by itself, hence stop_last_trials.
        super().__init__(
            time_attr="epoch", metric=halving.metric, mode="max", max_t=halving.epochs,
            grace_period=halving.grace_epochs, reduction_factor=halving.reduction,
            stop_last_trials=False)
        for number, history in enumerate(limits.histories):
            # It asks a trial for its name alone, and the controller for nothing.
            earlier, controller = cast(Any, SimpleNamespace(trial_id=f"earlier-{number}")), cast(
                Any, None)
            self.on_trial_add(controller, earlier)
            for row in history:
                self.on_trial_result(controller, earlier, dict(row))

    def __getstate__(self) -> dict[str, Any]:
        return {}


class Closed(Exception):
    """The job has left its cluster."""


class _Left(BaseException):
    """The job leaves its cluster.

    It is no Exception: for one, Tune would first wait for the end of each trial.
    """


class _Reports(tune.Callback):
    """Hands Tune's events on to the run, and ends Tune where the job ends."""

    def __init__(self, trials: dict[str, Trial], artifacts: Artifacts, on_result: OnResult,
                 on_epoch: OnEpoch, left: threading.Event) -> None:
        self._trials, self._artifacts = trials, artifacts
        self._on_result, self._on_epoch, self._left = on_result, on_epoch, left

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Leave before Tune asks Ray for anything; called ten times a second."""
        if self._left.is_set():
            raise _Left

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any,
                        result: dict[str, Any], **info: Any) -> None:
        """An epoch is done, or the trial."""
        if "val_accuracy" in result:
            self._on_epoch(self._trials[trial.config["step"]], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial ended: with a result, stopped by the search, or with an error."""
        step, last = self._trials[trial.config["step"]], trial.last_result
        result = self._artifacts.result(step)
        # A training that ended by itself says so in a row of its own, without an epoch.
        if result is None and "epoch" in last:
            result = self._artifacts.stopped(step) or _stopped(last)
        self._on_result(step, result, last.get("error"))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """The trial was tried often enough."""
        self._on_result(self._trials[trial.config["step"]], None,
                        _last_line(trial.error_file) or "its process died; see Ray's logs")


def _stopped(last: dict[str, Any]) -> TrainingResult:
    """Return what is known of a stopped trial whose actor has not written it down yet."""
    row = {name: value for name, value in last.items()
           if name.startswith(("train_", "val_", "common_")) or name in ("epoch", "seconds")}
    return TrainingResult(
        seconds=0, best=None, best_epoch=0, epochs=int(last["epoch"]), history=[row],
        diverged=False, weights=None, train_images=0, validation_images=0, seconds_this_process=0,
        stopped=True)


def tune_search(tasks: Sequence[Task], artifacts: Artifacts, train: TrainTrial, *,
                resources: dict[str, float], places: threading.Semaphore | None, max_failures: int,
                scratch: str, on_result: OnResult, on_epoch: OnEpoch, limits: Limits,
                left: threading.Event) -> None:
    """Train all tasks of a search as trials; return when each has ended.

    Args:
        tasks: Of `Trial` steps.
        artifacts: Where their results are kept.
        train: Trains one of them in its actor.
        resources: That a trial's actor asks Ray for.
        places: Shared by all searches, one for each trial that may be under way; None: what fits.
        max_failures: Tries of a trial whose process dies.
        scratch: A folder for Tune's own bookkeeping.
        on_result: See `run.executor`.
        on_epoch: See `run.executor`.
        limits: What keeps trials from beginning or going on.
        left: Set where the job leaves its cluster.

    Raises:
        Closed: The job has left its cluster.
    """
    trials = {task.step.key: cast(Trial, task.step) for task in tasks}
    shared = Shared(ray.put({task.step.key: task for task in tasks}), train)
    name = f"search-{time.time_ns()}"
    with _REGISTERING:
        tune.register_trainable(name, trial_class(shared, resources))
    in_order = InOrder(list(trials.values()), limits.may_begin, places)
    tuner = tune.Tuner(
        name,
        tune_config=tune.TuneConfig(
            search_alg=in_order,
            scheduler=Halving(limits) if limits.halving is not None else None,
            num_samples=-1, reuse_actors=True),
        run_config=tune.RunConfig(
            name=name, storage_path=scratch, verbose=0,
            callbacks=[_Reports(trials, artifacts, on_result, on_epoch, left)],
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            failure_config=tune.FailureConfig(max_failures=max_failures)))
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            tuner.fit()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)

    # Not in the main thread, whose Ctrl-C ends the job and not only the search.
    thread = threading.Thread(target=fit, name=name, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    in_order.close()
    if errors and isinstance(errors[0], _Left):
        raise Closed from errors[0]
    if errors:
        raise errors[0]


def _last_line(path: str | None) -> str:
    """Return the last line of Tune's error file; empty where there is none."""
    try:
        with open(path or "", encoding="utf8") as stream:
            lines = [line for line in stream.read().splitlines() if line.strip()]
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""
