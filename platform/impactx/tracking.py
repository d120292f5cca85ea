"""Runs in MLflow: the only module that imports mlflow, and only when something is logged.

One background thread a process does all the talking, so neither a slow nor an absent server holds up a
training: what it logs is buffered, sent every few seconds, and sent again until it arrives; `finish` waits
for the rest, or warns of what could not be logged.  Only `MlflowClient` is used, never mlflow's global state.

A run is found again by its tag `impactx.key`, so a job that died and starts again continues its runs.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import getpass
import hashlib
import json
import logging
import math
import os
import re
import shlex
import socket
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from impactx.experiment.tracker import (
    ContextRun,
    NoTracker,
    Status,
    Tracker,
    TrackingError,
    check_key,
    clean_key,
    epochs,
    flatten,
    numbers,
)
from impactx.settings import SQLITE_DEFAULT, ExperimentSettings, TrackingSettings

log = logging.getLogger(__name__)

KEY, ROOT, OWNER, PARENT = "impactx.key", "impactx.root", "impactx.owner", "mlflow.parentRunId"
ERROR, NON_FINITE, CHANGED = "impactx.error", "impactx.nonfinite", "impactx.changed"
MAX_PARAM, MAX_TAG, PER_BATCH, METRICS_PER_BATCH = 6000, 8000, 100, 1000
FLUSH_SECONDS = 5.0  # one log_batch costs 10 to 20 ms of CPU: every 5 s that is below 0.4 % of a training
PATIENCE_SECONDS = 120.0  # a finishing run waits so long for a server that does not answer
KILLED_SECONDS = 10.0  # the same after SIGTERM, which SIGKILL follows soon
RETRY_SECONDS = 5.0  # the longest pause between two tries
WHOLE_RUN = "the whole run"
# What the saved view of a job shows, by the names that impactx.experiment gives them.
VIEW_PARAMS = ["dataset", "model", "stage", "approach", "repeat", "learning_rate", "batch_size",
               "validation_fraction", "lambda"]
VIEW_ONLY = "approach"  # of the runs that have this parameter: trials, final models, their tests
VIEW_METRICS = ["best_val_accuracy", "test_accuracy", "paper_accuracy", "best_epoch", "train_seconds"]
VIEW_AXES = ["learning_rate", "batch_size", "validation_fraction"]
VIEW_CURVES = ["val_accuracy", "val_loss", "train_loss"]
VIEW_PREFIX, MAX_VIEWS = "impactx-", 30

Point = tuple[str, float, int, int | None]  # metric, value, milliseconds since 1970, step


def make_tracker(settings: ExperimentSettings) -> Tracker:
    """The tracker that an experiment's settings ask for."""
    return MlflowTracker(settings.tracking, settings.output) if settings.tracking.enabled else NoTracker()


