"""The tracker and its runs, as the experiment sees them (experiment.tracker)."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from impactx.experiment.tracker import (
    ContextRun,
    Files,
    NoTracker,
    Status,
    Tracker,
    TrackingError,
    check_key,
    flatten,
)
from impactx.settings import ExperimentSettings, TrackingSettings
from impactx.tracking.addresses import addresses, redact, sqlite_path
from impactx.tracking.client import connect, search
from impactx.tracking.record import (
    ERROR,
    ERROR_FILE,
    KEY,
    ROOT,
    WHOLE_RUN,
    Point,
    Record,
    history_points,
    last_line,
    points_of,
)
from impactx.tracking.views import save_view, view_key
from impactx.tracking.writer import (
    FLUSH_SECONDS,
    KILLED_SECONDS,
    PATIENCE_SECONDS,
    Op,
    Writer,
    writer_for,
)

log = logging.getLogger("impactx.tracking")


def make_tracker(settings: ExperimentSettings) -> Tracker:
    """The tracker that an experiment's settings ask for."""
    return MlflowTracker(settings.tracking, settings.output) if settings.tracking.enabled else NoTracker()


class MlflowTracker:
    """`impactx.experiment.tracker.Tracker` on MLflow; the promises of the methods are written there."""

    def __init__(self, settings: TrackingSettings, output: str, *, flush_seconds: float = FLUSH_SECONDS,
                 patience_seconds: float = PATIENCE_SECONDS) -> None:
        """patience_seconds: how long a finishing run waits for a server that does not answer."""
        self._uri, self._artifacts = addresses(settings.uri or os.environ.get("MLFLOW_TRACKING_URI"), output)
        self._experiment, self._ui = settings.experiment, settings.ui
        self._options = (flush_seconds, patience_seconds)
        self._known: dict[str, tuple[str, str]] = {}  # key -> run id, root's key; saves searches
        self._root: str | None = None
        self._models: dict[str, str] = {}  # registered models of this job: their versions

    def __repr__(self) -> str:
        return f"MlflowTracker({redact(self._uri)!r}, experiment={self._experiment!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Copies: the writer may add to them meanwhile.
        return self.__dict__ | {"_known": dict(self._known), "_models": dict(self._models)}

    @property
    def _writer(self) -> Writer:
        return writer_for(os.getpid(), self._uri, self._experiment, *self._options)

    def prepare(self) -> None:
        """Create the database and the experiment, one process at a time: a fresh sqlite file breaks else."""
        path = sqlite_path(self._uri)
        try:
            with contextlib.ExitStack() as stack:
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    fcntl.flock(stack.enter_context(open(f"{path}.lock", "w")), fcntl.LOCK_EX)
                client = connect(self._uri, create=True)
                found = client.get_experiment_by_name(self._experiment)
                if found is None:
                    client.create_experiment(self._experiment, artifact_location=self._artifacts)
                elif found.lifecycle_stage != "active":
                    raise TrackingError(
                        f"the experiment {self._experiment!r} was deleted; restore it with `mlflow "
                        f"experiments restore -x {found.experiment_id}`, or set tracking.experiment")
        except Exception as error:
            # `from None`: the original message may hold the password of the address.
            raise TrackingError(redact(f"MLflow at {self._uri} cannot be used: {error}", self._uri)) from None

    def run(self, key: str, *, name: str, parent: str | None = None, params: Mapping[str, Any] | None = None,
            tags: Mapping[str, Any] | None = None) -> MlflowRun:
        """Begin a run, or continue the one with this key. Returns at once."""
        record = Record(key, name, parent, tags or {}, self._known)
        run = MlflowRun(self._writer, record, flatten(params or {}))
        if parent is None:
            self._root = key
            self._writer.submit(Op(record, lambda client: save_view(
                client, self._writer.experiment_id(client), key), "the saved view"))
        return run

    def replay(self, key: str, *, name: str, parent: str | None = None,
               params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None,
               history: Sequence[Mapping[str, float]] = (), final: Mapping[str, float] | None = None,
               files: Files | None = None) -> None:
        """Make the FINISHED run of a unit whose result was reused, in the background."""
        record, flat = Record(key, name, parent, tags or {}, self._known), flatten(params or {})
        points = history_points(history) + points_of(final or {}, None)

        def replay(client: Any) -> None:
            if record.begin(client, self._writer.experiment_id, unless="FINISHED"):
                record.log_params(client, flat)
                record.log_points(client, points)
                if files is not None:
                    with tempfile.TemporaryDirectory(prefix="impactx-") as folder:
                        for file in files(Path(folder)):
                            client.log_artifact(record.run_id, str(file))
                record.end(client, "FINISHED")

        self._writer.submit(Op(record, replay, WHOLE_RUN, warns=True), later=True)

    def register_model(self, key: str, *, name: tuple[str, ...], checkpoint: Callable[[], bytes],
                       about: Mapping[str, Any]) -> None:
        """Log and register a final model (`tracking.models`), in the background."""
        model = ".".join(("impactx", *name))
        record = Record(key, f"model {model}", None, {}, {})

        def do(client: Any) -> None:
            from impactx.tracking.models import register  # brings torch with it

            version = register(client, self._writer.experiment_id(client), key, model, checkpoint(), about)
            self._models[model] = version

        self._writer.submit(Op(record, do, f"the registered model {model}", "artifacts", warns=True), later=True)

    def died(self, key: str, error: str, *, name: str, parent: str | None = None,
             params: Mapping[str, Any] | None = None, tags: Mapping[str, Any] | None = None) -> None:
        """See `Tracker.died`."""
        record, text, flat = Record(key, name, parent, tags or {}, self._known), redact(error, self._uri), flatten(
            params or {})

        def end(client: Any) -> None:
            found = search(client, self._writer.experiment_id(client), f"tags.`{KEY}` = '{key}'")
            if found and not record.run_id and found[-1].info.status != "RUNNING":
                return  # it could say so itself
            record.begin(client, self._writer.experiment_id)
            record.log_params(client, flat)
            record.set_tags(client, {ERROR: last_line(text)})
            record.log_bytes(client, text.encode(), ERROR_FILE)
            record.end(client, "FAILED")

        self._writer.submit(Op(record, end, "the status of a run whose process died", warns=True), later=True)

    def close_unfinished(self, root_key: str) -> int:
        """Wait for what is in the background, then end the job's runs that are still RUNNING as KILLED."""
        check_key(root_key)
        record, closed = Record(root_key, root_key, None, {}, {}), set()

        def close(client: Any) -> None:
            where = f"tags.`{ROOT}` = '{root_key}' and attributes.status = 'RUNNING'"
            here = {open_run.run_id for open_run in list(self._writer.open_runs.values())}
            for run in search(client, self._writer.experiment_id(client), where):
                # The caller may still be inside the job's own run, which ends by itself.
                if run.info.run_id not in here or run.data.tags[KEY] != root_key:
                    client.set_terminated(run.info.run_id, "KILLED")
                    closed.add(run.info.run_id)

        op = self._writer.submit(Op(record, close, "the status of unfinished runs"), later=True)
        self._writer.wait(op)
        record.warn()
        return len(closed)

    def describe(self) -> list[str]:
        """The command that serves the user interface, where one is needed, and what to open in it."""
        if self._uri.startswith("http"):
            address = urlsplit(self._uri)
            base = self._ui or address._replace(netloc=address.netloc.rpartition("@")[2], query="").geturl()
            lines = []
        else:
            # A password is not printed, and the shell knows where it comes from.
            shown = shlex.quote(self._uri) if redact(self._uri) == self._uri else '"$MLFLOW_TRACKING_URI"'
            base = "http://127.0.0.1:5000"
            lines = [f"MLflow:     mlflow ui --backend-store-uri {shown} --port 5000"]
        base = base.rstrip("/")
        try:
            experiment = self._writer.experiment_id(connect(self._uri))
            # Without the type of work, MLflow 3 shows an empty overview of language models' traces.
            runs = f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning"
        except Exception:  # an absent server was warned of; its address is still of use
            return [*lines, f"runs:       {base}"]
        if self._root is None:
            return [*lines, f"runs:       {runs}"]
        view, search = view_key(self._root), quote(f"tags.`{ROOT}` = '{self._root}'")
        return [*lines, f"all runs:   {runs}&searchFilter={search}",
                f"trials:     {runs}&viewStateShareKey={view}",
                f"comparison: {runs}&viewStateShareKey={view}&compareRunsMode=CHART",
                *([f"models:     {base}/#/models, such as {'/'.join(('models:', *model))}"
                   for model in sorted(self._models.items(), key=lambda model: model[0].endswith(".impactx"))[-1:]])]


