"""The background thread that talks to the server."""

from __future__ import annotations

import atexit
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from impactx.run.tracker import RunIdentity
from impactx.tracking.addresses import redact
from impactx.tracking.client import NotYet, TakenOver, connect, is_final
from impactx.tracking.points import Point
from impactx.tracking.record import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("impactx.tracking")

# One log_batch costs 10 to 20 ms of CPU: every 5 s that is below 0.4 % of a training.
FLUSH_SECONDS = 5.0
PATIENCE_SECONDS = 120.0  # a finishing run waits so long for a server that does not answer
KILLED_SECONDS = 10.0  # the same after SIGTERM, which SIGKILL follows soon
RETRY_SECONDS = 5.0  # the longest pause between two tries
WHOLE_RUN = "the whole run"  # the operation without which no other of its run can be done


@dataclass(eq=False)
class Op:
    """One operation with the server, which is tried until it succeeds.

    Args:
        record: The run that it is for.
        do: The operation.
        what: Names, in a warning, what is lost if it is given up.
        channel: "the server", or "artifacts": another store, which may fail alone.
        warns: Whether a loss is logged at once, because nobody waits for the end of the run.
        done: Whether it succeeded or was given up.
    """

    record: Record
    do: Callable[[MlflowClient], object]
    what: str
    channel: str = "the server"
    warns: bool = False
    done: bool = False


class Writer:
    """The thread of a process that does the operations, in their order, each until it succeeds.

    An operation is given up only if the server refuses it, or if somebody waits for it in vain.

    Args:
        uri: The address of the tracking store.
        experiment: The experiment's name.
        flush_seconds: Seconds for which metrics are gathered before they are sent.
        patience_seconds: Seconds for which `wait` waits for a server that does not answer.

    Attributes:
        open_runs: The runs of this process that have not ended, by their owner.
    """

    def __init__(self, uri: str, experiment: str, flush_seconds: float,
                 patience_seconds: float) -> None:
        self.uri, self.experiment = uri, experiment
        self.flush_seconds, self.patience = flush_seconds, patience_seconds
        self.open_runs: dict[str, Record] = {}
        self._now: deque[Op] = deque()
        self._later: deque[Op] = deque()
        self._due: dict[Record, float] = {}
        self._down: dict[str, tuple[float, str]] = {}  # channel -> since when, why
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._experiment_id: str | None = None

    def experiment_id(self, client: MlflowClient) -> str:
        """Return the experiment's id, which is asked for once.

        Raises:
            LookupError: The server has no such experiment.
        """
        if self._experiment_id is None:
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                raise LookupError(
                    f"no experiment {self.experiment!r}: call prepare() in the driver first")
            self._experiment_id = str(experiment.experiment_id)
        return self._experiment_id

    def submit(self, op: Op, later: bool = False) -> Op:
        """Leave an operation for the thread, and return it.

        Args:
            op: The operation.
            later: Whether it is done only when no other operation and no metrics are due.
        """
        with self._changed:
            (self._later if later else self._now).append(op)
            self._start()
        return op

    def add(self, record: Record, points: list[Point]) -> None:
        """Leave metrics, which are sent together every few seconds."""
        with self._changed:
            record.pending += points
            self._due.setdefault(record, time.monotonic() + self.flush_seconds)
            self._start()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="impactx-mlflow", daemon=True)
            self._thread.start()
            atexit.register(self._drain)
        self._changed.notify_all()

    def wait(self, op: Op, seconds: float = math.inf) -> None:
        """Wait until an operation is done, and give its run up when that takes too long.

        Args:
            op: The operation.
            seconds: The longest time to wait; it is shorter where the server has been away for
                longer than the writer's patience.
        """
        began = time.monotonic()
        with self._changed:
            while not op.done:
                now = time.monotonic()
                since, why = self._down.get(op.channel, (now, f"no answer within {seconds:g} s"))
                # Once a server is known to be gone, each further run waits for one try only.
                if now - began >= seconds or (now - since > self.patience and now - began > min(
                        RETRY_SECONDS + 1, self.patience)):
                    op.record.dead = True
                    op.record.lost.setdefault(op.what, why)
                    return
                self._changed.wait(0.5)

    def _drain(self) -> None:
        """At the end of the process, wait for whatever is left, if the server answers."""
        if self._now or self._later or self._due:
            end = Op(Record(RunIdentity("exit", "exit"), {}), lambda client: None, "")
            self.wait(self.submit(end, later=True), 30)

    def _work(self) -> None:
        while True:
            op = self._next()
            self._perform(op)
            with self._changed:
                op.done = True
                self._changed.notify_all()
            if op.warns:
                op.record.warn()

    def _next(self) -> Op:
        with self._changed:
            while True:
                if self._now:
                    return self._now.popleft()
                record = min(self._due, key=self._due.__getitem__, default=None)
                wait = None if record is None else self._due[record] - time.monotonic()
                if record is not None and wait is not None and wait <= 0:
                    del self._due[record]
                    return Op(record, record.flush, "metrics")
                if self._later:
                    return self._later.popleft()
                self._changed.wait(wait)

    def _perform(self, op: Op) -> None:
        tries = 0
        while not op.record.dead:
            began = time.monotonic()
            try:
                op.do(connect(self.uri))
            except Exception as error:
                tries += 1
                text = redact(f"{type(error).__name__}: {error}", self.uri)
                why = text.strip().partition("\n")[0][:500]
                since = self._down.get(op.channel, (began, ""))[0]
                # The store of artifacts may fail for good (no login, say): the rest must not wait.
                hopeless = op.channel == "artifacts" and time.monotonic() - since > self.patience
                if is_final(error) or (hopeless and tries > 1):
                    op.record.lost[op.what] = why
                    op.record.dead |= op.what == WHOLE_RUN or isinstance(error, TakenOver)
                    return
                if op.channel not in self._down and not isinstance(error, NotYet):
                    log.warning("MLflow: %s cannot be reached, what is logged is kept and sent "
                                "later (%s)", op.channel, why)
                self._down[op.channel] = (since, why)
                time.sleep(min(RETRY_SECONDS, 0.25 * 2 ** tries))
            else:
                _, why = self._down.pop(op.channel, (0.0, NotYet.__name__))
                if not why.startswith(NotYet.__name__):
                    log.info("MLflow: %s can be reached again", op.channel)
                return
        op.record.lost.setdefault(op.what, "the run was given up")


_writers: dict[tuple[int, str, str, float, float], Writer] = {}
_writers_lock = threading.Lock()


def writer_for(uri: str, experiment: str, flush_seconds: float, patience_seconds: float) -> Writer:
    """Return this process's writer for these arguments; see `Writer`."""
    name = (os.getpid(), uri, experiment, flush_seconds, patience_seconds)
    with _writers_lock:
        if name not in _writers:
            _writers[name] = Writer(uri, experiment, flush_seconds, patience_seconds)
        return _writers[name]