class MlflowTracker:
    """`impactx.experiment.tracker.Tracker` on MLflow; the promises of the methods are written there."""

    def __init__(self, settings: TrackingSettings, output: str, *, flush_seconds: float = FLUSH_SECONDS,
                 patience_seconds: float = PATIENCE_SECONDS) -> None:
        """patience_seconds: how long a finishing run waits for a server that does not answer."""
        self._uri, self._artifacts = _addresses(settings.uri or os.environ.get("MLFLOW_TRACKING_URI"), output)
        self._experiment = settings.experiment
        self._options = (flush_seconds, patience_seconds)
        self._known: dict[str, tuple[str, str]] = {}  # key -> run id, root's key; saves searches
        self._root: str | None = None

    def __repr__(self) -> str:
        return f"MlflowTracker({redact(self._uri)!r}, experiment={self._experiment!r})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": dict(self._known)}  # a copy: the writer may add to it meanwhile

    @property
    def _writer(self) -> Writer:
        return _writer(os.getpid(), self._uri, self._experiment, *self._options)

    def prepare(self) -> None:
        """Create the database and the experiment, one process at a time: a fresh sqlite file breaks else."""
        path = _sqlite_path(self._uri)
        try:
            with contextlib.ExitStack() as stack:
                if path:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    fcntl.flock(stack.enter_context(open(f"{path}.lock", "w")), fcntl.LOCK_EX)
                client = _client(self._uri, create=True)
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
               history: Sequence[Mapping[str, float]] = (), final: Mapping[str, float] | None = None) -> None:
        """Make the FINISHED run of a unit whose result was reused, in the background."""
        record, flat = Record(key, name, parent, tags or {}, self._known), flatten(params or {})
        points = _history(history) + _points(final or {}, None)

        def replay(client: Any) -> None:
            if record.begin(client, self._writer.experiment_id, unless="FINISHED"):
                record.log_params(client, flat)
                record.log_points(client, points)
                record.end(client, "FINISHED")

        self._writer.submit(Op(record, replay, WHOLE_RUN, warns=True), later=True)

    def close_unfinished(self, root_key: str) -> int:
        """Wait for what is in the background, then end the job's runs that are still RUNNING as KILLED."""
        check_key(root_key)
        record, closed = Record(root_key, root_key, None, {}, {}), set()

        def close(client: Any) -> None:
            where = f"tags.`{ROOT}` = '{root_key}' and attributes.status = 'RUNNING'"
            here = {open_run.run_id for open_run in list(self._writer.open_runs.values())}
            for run in _search(client, self._writer.experiment_id(client), where):
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
            base, lines = address._replace(netloc=address.netloc.rpartition("@")[2], query="").geturl(), []
        else:
            # A password is not printed, and the shell knows where it comes from.
            shown = shlex.quote(self._uri) if redact(self._uri) == self._uri else '"$MLFLOW_TRACKING_URI"'
            base = "http://127.0.0.1:5000"
            lines = [f"MLflow:     mlflow ui --backend-store-uri {shown} --port 5000"]
        base = base.rstrip("/")
        try:
            experiment = self._writer.experiment_id(_client(self._uri))
            # Without the type of work, MLflow 3 shows an empty overview of language models' traces.
            runs = f"{base}/#/experiments/{experiment}/runs?workflowType=machine_learning"
        except Exception:  # an absent server was warned of; its address is still of use
            return [*lines, f"runs:       {base}"]
        if self._root is None:
            return [*lines, f"runs:       {runs}"]
        view, search = _view_key(self._root), quote(f"tags.`{ROOT}` = '{self._root}'")
        return [*lines, f"all runs:   {runs}&searchFilter={search}",
                f"trials:     {runs}&viewStateShareKey={view}",
                f"comparison: {runs}&viewStateShareKey={view}&compareRunsMode=CHART"]


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
        self._add(_points(metrics, step))

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """See `Run.log_history`."""
        self._add(_history(history))

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
        self._do(f"the artifact {path}", lambda client: self._record.log_text(client, text, path),
                 "artifacts")

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
            self.set_tags({ERROR: text.strip().rpartition("\n")[2][:500]})
            self.log_text(text, "error.txt")
        op = self._do("the status", lambda client: record.end(client, status))
        self._ended = True
        self._writer.wait(op, KILLED_SECONDS if status == "KILLED" else math.inf)
        self._writer.open_runs.pop(record.owner, None)
        record.warn()


