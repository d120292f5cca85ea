"""A search by Ray Tune: which trial starts when, in one queue with everything else that the job does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import Searcher

from impactx.cluster.shares import Amounts, Closed, Shares
from impactx.cluster.trial import Shared, TrainTrial, trial_class
from impactx.experiment.steps.training import TrainingResult, Trial
from impactx.experiment.workplace import Workplace
from impactx.run.executor import Limits, OnEpoch, OnResult, Task

_REGISTERING = threading.Lock()  # Tune's registry of trainables is not made for several threads


class Turns(Searcher):
    """Hands Tune one task after the other, each when it is the owner's turn (see Shares).

    It holds a slot for each actor that Tune has, the one that Tune keeps for the next trial among them. Where others
    wait who hold less, it says that it is finished: Tune then lets go of every actor as its trial ends, and the rest
    of the tasks is for another Tuner.
    """

    def __init__(self, waiting: list[Task], shares: Shares, owner: str, need: Amounts,
                 may_begin: Callable[[Trial], bool]) -> None:
        """waiting: the next one last; tasks are taken away from it, all of them where the next may not begin. The
        caller has taken one slot for the owner."""
        super().__init__()
        self._may_begin = may_begin
        self._waiting, self._shares, self._owner, self._need = waiting, shares, owner, need
        self._slots, self._running, self._begun = 1, set[str](), False
        self._wish = f"search-{id(self)}"
        self.over = threading.Event()

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None: not now; FINISHED: no more from here."""
        idle = self._slots - len(self._running)
        if self.over.is_set() or not self._waiting or (
                idle and self._begun and self._shares.should_give(self._owner, self._need)):
            return self._finished()
        if not idle:
            if not self._shares.take(self._owner, self._wish, self._need):
                return None
            self._slots += 1
        if not self._may_begin(self._waiting[-1].step):
            self._waiting.clear()
            return self._finished()
        self._running.add(trial_id)
        self._begun = True
        return {"step": self._waiting.pop().step.key}

    def _finished(self) -> str:
        self.over.set()
        self._shares.forget(self._owner, self._wish)
        self._give(self._slots - len(self._running))
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial ended, whichever way."""
        self._running.discard(trial_id)
        if self.over.is_set():
            self._give(1)

    def end(self) -> None:
        """Tune is done: nothing is held any more."""
        self.over.set()
        self._shares.forget(self._owner, self._wish)
        self._give(self._slots)

    def _give(self, slots: int) -> None:
        for _ in range(slots):
            self._slots -= 1
            self._shares.give(self._owner, self._need)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune keeps a copy of its settings on disk, from which nobody restores anything

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is finished is found in the output."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing."""


class Halving(ASHAScheduler):
    """Tune's ASHA for one search, whose Tuners share it, and which begins with the trials that ended earlier."""

    def __init__(self, limits: Limits) -> None:
        halving = limits.halving
        assert halving is not None
        super().__init__(time_attr="epoch", metric=halving.metric, mode="max", max_t=halving.epochs,
                         grace_period=halving.grace_epochs, reduction_factor=halving.reduction,
                         stop_last_trials=False)  # at its last epoch a training ends by itself
        self._lock = threading.Lock()
        for number, history in enumerate(limits.histories):
            earlier = SimpleNamespace(trial_id=f"earlier-{number}")
            self.on_trial_add(None, earlier)
            for row in history:
                self.on_trial_result(None, earlier, dict(row))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict) -> str:
        """Whether the trial goes on."""
        with self._lock:
            return super().on_trial_result(tune_controller, trial, result)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see Turns


class _Left(BaseException):
    """The job leaves its cluster. No Exception: for one Tune would first wait for each of its trials to end."""


