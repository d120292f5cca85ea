"""What an experiment tells its tracker, whatever the tracker is.

`Tracker` and `Run` are the protocols that the rest of the package speaks, `NoTracker` is the tracker that
keeps nothing.  MLflow's implementation is `impactx.tracking`; nothing here imports it.

A run is known by its key, a text that the caller chooses and that names the same piece of work after a
restart.  Keys are unique in an experiment: begin them with the job's, as in `job/cifar10/lenet5/trial-3f2a`.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

Status = Literal["FINISHED", "FAILED", "KILLED"]
Files = Callable[[Path], Sequence[Path]]
MAX_KEY = 250


class TrackingError(RuntimeError):
    """The tracker cannot be used; the message says why and what to do, and holds no password."""


class Run(Protocol):
    """One unit of work in the tracker: a job, a cell, a trial. Used as a context manager, it always ends.

    No method waits for a server, except `finish`.  An exception inside the `with` block gives FAILED with the
    traceback; an interrupt (Ctrl-C, SIGTERM, SystemExit) gives KILLED; both go on to the caller.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers. `step` is the epoch, counted from 1; without it they belong to the run as a whole.

        A (metric, step) that the run already holds, from before a restart for instance, is skipped.  Name a
        final number differently from a curve: a table shows the last point of `val_accuracy`, not its best.
        """

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Log the epochs so far, one mapping each; what is already there is skipped.

        A training that resumes from a checkpoint calls it, so that epochs between the last flush and a
        kill -9 are not missing.  Row i is step i + 1, or its own "epoch" where it has one.
        """

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log settings, nested as they are; they become dotted keys (`flatten`)."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags, overwriting those of the same name."""

    def log_text(self, text: str, path: str) -> None:
        """Log a text as the artifact `path`."""

    def log_bytes(self, content: bytes, path: str) -> None:
        """Log a picture, say, as the artifact `path`."""

    def log_file(self, local_path: str | Path, folder: str = "") -> None:
        """Log a file as an artifact. It is read later: leave it unchanged until `finish`."""

    def finish(self, status: Status = "FINISHED", error: str | None = None) -> None:
        """End the run and wait until all of it is logged, or say in a warning what could not be."""

    def __enter__(self) -> Run: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None: ...


class Tracker(Protocol):
    """Where runs are kept. It can be pickled: it travels into the workers."""

    def prepare(self) -> None:
        """Create what is needed, once, in the driver. Raises TrackingError when that fails."""

    def run(self, key: str, *, name: str, parent: str | None = None, params: Mapping[str, Any] | None = None,
            tags: Mapping[str, Any] | None = None) -> Run:
        """Begin a run, or continue the one with this key. `parent` is the key of the run it belongs to."""

    def replay(self, key: str, *, name: str, parent: str | None = None,
               params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None,
               history: Sequence[Mapping[str, float]] = (), final: Mapping[str, float] | None = None,
               files: Files | None = None) -> None:
        """Make the FINISHED run of a unit whose result is known from earlier. Does nothing if there is one.

        files: called with an empty folder if the run has to be made; returns the files that become its artifacts.
        It returns at once and is done in the background, at the latest by `close_unfinished`.
        """

    def register_model(self, key: str, *, name: tuple[str, ...], checkpoint: Callable[[], bytes],
                       about: Mapping[str, Any]) -> None:
        """Keep a final model of the run with this key where it can be loaded and served from by its name.

        about: "impactx.weights", its fingerprint, and what else is said of it.  The same weights are kept under a
        name only once.  It returns at once and is done in the background, at the latest by `close_unfinished`.
        """

    def died(self, key: str, error: str, *, name: str, parent: str | None = None,
             params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None) -> None:
        """The process of the run with this key may have died before it could say so: FAILED, unless it has ended.

        A run that had not begun is made. It returns at once and is done in the background, at the latest by
        `close_unfinished`.
        """

    def close_unfinished(self, root_key: str) -> int:
        """At the job's end: its runs that are still RUNNING become KILLED; how many there were.

        `root_key` is the key of the job's run, the one without a parent.
        """

    def describe(self) -> list[str]:
        """Lines for the user: how to look at what was logged."""


