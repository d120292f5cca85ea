"""A run as the server holds it, and the operations that bring it there: each may be tried again."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import logging
import math
import os
import socket
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from impactx.run.tracker import RunIdentity, Status
from impactx.run.values import clean_key
from impactx.tracking.client import NotYet, TakenOver, search
from impactx.tracking.points import (
    CHANGED,
    ERROR,
    KEY,
    MAX_PARAM,
    METRICS_PER_BATCH,
    NON_FINITE,
    OWNER,
    PARENT,
    PER_BATCH,
    ROOT,
    Point,
    clean_tags,
    now_ms,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger("impactx.tracking")


class Location(NamedTuple):
    """Where a run is on the server: MLflow's id of it, and the key of the job it belongs to."""

    run_id: str
    root_key: str


class Record:
    """A run as the server holds it: what it has already, and how the rest is added.

    Only the writer's thread calls the methods. Each may be called again after it failed half-way.

    Args:
        identity: The run's identity.
        locations: Where the runs of this process are, by their keys: it saves searches. Shared, and
            added to.

    Attributes:
        owner: This process and this record, in a text that no other has.
        run_id: MLflow's id of the run; empty until it has begun.
        dead: Whether the run was given up; nothing more is sent then.
        pending: Metrics that are still to be sent.
        lost: What could not be logged, with the reason.
    """

    def __init__(self, identity: RunIdentity, locations: dict[str, Location]) -> None:
        self.key, self.name, self.parent = identity.key, identity.name, identity.parent
        self.tags = dict(identity.tags)
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.start, self.run_id, self.dead = now_ms(), "", False
        self.pending: list[Point] = []
        self.lost: dict[str, str] = {}
        self._locations = locations
        self._params: dict[str, str] = {}
        self._values: dict[str, float] = {}
        self._steps: dict[str, set[int]] = {}
        self._non_finite: dict[str, str] = {}

    def begin(self, client: MlflowClient, experiment_id: Callable[[MlflowClient], str],
              unless: Status | None = None) -> bool:
        """Find or create the run on the server.

        Args:
            client: MLflow's client.
            experiment_id: Returns the experiment's id.
            unless: A status; a run that is there with it is left as it is.

        Returns:
            False if the run was there with the status `unless` and nothing was done.

        Raises:
            NotYet: The parent's run is not on the server.
        """
        experiment, root, where = experiment_id(client), self.key, f"tags.`{KEY}` = '{self.key}'"
        tags = {KEY: self.key, OWNER: self.owner}
        if self.parent is not None:
            parent = self._locate(client, experiment, self.parent)
            root = parent.root_key
            where += f" and tags.`{PARENT}` = '{parent.run_id}'"
            tags[PARENT] = parent.run_id
        tags[ROOT] = root
        tags = clean_tags(self.tags) | tags
        existing = search(client, experiment, where)
        if existing:
            run = existing[0]
            if run.info.status == unless:
                return False
            client.update_run(run.info.run_id, status="RUNNING", name=self.name)
            if ERROR in run.data.tags:
                client.delete_tag(run.info.run_id, ERROR)
            self._params, self._values = dict(run.data.params), dict(run.data.metrics)
        else:
            with contextlib.suppress(Exception):  # no user name in a bare container
                tags.setdefault("mlflow.user", getpass.getuser())
            run = client.create_run(experiment, start_time=self.start, run_name=self.name,
                                    tags=dict(tags))
        self.run_id = run.info.run_id
        if existing:
            self.set_tags(client, tags)
        if unless is None:  # a run that is replayed is nobody's parent, and there may be thousands
            self._locations[self.key] = Location(self.run_id, root)
        return True

    def _locate(self, client: MlflowClient, experiment: str, key: str) -> Location:
        if key not in self._locations:
            runs = search(client, experiment, f"tags.`{KEY}` = '{key}'")
            if not runs:
                raise NotYet(f"the parent run {key!r} is not there")
            last = ([run for run in runs if run.info.status == "RUNNING"] or runs)[-1]
            self._locations[key] = Location(last.info.run_id, last.data.tags[ROOT])
        return self._locations[key]

    def set_tags(self, client: MlflowClient, tags: Mapping[str, object]) -> None:
        """Set tags."""
        from mlflow.entities import RunTag

        items = [RunTag(key, value) for key, value in clean_tags(tags).items()]
        for i in range(0, len(items), PER_BATCH):
            client.log_batch(self.run_id, tags=items[i:i + PER_BATCH])

    def log_params(self, client: MlflowClient, params: Mapping[str, str]) -> None:
        """Log flat parameters. MLflow never changes one: a value that is new becomes a tag."""
        from mlflow.entities import Param

        short, changed = [], {}
        for key, value in params.items():
            shown = value
            if len(value) > MAX_PARAM:
                digest = hashlib.sha256(value.encode()).hexdigest()[:8]
                end = (f"... ({len(value)} characters, {digest}; whole in the artifact "
                       f"params/{key}.txt)")
                shown = value[:MAX_PARAM - len(end)] + end
            if key not in self._params:
                short.append(Param(key, shown))
                if shown != value:
                    self.log_bytes(client, value.encode(), f"params/{key}.txt")
            elif self._params[key] != shown:
                changed[clean_key(f"{CHANGED}.{key}")] = shown
        for i in range(0, len(short), PER_BATCH):
            client.log_batch(self.run_id, params=short[i:i + PER_BATCH])
        if changed:
            self.set_tags(client, changed)
            log.info("MLflow: the run %r was begun with other values of %s; the new ones are its "
                     "tags %s.*", self.name,
                     ", ".join(sorted(changed)).replace(f"{CHANGED}.", ""), CHANGED)
        self._params = {param.key: param.value for param in short} | self._params

    def log_bytes(self, client: MlflowClient, content: bytes, path: str) -> None:
        """Log the content of an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, Path(path).name)
            file.write_bytes(content)
            client.log_artifact(self.run_id, str(file), os.path.dirname(path) or None)

    def log_points(self, client: MlflowClient, points: Sequence[Point]) -> None:
        """Log metrics, without those that the run has."""
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        values: dict[str, float] = {}
        steps: set[tuple[str, int]] = set()
        for key, value, when, step in points:
            if step is None:
                old = values.get(key, self._values.get(key))
                if old is not None and (
                        old == value or (math.isnan(old) and not math.isfinite(value))):
                    continue
                values[key] = value
            elif step in self._logged_steps(client, key) or (key, step) in steps:
                continue
            else:
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

    def _logged_steps(self, client: MlflowClient, key: str) -> set[int]:
        """Return the steps at which the run has a value of a metric."""
        if key not in self._steps:
            history = client.get_metric_history(self.run_id, key) if key in self._values else []
            self._steps[key] = {point.step for point in history}
        return self._steps[key]

    def flush(self, client: MlflowClient) -> None:
        """Log the metrics that were added since the last flush."""
        count = len(self.pending)
        if count:
            self.check_owner(client)
            self.log_points(client, self.pending[:count])
            del self.pending[:count]

    def check_owner(self, client: MlflowClient) -> None:
        """Refuse to go on where another process continues the run: this one is a dead job's orphan.

        Raises:
            TakenOver: The run has another owner.
        """
        owner = client.get_run(self.run_id).data.tags.get(OWNER)
        if owner != self.owner:
            raise TakenOver(f"another process continues this run ({owner})")

    def end(self, client: MlflowClient, status: Status) -> None:
        """Log what is pending and set the final status."""
        self.flush(client)
        self.check_owner(client)
        client.set_terminated(self.run_id, status, now_ms())

    def warn(self) -> None:
        """Log a warning that names what could not be logged."""
        if self.pending:
            self.lost.setdefault(f"{len(self.pending)} metric values", "not sent")
        if self.lost:
            reasons = sorted(set(self.lost.values()))
            log.warning("MLflow: not logged of the run %r: %s (%s)", self.name,
                        ", ".join(self.lost), "; ".join(reasons))
