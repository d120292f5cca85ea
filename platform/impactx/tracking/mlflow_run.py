"""A run in MLflow, as the experiment sees it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from impactx.run.no_tracker import ContextRun
from impactx.run.tracker import Status
from impactx.run.values import flatten
from impactx.tracking.addresses import redact
from impactx.tracking.points import ERROR, ERROR_FILE, Point, history_points, last_line, points_of
from impactx.tracking.record import Record
from impactx.tracking.writer import KILLED_SECONDS, WHOLE_RUN, Op, Writer

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("impactx.tracking")


class MlflowRun(ContextRun):
    """`impactx.run.tracker.Run` on MLflow: every method leaves an operation for the writer.

    Args:
        writer: The process's writer.
        record: The run that the operations are for.
        params: The run's parameters, flat.
    """

    def __init__(self, writer: Writer, record: Record, params: Mapping[str, str]) -> None:
        self._writer, self._record, self._ended = writer, record, False
        self._submit(WHOLE_RUN, lambda client: record.begin(client, writer.experiment_id))
        writer.open_runs[record.owner] = record
        if params:
            self._submit("parameters", lambda client: record.log_params(client, params))

    def _submit(self, what: str, do: Callable[[MlflowClient], object],
                channel: str = "the server") -> Op:
        op = Op(self._record, do, what, channel)
        if self._ended:
            self._warn_ended(what)
            return op
        return self._writer.submit(op)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """See `Run.log_metrics`."""
        self._add(points_of(metrics, step))

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """See `Run.log_history`."""
        self._add(history_points(history))

    def _add(self, points: list[Point]) -> None:
        if self._ended:
            self._warn_ended("metrics")
        else:
            self._writer.add(self._record, points)

    def _warn_ended(self, what: str) -> None:
        log.warning("MLflow: after the end of the run %r, not logged: %s", self._record.name, what)

    def log_params(self, params: Mapping[str, object]) -> None:
        """See `Run.log_params`."""
        flat = flatten(params)
        self._submit("parameters", lambda client: self._record.log_params(client, flat))

    def set_tags(self, tags: Mapping[str, object]) -> None:
        """See `Run.set_tags`."""
        copy = dict(tags)
        self._submit("tags", lambda client: self._record.set_tags(client, copy))

    def log_text(self, text: str, path: str) -> None:
        """See `Run.log_text`."""
        self.log_bytes(text.encode(), path)

    def log_bytes(self, content: bytes, path: str) -> None:
        """See `Run.log_bytes`."""
        self._submit(f"the artifact {path}",
                     lambda client: self._record.log_bytes(client, content, path), "artifacts")

    def log_file(self, local_path: str | Path, folder: str = "") -> None:
        """See `Run.log_file`."""
        path = str(Path(local_path).absolute())
        self._submit(f"the artifact {Path(path).name}", lambda client: client.log_artifact(
            self._record.run_id, path, folder or None), "artifacts")

    def finish(self, status: Status = "FINISHED", error: str | None = None) -> None:
        """See `Run.finish`. After the first call it does nothing."""
        if self._ended:
            return
        record = self._record
        if error:
            text = redact(error, self._writer.uri)
            self.set_tags({ERROR: last_line(text)})
            self.log_text(text, ERROR_FILE)
        op = self._submit("the status", lambda client: record.end(client, status))
        self._ended = True
        self._writer.wait(op, KILLED_SECONDS if status == "KILLED" else math.inf)
        self._writer.open_runs.pop(record.owner, None)
        record.warn()