class _Reports(tune.Callback):
    """Hands Tune's events on to the experiment, and ends Tune where the job ends."""

    def __init__(self, trials: dict[str, Trial], place: Workplace, on_result: OnResult, on_epoch: OnEpoch,
                 shares: Shares) -> None:
        self._trials, self._place, self._on_result, self._on_epoch = trials, place, on_result, on_epoch
        self._shares = shares

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see Turns

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Ten times a second, before Tune asks Ray for anything."""
        try:
            self._shares.check()
        except Closed as error:
            raise _Left from error

    def on_trial_result(self, iteration: int, trials: list, trial: Any, result: dict, **info: Any) -> None:
        """An epoch is done, or the trial."""
        if "val_accuracy" in result:
            self._on_epoch(self._trials[trial.config["step"]], result)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial ended; its result is in the output, or it says why there is none, or the search stopped it."""
        step, last = self._trials[trial.config["step"]], trial.last_result
        result = self._place.artifacts.result(step)
        if result is None and "epoch" in last:  # a training that ended by itself says so in a row of its own
            result = self._place.artifacts.stopped(step) or TrainingResult(
                seconds=0, best=None, best_epoch=0, epochs=int(last["epoch"]), history=[], diverged=False,
                weights=None, train_images=0, validation_images=0, seconds_this_process=0, stopped=True)
        self._on_result(step, result, last.get("error"))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """The trial was tried often enough."""
        self._on_result(self._trials[trial.config["step"]], None,
                        _last_line(trial.error_file) or "its process died; see Ray's logs")


def tune_search(tasks: Sequence[Task], place: Workplace, train: TrainTrial, *, shares: Shares, need: Amounts,
                held: dict[str, float], max_failures: int, scratch: str, on_result: OnResult, on_epoch: OnEpoch,
                limits: Limits) -> None:
    """Train all tasks of one cell as trials; returns when each has ended.

    need: what a trial counts for in the shares; held: what its actor asks Ray for; scratch: a folder for Tune's own
    bookkeeping. Raises what went wrong in Tune itself, and Closed when the job leaves its cluster.
    """
    owner, waiting = tasks[0].owner, list(reversed(tasks))
    shared = Shared(ray.put({task.step.key: task for task in tasks}), train)
    reports = _Reports({task.step.key: task.step for task in tasks}, place, on_result, on_epoch, shares)
    scheduler = Halving(limits) if limits.halving is not None else None
    threads: list[threading.Thread] = []
    errors: list[BaseException] = []
    while waiting and not errors and limits.may_begin(waiting[-1].step):
        shares.wait(owner, "search", need)
        turns = Turns(waiting, shares, owner, need, limits.may_begin)
        name = f"search-{time.time_ns()}"
        with _REGISTERING:
            tune.register_trainable(name, trial_class(shared, held))
        tuner = tune.Tuner(
            name,
            tune_config=tune.TuneConfig(search_alg=turns, scheduler=scheduler, num_samples=-1, reuse_actors=True),
            run_config=tune.RunConfig(name=name, storage_path=scratch, verbose=0, callbacks=[reports],
                                      checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                                      failure_config=tune.FailureConfig(max_failures=max_failures)))

        def fit(tuner: tune.Tuner = tuner, turns: Turns = turns) -> None:
            try:
                with shares.asking():
                    tuner.fit()
            except _Left as error:
                closed = Closed()
                closed.__cause__ = error  # whose frames hold the trials' actors: they end with the cluster
                errors.append(closed)
            except BaseException as error:  # noqa: BLE001 - for the thread that waits
                errors.append(error)
            finally:
                turns.end()

        # Not in the main thread, whose Ctrl-C ends the job and not only the search.
        threads.append(threading.Thread(target=fit, name=name, daemon=True))
        threads[-1].start()
        while threads[-1].is_alive() and not turns.over.is_set():
            threads[-1].join(0.2)
    while any(thread.is_alive() for thread in threads):
        for thread in threads:
            thread.join(0.2)
    if errors:
        raise errors[0]


def _last_line(path: str | None) -> str:
    if not path:
        return ""
    try:
        with open(path, encoding="utf8") as stream:
            lines = [line.strip() for line in stream if line.strip()]
    except OSError:
        return ""
    return lines[-1] if lines else ""
