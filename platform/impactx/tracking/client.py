"""MLflow's client: made without side effects, searched to the last page, its errors told apart."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from impactx.tracking.addresses import sqlite_path


class NotYet(RuntimeError):
    """What is missing will come, if nothing is wrong: try again, and say nothing yet."""


class TakenOver(RuntimeError):
    """The run belongs to another process now."""


def connect(uri: str, create: bool = False) -> Any:
    """An MlflowClient of the address. Raises FileNotFoundError where a SQLite file is absent and not to be made."""
    path = sqlite_path(uri)
    if path and not create and not path.exists():
        raise FileNotFoundError(f"no MLflow database {path} on the machine {socket.gethostname()}: call "
                                "prepare() first; for several machines set MLFLOW_TRACKING_URI to a server")
    # Retries are the writer's; mlflow's own would hold it up for minutes.
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
                        "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
                        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    for name in ("mlflow.store.db.utils", "mlflow.store.tracking.sqlalchemy_store", "mlflow.pyfunc", "alembic",
                 "mlflow.store.model_registry.abstract_store"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=uri)


def search(client: Any, experiment: str, where: str) -> list[Any]:
    """All active runs that the filter finds, the oldest first."""
    runs, token = [], None
    while True:
        page = client.search_runs([experiment], where, max_results=1000, page_token=token,
                                  order_by=["attributes.start_time ASC"])
        runs += page
        token = page.token
        if not token:
            return runs


def is_final(error: Exception) -> bool:
    """Whether trying again is no use."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in (408, 429)
    if isinstance(error, OSError):  # also what requests raises
        return isinstance(error, (FileNotFoundError, IsADirectoryError, PermissionError))
    return isinstance(error, (TypeError, ValueError, LookupError, ImportError, TakenOver))