class Record:
    """A run as the server has it: what it holds already, and how to add the rest. Only the writer calls it.

    Every method may be called again after it failed half-way.
    """

    def __init__(self, key: str, name: str, parent: str | None, tags: Mapping[str, Any],
                 known: dict[str, tuple[str, str]]) -> None:
        check_key(key, parent)
        self.key, self.name, self.parent, self.tags, self.known = key, name, parent, dict(tags), known
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.start, self.run_id, self.dead = _now(), "", False
        self.pending: list[Point] = []
        self.lost: dict[str, str] = {}  # what could not be logged: why
        self._params: dict[str, str] = {}
        self._values: dict[str, float] = {}
        self._steps: dict[str, set[int]] = {}
        self._non_finite: dict[str, str] = {}

    def begin(self, client: Any, experiment_id: Callable[[Any], str], unless: str | None = None) -> bool:
        """Find or create the run. False: it was there with the status `unless`, and nothing was done."""
        experiment, root, where = experiment_id(client), self.key, f"tags.`{KEY}` = '{self.key}'"
        tags = {KEY: self.key, OWNER: self.owner}
        if self.parent is not None:
            if self.parent not in self.known:
                parents = _search(client, experiment, f"tags.`{KEY}` = '{self.parent}'")
                if not parents:
                    raise NotYet(f"the parent run {self.parent!r} is not there")
                last = ([p for p in parents if p.info.status == "RUNNING"] or parents)[-1]
                self.known[self.parent] = (last.info.run_id, last.data.tags[ROOT])
            parent_id, root = self.known[self.parent]
            where += f" and tags.`{PARENT}` = '{parent_id}'"
            tags[PARENT] = parent_id
        tags[ROOT] = root
        tags = _tags(self.tags) | tags
        found = _search(client, experiment, where)
        if found:
            run = found[0]
            if run.info.status == unless:
                return False
            client.update_run(run.info.run_id, status="RUNNING", name=self.name)
            if ERROR in run.data.tags:
                client.delete_tag(run.info.run_id, ERROR)
            self._params, self._values = dict(run.data.params), dict(run.data.metrics)
        else:
            with contextlib.suppress(Exception):  # no user name in a bare container
                tags.setdefault("mlflow.user", getpass.getuser())
            run = client.create_run(experiment, start_time=self.start, run_name=self.name, tags=dict(tags))
        self.run_id = run.info.run_id
        if found:
            self.set_tags(client, tags)
        if unless is None:  # nobody's parent, and there may be thousands
            self.known[self.key] = (self.run_id, root)
        return True

    def set_tags(self, client: Any, tags: Mapping[str, Any]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        items = [RunTag(key, value) for key, value in _tags(tags).items()]
        for i in range(0, len(items), PER_BATCH):
            client.log_batch(self.run_id, tags=items[i:i + PER_BATCH])

    def log_params(self, client: Any, params: Mapping[str, str]) -> None:
        """Log flat parameters. MLflow never changes one: another value than before becomes a tag."""
        from mlflow.entities import Param

        short, changed = [], {}
        for key, value in params.items():
            shown = value
            if len(value) > MAX_PARAM:
                digest = hashlib.sha256(value.encode()).hexdigest()[:8]
                end = f"... ({len(value)} characters, {digest}; whole in the artifact params/{key}.txt)"
                shown = value[:MAX_PARAM - len(end)] + end
            if key not in self._params:
                short.append(Param(key, shown))
                if shown != value:
                    self.log_text(client, value, f"params/{key}.txt")
            elif self._params[key] != shown:
                changed[clean_key(f"{CHANGED}.{key}")] = shown
        for i in range(0, len(short), PER_BATCH):
            client.log_batch(self.run_id, params=short[i:i + PER_BATCH])
        if changed:
            self.set_tags(client, changed)
            log.info("MLflow: the run %r was begun with other values of %s; the new ones are its tags %s.*",
                     self.name, ", ".join(sorted(changed)).replace(f"{CHANGED}.", ""), CHANGED)
        self._params = {param.key: param.value for param in short} | self._params

    def log_text(self, client: Any, text: str, path: str) -> None:
        """Log a text as an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, Path(path).name)
            file.write_text(text, encoding="utf-8")
            client.log_artifact(self.run_id, str(file), os.path.dirname(path) or None)

    def log_points(self, client: Any, points: Sequence[Point]) -> None:
        """Log metrics, without those that the run has."""
        from mlflow.entities import Metric

        metrics, values, steps = [], {}, set()
        for key, value, when, step in points:
            if step is None:
                old = values.get(key, self._values.get(key))
                if old is not None and (old == value or (math.isnan(old) and not math.isfinite(value))):
                    continue
                values[key] = value
            else:
                if key not in self._steps:
                    self._steps[key] = {m.step for m in client.get_metric_history(self.run_id, key)} \
                        if key in self._values else set()
                if step in self._steps[key] or (key, step) in steps:
                    continue
                steps.add((key, step))
            if not math.isfinite(value):
                # MLflow would keep infinity as 1.8e308, which flattens every curve beside it.
                where = "" if step is None else f" at step {step}"
                self._non_finite.setdefault(key, f"{key}={value}{where}")
                value = math.nan
            metrics.append(Metric(key, value, when, step or 0))
        for i in range(0, len(metrics), METRICS_PER_BATCH):
            client.log_batch(self.run_id, metrics[i:i + METRICS_PER_BATCH])
        if self._non_finite:
            self.set_tags(client, {NON_FINITE: "first " + "; ".join(self._non_finite.values())})
        self._values |= values
        for key, step in steps:
            self._steps[key].add(step)

    def flush(self, client: Any) -> None:
        """Log the metrics that were added since."""
        count = len(self.pending)
        if count:
            self.check_owner(client)
            self.log_points(client, self.pending[:count])
            del self.pending[:count]

    def check_owner(self, client: Any) -> None:
        """Refuse to go on when another process continues the run: this one is an orphan of a dead job."""
        owner = client.get_run(self.run_id).data.tags.get(OWNER)
        if owner != self.owner:
            raise TakenOver(f"another process continues this run ({owner})")

    def end(self, client: Any, status: str) -> None:
        """Log what is pending and set the final status."""
        self.flush(client)
        self.check_owner(client)
        client.set_terminated(self.run_id, status, _now())

    def warn(self) -> None:
        """Say what could not be logged."""
        if self.pending:
            self.lost.setdefault(f"{len(self.pending)} metric values", "not sent")
        if self.lost:
            reasons = sorted(set(self.lost.values()))
            log.warning("MLflow: not logged of the run %r: %s (%s)", self.name, ", ".join(self.lost),
                        "; ".join(reasons))


@dataclass(eq=False)
class Op:
    """Something to be done with the server, until it succeeds."""

    record: Record
    do: Callable[[Any], Any]
    what: str
    channel: str = "the server"  # or "artifacts": another store, which may fail alone
    warns: bool = False  # nobody waits for the run's end: say at once what was lost
    done: bool = False


class NotYet(RuntimeError):
    """What is missing will come, if nothing is wrong: try again, and say nothing yet."""


class TakenOver(RuntimeError):
    """The run belongs to another process now."""


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
                op.do(_client(self.uri))
            except Exception as error:
                tries += 1
                why = redact(f"{type(error).__name__}: {error}", self.uri).strip().partition("\n")[0][:500]
                since = self._down.get(op.channel, (began, ""))[0]
                # The store of artifacts may fail for good (no login, say): the rest must not wait for it.
                hopeless = op.channel == "artifacts" and time.monotonic() - since > self.patience
                if _is_final(error) or (hopeless and tries > 1):
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


def _writer(*name: Any) -> Writer:
    """This process's writer for an address and experiment."""
    with _writers_lock:
        if name not in _writers:
            _writers[name] = Writer(*name[1:])
        return _writers[name]


def _client(uri: str, create: bool = False) -> Any:
    path = _sqlite_path(uri)
    if path and not create and not path.exists():
        raise FileNotFoundError(f"no MLflow database {path} on the machine {socket.gethostname()}: call "
                                "prepare() first; for several machines set MLFLOW_TRACKING_URI to a server")
    # Retries are the writer's; mlflow's own would hold it up for minutes.
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
                        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "mlflow.store.tracking.sqlalchemy_store", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def _search(client: Any, experiment: str, where: str) -> list[Any]:
    """All active runs that the filter finds, the oldest first."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment], where, max_results=1000, page_token=token,
                                  order_by=["attributes.start_time ASC"])
        runs += page
        token = page.token
        if not token:
            return runs


def _is_final(error: Exception) -> bool:
    """Whether trying again is no use."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429)
    if isinstance(error, OSError):  # also what requests raises
        return isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError))
    return isinstance(error, (TypeError, ValueError, LookupError, ImportError, TakenOver))


