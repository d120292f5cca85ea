"""The tracker on MLflow, as the experiment sees it."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from impactx.run.no_tracker import NoTracker
from impactx.run.tracker import (
    ArtifactFiles,
    FinalModel,
    RunIdentity,
    Tracker,
    TrackingError,
)
from impactx.run.values import flatten
from impactx.settings import ExperimentSettings, TrackingSettings
from impactx.tracking.addresses import addresses, redact, sqlite_path
from impactx.tracking.client import connect, search
from impactx.tracking.database import locked_database
from impactx.tracking.mlflow_run import MlflowRun
from impactx.tracking.points import (
    ERROR,
    ERROR_FILE,
    KEY,
    ROOT,
    history_points,
    last_line,
    points_of,
)
from impactx.tracking.record import Location, Record
from impactx.tracking.views import save_view, view_key
from impactx.tracking.writer import (
    FLUSH_SECONDS,
    PATIENCE_SECONDS,
    WHOLE_RUN,
    Op,
    Writer,
    writer_for,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("impactx.tracking")


def make_tracker(settings: ExperimentSettings) -> Tracker:
    """Return the tracker that an experiment's settings ask for."""
    if settings.tracking.enabled:
        return MlflowTracker(settings.tracking, settings.output)
    return NoTracker()


class MlflowTracker:
    """`impactx.run.tracker.Tracker` on MLflow; the promises of the methods are written there.

    Args:
        settings: The address and the experiment's name.
        output: The job's output folder or bucket, where runs are kept if there is no address.
        flush_seconds: Seconds for which metrics are gathered before they are sent.
        patience_seconds: Seconds for which a finishing run waits for a server that does not answer.
    """

    def __init__(self, settings: TrackingSettings, output: str, *,
                 flush_seconds: float = FLUSH_SECONDS,
                 patience_seconds: float = PATIENCE_SECONDS) -> None:
        uri = settings.uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._uri, self._artifacts = addresses(uri, output)
        self._experiment, self._ui = settings.experiment, settings.ui
        self._flush_seconds, self._patience_seconds = flush_seconds, patience_seconds
        self._locations: dict[str, Location] = {}
        self._root: str | None = None
        self._models: dict[str, str] = {}  # registered models of this job: their versions

    def __repr__(self) -> str:
        return f"MlflowTracker({redact(self._uri)!r}, experiment={self._experiment!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Copies: the writer may add to them meanwhile.
        return self.__dict__ | {"_locations": dict(self._locations), "_models": dict(self._models)}

    @property
    def _writer(self) -> Writer:
        return writer_for(self._uri, self._experiment, self._flush_seconds, self._patience_seconds)

    def _later(self, record: Record, do: Callable[[MlflowClient], object], what: str,
               channel: str = "the server") -> None:
        """Leave an operation that nobody waits for: it comes after all others, and itself warns."""
        self._writer.submit(Op(record, do, what, channel, warns=True), later=True)

    def prepare(self) -> None:
        """Create the experiment, and before it the database if it is a SQLite file."""
        path = sqlite_path(self._uri)
        try:
            with locked_database(path) if path else contextlib.nullcontext():
                self._create_experiment(connect(self._uri))
        except Exception as error:
            # `from None`: the original message may hold the password of the address.
            raise TrackingError(
                redact(f"MLflow at {self._uri} cannot be used: {error}", self._uri)) from None

    def _create_experiment(self, client: MlflowClient) -> None:
        experiment = client.get_experiment_by_name(self._experiment)
        if experiment is None:
            client.create_experiment(self._experiment, artifact_location=self._artifacts)
        elif experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"the experiment {self._experiment!r} was deleted; restore it with `mlflow "
                f"experiments restore -x {experiment.experiment_id}`, or set tracking.experiment")

    def run(self, identity: RunIdentity) -> MlflowRun:
        """Begin a run, or continue the one with this key. Returns at once."""
        record = Record(identity, self._locations)
        run = MlflowRun(self._writer, record, flatten(identity.parameters))
        if identity.parent is None:
            self._root = identity.key
            self._writer.submit(Op(record, lambda client: save_view(
                client, self._writer.experiment_id(client), identity.key), "the saved view"))
        return run

    def replay(self, identity: RunIdentity, *, history: Sequence[Mapping[str, float]] = (),
               final: Mapping[str, float] | None = None,
               files: ArtifactFiles | None = None) -> None:
        """See `Tracker.replay`."""
        record, params = Record(identity, self._locations), flatten(identity.parameters)
        points = history_points(history) + points_of(final or {}, None)

        def replay(client: MlflowClient) -> None:
            if record.begin(client, self._writer.experiment_id, unless="FINISHED"):
                record.log_params(client, params)
                record.log_points(client, points)
                if files is not None:
                    with tempfile.TemporaryDirectory(prefix="impactx-") as folder:
                        for file in files(Path(folder)):
                            client.log_artifact(record.run_id, str(file))
                record.end(client, "FINISHED")

        self._later(record, replay, WHOLE_RUN)

    def register_model(self, model: FinalModel) -> None:
        """See `Tracker.register_model`."""
        name = ".".join(("impactx", *model.name))

        def register(client: MlflowClient) -> None:
            from impactx.tracking import models  # brings torch with it

            self._models[name] = models.register(
                client, self._writer.experiment_id(client), name, model)

        record = Record(RunIdentity(model.run_key, f"model {name}"), {})
        self._later(record, register, f"the registered model {name}", "artifacts")

    def died(self, identity: RunIdentity, error: str) -> None:
        """See `Tracker.died`."""
        record, params = Record(identity, self._locations), flatten(identity.parameters)
        text = redact(error, self._uri)

        def end(client: MlflowClient) -> None:
            where = f"tags.`{KEY}` = '{identity.key}'"
            runs = search(client, self._writer.experiment_id(client), where)
            if runs and not record.run_id and runs[-1].info.status != "RUNNING":
                return  # the process could end its run itself
            record.begin(client, self._writer.experiment_id)
            record.log_params(client, params)
            record.set_tags(client, {ERROR: last_line(text)})
            record.log_bytes(client, text.encode(), ERROR_FILE)
            record.end(client, "FAILED")

        self._later(record, end, "the status of a run whose process died")

    def close_unfinished(self, root_key: str) -> int:
        """Wait for what is in the background, then end the job's RUNNING runs as KILLED."""
        record, closed = Record(RunIdentity(root_key, root_key), {}), set()

        def close(client: MlflowClient) -> None:
            where = f"tags.`{ROOT}` = '{root_key}' and attributes.status = 'RUNNING'"
            own = {open_run.run_id for open_run in list(self._writer.open_runs.values())}
            for run in search(client, self._writer.experiment_id(client), where):
                # The caller may still be inside the job's own run, which ends by itself.
                if run.info.run_id not in own or run.data.tags[KEY] != root_key:
                    client.set_terminated(run.info.run_id, "KILLED")
                    closed.add(run.info.run_id)

        op = self._writer.submit(Op(record, close, "the status of unfinished runs"), later=True)
        self._writer.wait(op)
        record.warn()
        return len(closed)

    def describe(self) -> list[str]:
        """Return the command that serves the pages, where one is needed, and what to open there."""
        if self._uri.startswith("http"):
            address = urlsplit(self._uri)
            public = address._replace(netloc=address.netloc.rpartition("@")[2], query="")
            base = self._ui or public.geturl()
            lines = []
        else:
            # A password is not printed, and the shell knows where it comes from.
            secret = redact(self._uri) != self._uri
            shown = '"$MLFLOW_TRACKING_URI"' if secret else shlex.quote(self._uri)
            base = "http://127.0.0.1:5000"
            lines = [f"MLflow:     mlflow ui --backend-store-uri {shown} --port 5000"]
        base = base.rstrip("/")
        try:
            experiment = self._writer.experiment_id(connect(self._uri))
        except Exception:  # an absent server was warned of; its address is still of use
            return [*lines, f"runs:       {base}"]
        # Without the type of work, MLflow 3 shows an empty overview of language models' traces.
        runs = f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning"
        if self._root is None:
            return [*lines, f"runs:       {runs}"]
        view, where = view_key(self._root), quote(f"tags.`{ROOT}` = '{self._root}'")
        lines += [f"all runs:   {runs}&searchFilter={where}",
                  f"trials:     {runs}&viewStateShareKey={view}",
                  f"comparison: {runs}&viewStateShareKey={view}&compareRunsMode=CHART"]
        if self._models:
            name = sorted(self._models, key=lambda name: name.endswith(".impactx"))[-1]
            model = f"models:/{name}/{self._models[name]}"
            lines.append(f"models:     {base}/#/models, such as {model}")
        return lines
