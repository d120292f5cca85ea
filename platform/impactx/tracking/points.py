"""MLflow's names and limits, and values in the form in which it takes them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from impactx.run.values import clean_key, epochs, numbers

# Tags of a run: its key, its job's key, the process that works on it, MLflow's id of its parent.
KEY, ROOT, OWNER, PARENT = "impactx.key", "impactx.root", "impactx.owner", "mlflow.parentRunId"
# Tags of a run: its error, metrics that were not finite, parameters that changed after a restart.
ERROR, NON_FINITE, CHANGED = "impactx.error", "impactx.nonfinite", "impactx.changed"
ERROR_FILE = "error.txt"
# Characters of a parameter's or a tag's value, and items in one request: MLflow's own limits.
MAX_PARAM, MAX_TAG, PER_BATCH, METRICS_PER_BATCH = 6000, 8000, 100, 1000


class Point(NamedTuple):
    """One value of a metric.

    Args:
        metric: The metric's name.
        value: Its value, which may be infinite or not a number.
        time: When it was logged, in milliseconds since 1970.
        step: The epoch, counted from 1; None for a number that describes the run as a whole.
    """

    metric: str
    value: float
    time: int
    step: int | None


def points_of(metrics: Mapping[str, float], step: int | None) -> list[Point]:
    """Return MLflow's points of these metrics, at one step (None: of the run as a whole)."""
    return [Point(key, value, now_ms(), step) for key, value in numbers(metrics).items()]


def history_points(history: Sequence[Mapping[str, float]]) -> list[Point]:
    """Return MLflow's points of a whole history, which has one row per epoch."""
    return [Point(key, value, now_ms(), step)
            for step, row in epochs(history) for key, value in row.items()]


def clean_tags(tags: Mapping[str, object]) -> dict[str, str]:
    """Return tags as MLflow takes them: allowed names, texts of at most MAX_TAG characters."""
    return {clean_key(str(key)): _cut(str(value)) for key, value in tags.items()}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TAG else text[:MAX_TAG - 3] + "..."


def last_line(error: str) -> str:
    """Return the last line of an error's text, which a run's tag shows; at most 500 characters."""
    return error.strip().rpartition("\n")[2][:500]


def now_ms() -> int:
    """Return the milliseconds since 1970, as MLflow counts time."""
    return int(time.time() * 1000)