def save_view(client: Any, experiment_id: str, root_key: str) -> None:
    """Save a view of the job's trainings in the experiment: MLflow's pages show none of our columns else.

    Views are tags of the experiment, as the pages themselves save them; the oldest of ours go.
    """
    section = {"display": True, "isReordered": False, "deleted": False, "isGenerated": False}
    chart = {"deleted": False, "isGenerated": False, "metricSectionId": "impactx", "runsCountToCompare": 50}
    state = {
        "selectedColumns": [*(f"params.`{name}`" for name in VIEW_PARAMS),
                            *(f"metrics.`{name}`" for name in VIEW_METRICS), "attributes.`Duration`"],
        "searchFilter": f"tags.`{ROOT}` = '{root_key}' and params.`{VIEW_ONLY}` != ''",
        "orderByKey": f"metrics.`{VIEW_METRICS[0]}`", "orderByAsc": False, "startTime": "ALL",
        "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
        "runsHiddenMode": "SHOW_ALL",
        "compareRunSections": [section | {"uuid": "impactx", "name": "Comparison of trainings"}],
        "compareRunCharts": [
            chart | {"uuid": "impactx-parallel", "type": "PARALLEL", "selectedParams": VIEW_AXES,
                     "selectedMetrics": VIEW_METRICS[:1], "showAllRuns": True},
            *(chart | {"uuid": f"impactx-{name}", "type": "LINE", "metricKey": name,
                       "selectedMetricKeys": [name]} for name in VIEW_CURVES)]}
    now, prefix = _now(), "mlflow.sharedViewState."
    tags = client.get_experiment(experiment_id).tags
    ours = sorted((key for key in tags if key.startswith(f"{prefix}{VIEW_PREFIX}")),
                  key=lambda key: json.loads(tags[key])["updatedAt"])
    for key in ours[:-MAX_VIEWS]:
        client.delete_experiment_tag(experiment_id, key)
    client.set_experiment_tag(experiment_id, prefix + _view_key(root_key), json.dumps({
        "name": f"job {root_key}", "createdAt": now, "updatedAt": now, "state": json.dumps(state)}))