class MlflowRun(ContextRun):
    """A run for its caller: every method leaves an operation for the writer and returns."""

    def __init__(self, writer: Writer, record: Record, params: dict[str, str]) -> None:
        self._writer, self._record, self._ended = writer, record, False
        self._do(WHOLE_RUN, lambda client: record.begin(client, writer.experiment_id))
        writer.open_runs[record.owner] = record
        if params:
            self._do("parameters", lambda client: record.log_params(client, params))

    def _do(self, what: str, do: Callable[[Any], Any], channel: str = "the server") -> Op:
        op = Op(self._record, do, what, channel)
        if self._ended:
            log.warning("MLflow: after the end of the run %r, not logged: %s", self._record.name, what)
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
            log.warning("MLflow: after the end of the run %r, not logged: metrics", self._record.name)
        else:
            self._writer.add(self._record, points)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Run.log_params`."""
        flat = flatten(params)
        self._do("parameters", lambda client: self._record.log_params(client, flat))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """See `Run.set_tags`."""
        texts = dict(tags)
        self._do("tags", lambda client: self._record.set_tags(client, texts))

    def log_text(self, text: str, path: str) -> None:
        """See `Run.log_text`."""
        self.log_bytes(text.encode(), path)

    def log_bytes(self, content: bytes, path: str) -> None:
        """See `Run.log_bytes`."""
        self._do(f"the artifact {path}", lambda client: self._record.log_bytes(client, content, path), "artifacts")

    def log_file(self, local_path: str | Path, folder: str = "") -> None:
        """See `Run.log_file`."""
        path = str(Path(local_path).absolute())
        self._do(f"the artifact {Path(path).name}", lambda client: client.log_artifact(
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
        op = self._do("the status", lambda client: record.end(client, status))
        self._ended = True
        self._writer.wait(op, KILLED_SECONDS if status == "KILLED" else math.inf)
        self._writer.open_runs.pop(record.owner, None)
        record.warn()