class ContextRun:
    """The context-manager half of a run: how the `with` block ended decides the status."""

    _handles_sigterm = False

    def finish(self, status: Status = "FINISHED", error: str | None = None) -> None:
        raise NotImplementedError

    def __enter__(self):
        # Without a handler SIGTERM ends the process with no exception, and the run stays RUNNING for ever.
        if (threading.current_thread() is threading.main_thread()
                and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL):
            signal.signal(signal.SIGTERM, _terminated)
            self._handles_sigterm = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None or (isinstance(error, SystemExit) and not error.code):
                self.finish("FINISHED")
            else:
                text = "".join(traceback.format_exception(kind, error, trace))
                self.finish("FAILED" if issubclass(kind, Exception) else "KILLED", text)
        finally:
            if self._handles_sigterm:
                self._handles_sigterm = False
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminated(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


class NoRun(ContextRun):
    """A run that keeps nothing. Arguments are checked as everywhere, so mistakes show without a tracker."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Check the metrics."""
        numbers(metrics)

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Check the history."""
        epochs(history)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Check the parameters."""
        flatten(params)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Do nothing."""

    def log_text(self, text: str, path: str) -> None:
        """Do nothing."""

    def log_bytes(self, content: bytes, path: str) -> None:
        """Do nothing."""

    def log_file(self, local_path: str | Path, folder: str = "") -> None:
        """Do nothing."""

    def finish(self, status: Status = "FINISHED", error: str | None = None) -> None:
        """Do nothing."""


class NoTracker:
    """The tracker of a user who wants none."""

    def prepare(self) -> None:
        """Do nothing."""

    def run(self, key: str, *, name: str, parent: str | None = None, params: Mapping[str, Any] | None = None,
            tags: Mapping[str, Any] | None = None) -> NoRun:
        """A run that keeps nothing."""
        check_key(key, parent)
        run = NoRun()
        run.log_params(params or {})
        return run

    def replay(self, key: str, *, name: str, parent: str | None = None,
               params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None,
               history: Sequence[Mapping[str, float]] = (), final: Mapping[str, float] | None = None,
               files: Files | None = None) -> None:
        """Check the arguments."""
        with self.run(key, name=name, parent=parent, params=params, tags=tags) as run:
            run.log_history(history)
            run.log_metrics(final or {})

    def register_model(self, key: str, *, name: tuple[str, ...], checkpoint: Callable[[], bytes],
                       about: Mapping[str, Any]) -> None:
        """Check the key."""
        check_key(key)

    def died(self, key: str, error: str, *, name: str, parent: str | None = None,
             params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None) -> None:
        """Check the arguments."""
        check_key(key, parent)
        flatten(params or {})

    def close_unfinished(self, root_key: str) -> int:
        """Nothing is ever unfinished."""
        return 0

    def describe(self) -> list[str]:
        """One line that says so."""
        return ["nothing was logged: tracking is off (tracking.enabled=true turns it on)"]


def check_key(*keys: str | None) -> None:
    """Refuse keys that cannot be searched for."""
    for key in keys:
        if key is not None and (not key or len(key) > MAX_KEY or re.search(r"['\"`\\\n]", key)):
            raise ValueError(f"the run key {key!r}: 1 to {MAX_KEY} characters without quotes or backslashes")


def flatten(params: Mapping[str, Any]) -> dict[str, str]:
    """Nested settings as one level of texts, nothing left out: {"a": {"b": [1, 2]}} gives {"a.b": "[1, 2]"}.

    Lists of plain values stay one text, lists that hold mappings or lists get their position as key.
    Pydantic models are dumped first.  Two values that meet in one key (`{"a.b": 1, "a": {"b": 2}}`) are an
    error.
    """
    flat: dict[str, str] = {}
    for key, value in _leaves("", params):
        name = clean_key(key)
        if name in flat:
            raise ValueError(f"two parameters have the name {name!r}: {flat[name]} and {_text(value)}")
        flat[name] = _text(value)
    return flat


def _leaves(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, (list, tuple)) and any(
            isinstance(v, (Mapping, list, tuple)) or hasattr(v, "model_dump") for v in value):
        items = enumerate(value)
    else:
        yield prefix, value
        return
    if not value and prefix:
        yield prefix, value
    for key, inner in items:
        yield from _leaves(f"{prefix}.{key}" if prefix else str(key), inner)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{}"
    if isinstance(value, (list, tuple)):
        return json.dumps(list(value), ensure_ascii=False, default=str)
    return str(value)


def clean_key(key: str) -> str:
    """A name that MLflow accepts for a parameter, metric or tag; the name itself wherever it can be.

    Foreign characters become "_" and long names are cut, with a short hash of the whole name behind them, so
    that two names never become one.
    """
    clean = re.sub(r"[^\w.\-/ :]", "_", key)
    clean = "/".join(part for part in clean.split("/") if part.strip(".")) or "_"
    if clean == key and len(key) <= MAX_KEY:
        return key
    return f"{clean[:MAX_KEY - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as plain floats under clean names; numpy and torch scalars are welcome."""
    values = {}
    for key, value in metrics.items():
        try:
            values[clean_key(str(key))] = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"the metric {key!r} is not a number: {value!r}") from error
    return values


def epochs(history: Sequence[Mapping[str, float]]) -> list[tuple[int, dict[str, float]]]:
    """A history as (step, metrics): row i is step i + 1, or its own "epoch" where it has one."""
    return [(int(row.get("epoch", i + 1)), numbers({k: v for k, v in row.items() if k != "epoch"}))
            for i, row in enumerate(history)]
