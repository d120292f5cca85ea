"""The tracker that keeps nothing, and how the end of a `with` block decides a run's status."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from impactx.run.tracker import (
    ArtifactFiles,
    FinalModel,
    RunIdentity,
    Status,
)
from impactx.run.values import epochs, flatten, numbers


class ContextRun:
    """The context-manager half of a run: how the `with` block ended decides the status."""

    _handles_sigterm = False

    def finish(self, status: Status = "FINISHED", error: str | None = None) -> None:
        """End the run; see `tracker.Run.finish`."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        # Without a handler SIGTERM ends the process with no exception, and the run stays RUNNING.
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


def _terminated(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class NoRun(ContextRun):
    """A run that keeps nothing, but checks its arguments: mistakes show without a tracker too."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Check the metrics."""
        numbers(metrics)

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Check the history."""
        epochs(history)

    def log_params(self, params: Mapping[str, object]) -> None:
        """Check the parameters."""
        flatten(params)

    def set_tags(self, tags: Mapping[str, object]) -> None:
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

    def run(self, identity: RunIdentity) -> NoRun:
        """Return a run that keeps nothing."""
        run = NoRun()
        run.log_params(identity.parameters)
        return run

    def replay(self, identity: RunIdentity, *, history: Sequence[Mapping[str, float]] = (),
               final: Mapping[str, float] | None = None,
               files: ArtifactFiles | None = None) -> None:
        """Check the arguments."""
        with self.run(identity) as run:
            run.log_history(history)
            run.log_metrics(final or {})

    def register_model(self, model: FinalModel) -> None:
        """Do nothing."""

    def died(self, identity: RunIdentity, error: str) -> None:
        """Check the parameters."""
        flatten(identity.parameters)

    def close_unfinished(self, root_key: str) -> int:
        """Return 0: no run is ever unfinished."""
        return 0

    def describe(self) -> list[str]:
        """Return one line that says that tracking is off."""
        return ["nothing was logged: tracking is off (tracking.enabled=true turns it on)"]
