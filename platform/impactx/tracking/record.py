"""What a run holds on the server, and the operations that put it there: each may be tried again."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import logging
import math
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from impactx.experiment.tracker import (
    check_key,
    clean_key,
    epochs,
    numbers,
)
from impactx.tracking.client import NotYet, TakenOver, search

log = logging.getLogger("impactx.tracking")

KEY, ROOT, OWNER, PARENT = "impactx.key", "impactx.root", "impactx.owner", "mlflow.parentRunId"
ERROR, NON_FINITE, CHANGED = "impactx.error", "impactx.nonfinite", "impactx.changed"
MAX_PARAM, MAX_TAG, PER_BATCH, METRICS_PER_BATCH = 6000, 8000, 100, 1000
WHOLE_RUN, ERROR_FILE = "the whole run", "error.txt"

Point = tuple[str, float, int, int | None]  # metric, value, milliseconds since 1970, step


class Record:
    """A run as the server has it: what it holds already, and how to add the rest. Only the writer calls it.

    Every method may be called again after it failed half-way.
    """

    def __init__(self, key: str, name: str, parent: str | None, tags: Mapping[str, Any],
                 known: dict[str, tuple[str, str]]) -> None:
        check_key(key, parent)
        self.key, self.name, self.parent, self.tags, self.known = key, name, parent, dict(tags), known
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self.start, self.run_id, self.dead = now_ms(), "", False
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
                parents = search(client, experiment, f"tags.`{KEY}` = '{self.parent}'")
                if not parents:
                    raise NotYet(f"the parent run {self.parent!r} is not there")
                last = ([p for p in parents if p.info.status == "RUNNING"] or parents)[-1]
                self.known[self.parent] = (last.info.run_id, last.data.tags[ROOT])
            parent_id, root = self.known[self.parent]
            where += f" and tags.`{PARENT}` = '{parent_id}'"
            tags[PARENT] = parent_id
        tags[ROOT] = root
        tags = clean_tags(self.tags) | tags
        found = search(client, experiment, where)
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

        items = [RunTag(key, value) for key, value in clean_tags(tags).items()]
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
                    self.log_bytes(client, value.encode(), f"params/{key}.txt")
            elif self._params[key] != shown:
                changed[clean_key(f"{CHANGED}.{key}")] = shown
        for i in range(0, len(short), PER_BATCH):
            client.log_batch(self.run_id, params=short[i:i + PER_BATCH])
        if changed:
            self.set_tags(client, changed)
            log.info("MLflow: the run %r was begun with other values of %s; the new ones are its tags %s.*",
                     self.name, ", ".join(sorted(changed)).replace(f"{CHANGED}.", ""), CHANGED)
        self._params = {param.key: param.value for param in short} | self._params

    def log_bytes(self, client: Any, content: bytes, path: str) -> None:
        """Log the content of an artifact."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, Path(path).name)
            file.write_bytes(content)
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
        client.set_terminated(self.run_id, status, now_ms())

    def warn(self) -> None:
        """Say what could not be logged."""
        if self.pending:
            self.lost.setdefault(f"{len(self.pending)} metric values", "not sent")
        if self.lost:
            reasons = sorted(set(self.lost.values()))
            log.warning("MLflow: not logged of the run %r: %s (%s)", self.name, ", ".join(self.lost),
                        "; ".join(reasons))


def last_line(error: str) -> str:
    """What a run's tag says of its error."""
    return error.strip().rpartition("\n")[2][:500]


def points_of(metrics: Mapping[str, float], step: int | None) -> list[Point]:
    """MLflow's points of these metrics, at one step (None: of the run as a whole)."""
    return [(key, value, now_ms(), step) for key, value in numbers(metrics).items()]


def history_points(history: Sequence[Mapping[str, float]]) -> list[Point]:
    """MLflow's points of a whole history, one row an epoch."""
    return [(key, value, now_ms(), step) for step, row in epochs(history) for key, value in row.items()]


def clean_tags(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as MLflow takes them: allowed keys, text of at most MAX_TAG characters."""
    return {clean_key(str(k)): v if len(v := str(value)) <= MAX_TAG else v[:MAX_TAG - 3] + "..."
            for k, value in tags.items()}


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow counts."""
    return int(time.time() * 1000)
