"""MLflow's client: how it is created and searched, and which of its errors may pass."""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING

from impactx.tracking.addresses import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Retries are the writer's: mlflow's own would hold it up for minutes.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
TALKATIVE = ("mlflow.store.db.utils", "mlflow.store.tracking.sqlalchemy_store", "mlflow.pyfunc",
             "alembic", "mlflow.store.model_registry.abstract_store")


class NotYet(RuntimeError):
    """Something is missing that will come if nothing is wrong: try again, without a warning."""


class TakenOver(RuntimeError):
    """The run belongs to another process now."""


def quiet_mlflow() -> None:
    """Set mlflow's defaults for this process: no telemetry, no retries of its own, no chatter."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)


def connect(uri: str) -> MlflowClient:
    """Return a client of the tracking store at an address.

    Raises:
        FileNotFoundError: The address is a SQLite file that does not exist.
    """
    path = sqlite_path(uri)
    if path and not path.exists():
        raise FileNotFoundError(
            f"no MLflow database {path} on the machine {socket.gethostname()}: call prepare() "
            "first; for several machines set MLFLOW_TRACKING_URI to a server")
    quiet_mlflow()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def search(client: MlflowClient, experiment: str, where: str) -> list[Run]:
    """Return all active runs that match a filter, the oldest first.

    Args:
        client: The client.
        experiment: The experiment's id.
        where: A filter in MLflow's search syntax.
    """
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment], where, max_results=1000, page_token=token,
                                  order_by=["attributes.start_time ASC"])
        runs += page
        token = page.token
        if not token:
            return runs


def is_final(error: Exception) -> bool:
    """Return whether the same request would fail again, so that trying again is of no use."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())  # type: ignore[no-untyped-call]
        return 400 <= status < 500 and status not in (408, 429)
    if isinstance(error, OSError):  # also what requests raises
        return isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError))
    return isinstance(error, (TypeError, ValueError, LookupError, ImportError, TakenOver))