def _view_key(root_key: str) -> str:
    return VIEW_PREFIX + hashlib.sha256(root_key.encode()).hexdigest()[:12]


def _addresses(uri: str | None, output: str) -> tuple[str, str | None]:
    """The tracking address, and where its artifacts go (None: the server knows)."""
    remote = "://" in output
    if not uri:
        folder = Path.cwd() if remote else Path(output).expanduser().absolute()
        uri = f"sqlite:///{folder / SQLITE_DEFAULT}"
        if remote:
            return uri, f"{output.rstrip('/')}/mlartifacts"
    path = _sqlite_path(uri)
    if path is None:
        return uri, None
    # A relative path would be another file in each worker.
    return f"sqlite:///{path}{''.join(uri.partition('?')[1:])}", (path.parent / "mlartifacts").as_uri()


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def redact(text: str, uri: str = "") -> str:
    """The text without the passwords of addresses in it, nor the one of `uri` wherever it stands."""
    secret = urlsplit(uri).password or ""
    for form in {secret, unquote(secret)}:
        if len(form) > 3:
            text = text.replace(form, "***")
    text = re.sub(r"://[^/\s]*@", "://***@", text)
    return re.sub(r"(?i)\b((?:password|passwd|token|secret)=)[^&\s]+", r"\1***", text)


def _points(metrics: Mapping[str, float], step: int | None) -> list[Point]:
    return [(key, value, _now(), step) for key, value in numbers(metrics).items()]


def _history(history: Sequence[Mapping[str, float]]) -> list[Point]:
    return [(key, value, _now(), step) for step, row in epochs(history) for key, value in row.items()]


def _tags(tags: Mapping[str, Any]) -> dict[str, str]:
    return {clean_key(str(k)): v if len(v := str(value)) <= MAX_TAG else v[:MAX_TAG - 3] + "..."
            for k, value in tags.items()}


def _now() -> int:
    return int(time.time() * 1000)
