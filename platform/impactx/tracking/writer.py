"""The background thread that talks to the server."""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from impactx.tracking.addresses import redact
from impactx.tracking.client import NotYet, TakenOver, connect, is_final
from impactx.tracking.record import WHOLE_RUN, Point, Record

log = logging.getLogger("impactx.tracking")

FLUSH_SECONDS = 5.0  # one log_batch costs 10 to 20 ms of CPU: every 5 s that is below 0.4 % of a training
PATIENCE_SECONDS = 120.0  # a finishing run waits so long for a server that does not answer
KILLED_SECONDS = 10.0  # the same after SIGTERM, which SIGKILL follows soon
RETRY_SECONDS = 5.0  # the longest pause between two tries


@dataclass(eq=False)
class Op:
    """Something to be done with the server, until it succeeds."""

    record: Record
    do: Callable[[Any], Any]
    what: str
    channel: str = "the server"  # or "artifacts": another store, which may fail alone
    warns: bool = False  # nobody waits for the run's end: say at once what was lost
    done: bool = False


class Writer:
    """The thread of a process that does the operations, in their order, each until it succeeds.

    An operation is given up only if the server refuses it, or if somebody waits for it in vain (`wait`).
    """

    def __init__(self, uri: str, experiment: str, flush_seconds: float, patience_seconds: float) -> None:
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

    def experiment_id(self, client: Any) -> str:
        """The experiment's id, asked for once."""
        if self._experiment_id is None:
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                raise LookupError(f"no experiment {self.experiment!r}: call prepare() in the driver first")
            self._experiment_id = found.experiment_id
        return self._experiment_id

    def submit(self, op: Op, later: bool = False) -> Op:
        """Leave an operation; `later`: after all that are not."""
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
        """Wait until op is done, but no longer than `seconds`, nor when the server has been away too long."""
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
        """At the end of the process: whatever is left, if the server answers."""
        if self._now or self._later or self._due:
            end = Op(Record("exit", "exit", None, {}, {}), lambda client: None, "")
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
                record, due = min(self._due.items(), key=lambda item: item[1], default=(None, math.inf))
                if record is not None and due <= time.monotonic():
                    del self._due[record]
                    return Op(record, record.flush, "metrics")
                if self._later:
                    return self._later.popleft()
                self._changed.wait(None if record is None else max(0.0, due - time.monotonic()))

    def _perform(self, op: Op) -> None:
        tries = 0
        while not op.record.dead:
            began = time.monotonic()
            try:
                op.do(connect(self.uri))
            except Exception as error:
                tries += 1
                why = redact(f"{type(error).__name__}: {error}", self.uri).strip().partition("\n")[0][:500]
                since = self._down.get(op.channel, (began, ""))[0]
                # The store of artifacts may fail for good (no login, say): the rest must not wait for it.
                hopeless = op.channel == "artifacts" and time.monotonic() - since > self.patience
                if is_final(error) or (hopeless and tries > 1):
                    op.record.lost[op.what] = why
                    op.record.dead |= op.what == WHOLE_RUN or isinstance(error, TakenOver)
                    return
                if op.channel not in self._down and not isinstance(error, NotYet):
                    log.warning("MLflow: %s cannot be reached, what is logged is kept and sent later (%s)",
                                op.channel, why)
                self._down[op.channel] = (since, why)
                time.sleep(min(RETRY_SECONDS, 0.25 * 2 ** tries))
            else:
                if not self._down.pop(op.channel, ("", NotYet.__name__))[1].startswith(NotYet.__name__):
                    log.info("MLflow: %s can be reached again", op.channel)
                return
        op.record.lost.setdefault(op.what, "the run was given up")


_writers: dict[tuple[Any, ...], Writer] = {}
_writers_lock = threading.Lock()


def writer_for(*name: Any) -> Writer:
    """This process's writer for an address and experiment."""
    with _writers_lock:
        if name not in _writers:
            _writers[name] = Writer(*name[1:])
        return _writers[name]
